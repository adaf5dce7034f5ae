"""Checks everything that the demo reads before it loads weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from dataset.containers import ClipError
from dataset.video import Resolution, frames_available, probe
from utils.checkpoint.adapters import scales_for
from utils.checkpoint.export import POSITIONS
from utils.checkpoint.finetuned import find_transformer, read_without_config, trained_positions
from utils.checkpoint.lora_reader import Lora, read_lora
from utils.common.errors import CheckReport, UserError
from utils.common.filesystem import check_writable, unreadable
from utils.generation.args import PATHS, DemoArgs
from utils.generation.videos import Video, located
from utils.model import loading
from utils.model.positions import choose_positions
from utils.model.spec import LEARNED, ModelSpec
from utils.model.weight_files import check_shapes, check_weights, read_config
from utils.training.trainable import compile_error

Result = TypeVar("Result")


def task_of(args: DemoArgs, spec: ModelSpec) -> str:
    return args.generate_type or spec.task


def with_positions(args: DemoArgs, spec: ModelSpec) -> ModelSpec:
    """Returns the spec with the learned positions that the LoRA or the transformer was trained with.

    `--learned_positions` decides if neither states them.

    Raises:
        UserError: it states others.
    """
    return choose_positions(
        spec, args.learned_positions, *trained_positions(args.transformer_path, args.lora_path, spec)
    )


def choose_resolution(args: DemoArgs, spec: ModelSpec) -> Resolution:
    """Returns the requested size, by default the native size of the checkpoint.

    For v2v, reduces the number of frames to one that both the source clip and the model support.

    Raises:
        UserError: the source clip cannot be read or is too short.
    """
    frames = args.num_frames or spec.native.frames
    resolution = Resolution(frames, args.height or spec.native.height, args.width or spec.native.width)
    if task_of(args, spec) != "v2v" or args.image_or_video_path is None:
        return resolution
    available = frames_available(as_user_error(probe, args.image_or_video_path), args.fps or spec.fps)
    # The v2v pipeline encodes the clip and does not pad its latents, but CogVideoX1.5 needs an even number of latent
    # frames. The VAE preserves the number of frames for 8N (an even number of latent frames) and 8N+1 (an odd one).
    remainder = 0 if spec.is_v1_5 else 1
    usable = (min(frames, available) - remainder) // 8 * 8 + remainder
    if usable < 8:
        raise UserError(f"--image_or_video_path {args.image_or_video_path}: {available} frames are too few for v2v.")
    return Resolution(usable, resolution.height, resolution.width)


def check(args: DemoArgs, videos: list[Video], spec: ModelSpec) -> list[Resolution]:
    """Checks the models and all videos. Returns the size of each video. Raises UserError with all errors."""
    report = CheckReport()
    check_models(args, spec, report)
    for folder in {video.output_path.parent for video in videos if video.output_path is not None}:
        report.run(check_writable, folder, "--output_path")
    resolutions = [report.run(check_video, video, spec) for video in videos]
    if report.errors:
        raise UserError(dict.fromkeys(report.errors))
    return [resolution for resolution in resolutions if resolution is not None]


def check_models(args: DemoArgs, spec: ModelSpec, report: CheckReport) -> None:
    """Adds the errors of the base, the LoRA and the transformer."""
    task = task_of(args, spec)
    required = "i2v" if task == "i2v" else "t2v"
    if spec.task != required:
        report.errors.append(
            f"--generate_type {task} needs a checkpoint for {required}; {args.model_path} is one for {spec.task}."
        )
    if args.lora_path and args.transformer_path is not None:
        report.errors.append(
            "--lora_path and --transformer_path cannot be combined; adapters fit only the base they were trained on."
        )
    for lora, _ in report.run(read_loras, args, spec) or []:
        report.run(lora.check_finite)
    if args.transformer_path is not None:
        report.run(check_transformer, args.transformer_path, spec)
    if args.compile and (error := compile_error()):
        report.errors.append(f"--compile: torch.compile fails on this machine ({error}).")


def check_video(video: Video, spec: ModelSpec) -> Resolution:
    """Returns the size of one video. Raises UserError with all errors of its size, its image or clip, and its file."""
    with located(video):
        resolution = choose_resolution(video, spec)
        if errors := list(video_errors(video, spec, resolution)):
            raise UserError(errors)
    return resolution


def video_errors(video: DemoArgs, spec: ModelSpec, resolution: Resolution) -> Iterator[str]:
    """Yields what is wrong with the flags of one video."""
    task = task_of(video, spec)
    yield from spec.resolution_errors(resolution, "--num_frames x --height x --width")
    if task != "v2v" and resolution.frames % 8 != 1:
        yield f"--num_frames {resolution.frames}: the number must be 8N+1, such as 49."
    if task == "v2v" and int(video.num_inference_steps * video.strength) == 0:
        yield f"--strength {video.strength} of --num_inference_steps {video.num_inference_steps} leaves no step."
    if task != "t2v" and video.image_or_video_path is None and video.prefix_video is None:
        yield f"{task} needs --image_or_video_path."
    for flag in ("last_image", "prefix_video"):
        if task != "i2v" and getattr(video, flag) is not None:
            yield f"--{flag} is for image to video (i2v); this is {task}."
    if task == "t2v" and video.image_or_video_path is not None:
        yield "--image_or_video_path is given, but t2v takes none; add --generate_type v2v or omit the path."
    if video.output_path is not None and video.output_path.is_dir():
        yield f"--output_path {video.output_path} is a folder; give the name of an .mp4 file."
    sources = (path for name in PATHS if (path := getattr(video, name)) is not None)
    if video.output_path is not None and video.output_path.resolve() in [path.resolve() for path in sources]:
        yield f"--output_path {video.output_path} would overwrite the clip that the video starts from."


def read_loras(args: DemoArgs, spec: ModelSpec) -> list[tuple[Lora, float]]:
    """Reads the names and shapes of the LoRAs. Returns each with its scale.

    Raises:
        UserError: one is unusable, or the number of scales differs.
    """
    scales = scales_for(args.lora_path, args.lora_scale, "--lora_path")
    loras = [read_lora(path, "--lora_path", spec.transformer) for path in args.lora_path]
    return list(zip(loras, scales, strict=True))


def check_transformer(path: Path, spec: ModelSpec) -> None:
    """Raises UserError if a fine-tuned transformer cannot replace the transformer of the base."""
    folder, flag = find_transformer(path), "--transformer_path"
    model_class = loading.CogVideoXTransformer3DModel
    if not (folder / "config.json").is_file():
        try:
            stored = read_without_config(folder, spec.transformer)
        except UserError:
            raise
        except Exception as error:  # whatever the readers of zip, pickle and safetensors files raise
            raise UserError(f"{flag} {folder} is damaged ({error}); merge the checkpoint again.") from error
        shapes = {name: list(tensor.shape) for name, tensor in stored.items()}
        # the base has the learned positions that a file for ComfyUI lacks
        expected = spec.transformer | {LEARNED: POSITIONS in shapes}
        check_shapes(shapes, folder, flag, model_class, expected, strict=True)
        return
    config = read_config(folder / "config.json", model_class, flag)
    for name, expected in spec.transformer.items():
        if name[0] != "_" and name != LEARNED and config.get(name) != expected:
            raise UserError(
                f"{flag} {folder}: {name} is {config.get(name)}, but {expected} in the base; "
                "was it trained on another checkpoint?"
            )
    check_weights(folder, flag, model_class, config)


def as_user_error(
    function: Callable[..., Result], path: Path, *args: object, flag: str = "--image_or_video_path"
) -> Result:
    """Calls a function that reads a clip or an image, and turns its ClipError into a UserError that names the flag."""
    if reason := unreadable(path):
        raise UserError(f"{flag}: {reason}.")
    try:
        return function(path, *args)
    except ClipError as error:
        raise UserError(f"{flag} {path} {error}.") from error

"""Generates a video with a base CogVideoX model, a LoRA checkpoint, or a fine-tuned transformer.

python cli_demo.py --model_path THUDM/CogVideoX-5b --prompt "A kitten" --lora_path outputs/t2v-lora/checkpoint-500
python cli_demo.py --model_path THUDM/CogVideoX-5b --prompt "A kitten" --transformer_path outputs/t2v-sft/checkpoint-500
python cli_demo.py --model_path THUDM/CogVideoX-5b-I2V --prompt "It runs" --image_or_video_path first_frame.png
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from dataset.condition_frames import LAST
from dataset.images import image_size, load_image
from dataset.scan import REPORTED_CHANGE
from dataset.stream_info import ClipError
from dataset.video import ClipInfo, FrameSelection, Resolution, decode, frames_available, probe, stretch
from utils.checkpoint.finetuned import find_transformer, load_merged, trained_positions
from utils.checkpoint.lora_files import find_lora, load_lora
from utils.checkpoint.stored_weights import read_merged
from utils.common.errors import CheckReport, UserError, exit_on_user_error
from utils.common.filesystem import check_writable, flags_in_errors, unreadable
from utils.config.options import (
    make_parser,
    option,
    parse_group,
    require_finite,
    require_positive,
    require_seed,
    require_text,
)
from utils.model import loading
from utils.model.conditioned_pipeline import Condition
from utils.model.encoders import to_model_range
from utils.model.positions import choose_positions, set_learned_positions
from utils.model.spec import LEARNED, ModelSpec, read_spec
from utils.model.weight_files import check_shapes, check_weights, read_config


@dataclass(frozen=True)
class DemoArgs:
    prompt: str = option(help="text prompt; include the --id_token of the training run, if it had one")
    model_path: str = option(help="folder of the base checkpoint, or its model hub id")
    variant: str | None = option(
        None, help="variant of the base's weights, such as fp16; components without it use their plain weights"
    )
    negative_prompt: str = option("", help="text that the video should not match")
    generate_type: Literal["t2v", "i2v", "v2v"] | None = option(None, help="task; default: that of the checkpoint")
    image_or_video_path: Path | None = option(None, help="i2v: first frame; v2v: source clip")
    last_image: Path | None = option(
        None, help="i2v: last frame, for a LoRA or transformer trained with --condition_frames first_last"
    )
    prefix_video: Path | None = option(
        None,
        help="i2v: clip to continue, in place of the first frame, for a LoRA or transformer trained with "
        "--condition_frames prefix:N",
    )
    prefix_frames: int | None = option(
        None, help="number of frames N, 4k+1, to take from the end of --prefix_video; default: as many as it has"
    )
    resize_mode: Literal["stretch", "crop"] = option(
        "stretch",
        help="stretch: resize image or clip to the exact size; crop: keep the aspect ratio and crop the centre",
    )
    lora_path: Path | None = option(None, help="folder checkpoint-N of a LoRA run, or its .safetensors file")
    lora_scale: float = option(1.0, help="adapter strength; 1.0: as trained; 0: base model")
    transformer_path: Path | None = option(
        None, help="folder checkpoint-N of a full fine-tuning run, a transformer/, or the output of zero_to_fp32.py"
    )
    learned_positions: Literal["keep", "interpolate", "drop"] | None = option(
        None,
        help="CogVideoX-5b-I2V: its table of learned positions at other sizes than 480x720, as in training; default: "
        "as the LoRA or the transformer was trained, otherwise keep",
    )
    output_path: Path = option(Path("output.mp4"), help="output .mp4 file")
    num_frames: int | None = option(None, help="number of frames, 8N+1; default: native length of the checkpoint")
    height: int | None = option(None, help="height in pixels; default: native height of the checkpoint")
    width: int | None = option(None, help="width in pixels; default: native width of the checkpoint")
    fps: float | None = option(None, help="frames per second; default: 8, or 16 for CogVideoX1.5")
    num_inference_steps: int = option(50, help="denoising steps")
    guidance_scale: float = option(6.0, help="classifier-free guidance scale; 1 disables guidance")
    strength: float = option(
        0.8, help="v2v: how much the clip changes; share of the denoising steps to run, above 0 and at most 1"
    )
    seed: int = option(42, help="seed of the initial noise")
    dtype: Literal["bf16", "fp16", "fp32"] | None = option(
        None,
        help="dtype of the weights; default: that of the checkpoint, but fp32 in place of fp16 on a CPU",
        aliases={"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"},
    )
    offload: Literal["none", "model", "sequential"] = option(
        "model",
        help="none: keep all components on the GPU; model: one component at a time; sequential: one layer at a time",
    )
    enable_slicing: bool = option(True, help="VAE: process one sample of a batch at a time")
    enable_tiling: bool = option(True, help="VAE: process one tile of the picture at a time; uses far less memory")

    def errors(self) -> Iterator[str]:
        yield from require_positive(self, "num_frames", "height", "width", "fps", "num_inference_steps", "strength")
        yield from require_seed(self.seed)
        if self.prefix_frames is not None and (self.prefix_frames < 5 or self.prefix_frames % 4 != 1):
            yield f"--prefix_frames is {self.prefix_frames}; it must be 4k+1 and at least 5, such as 5 or 9."
        if self.prefix_frames is not None and self.prefix_video is None:
            yield "--prefix_frames needs --prefix_video."
        if self.prefix_video is not None and self.last_image is not None:
            yield "--prefix_video and --last_image cannot be combined; no training gives a model both."
        if self.prefix_video is not None and self.image_or_video_path is not None:
            yield "--prefix_video gives the first frames; leave --image_or_video_path out."
        yield from require_text(self, "prompt", "negative_prompt")
        yield from require_finite(self, "lora_scale", "guidance_scale")
        if self.strength > 1:
            yield f"--strength is {self.strength}; it must be at most 1."
        if self.output_path.suffix.lower() != ".mp4":
            yield f"--output_path {self.output_path}: the name must end in .mp4."


def main() -> None:
    args = parse_group(make_parser("Generates a video with CogVideoX, fine-tuned or not."), DemoArgs)
    model_dir = loading.resolve_model_dir(args.model_path)
    spec = with_positions(args, read_spec(model_dir, args.variant))
    task = args.generate_type or spec.task
    resolution = choose_resolution(args, spec, task)
    check(args, spec, task, resolution)
    condition = read_condition(args, spec, resolution)
    task_inputs = read_task_inputs(args, spec, task, resolution, condition)

    pipeline = load_pipeline(args, model_dir, spec, task)
    if condition is not None:
        pipeline.condition = condition
    print(f"Generating {task}, {resolution}, {args.num_inference_steps} steps, seed {args.seed}", flush=True)
    notes = loading.variant_notes(model_dir, args.variant)
    for note in notes + (spec.frames_notes(resolution.frames) if task != "v2v" else []):
        print(f"Note: {note}")

    started = time.perf_counter()
    video = pipeline(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        height=resolution.height,
        width=resolution.width,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
        max_sequence_length=spec.max_text_seq_length,
        **task_inputs,
    ).frames[0]

    with flags_in_errors({"--output_path": args.output_path.parent}):
        args.output_path.parent.mkdir(parents=True, exist_ok=True)
        loading.write_video(video, args.output_path, args.fps or spec.fps)
    print(f"{args.output_path}: {len(video)} frames in {time.perf_counter() - started:.1f} s")


def with_positions(args: DemoArgs, spec: ModelSpec) -> ModelSpec:
    """Returns the spec with the learned positions that the LoRA or the transformer was trained with. Raises UserError.

    `--learned_positions` decides if neither states them.
    """
    return choose_positions(
        spec, args.learned_positions, *trained_positions(args.transformer_path, args.lora_path, spec)
    )


def choose_resolution(args: DemoArgs, spec: ModelSpec, task: str) -> Resolution:
    """Returns the requested size, by default the native size of the checkpoint.

    For v2v, reduces the number of frames to one that both the source clip and the model support.

    Raises:
        UserError: the source clip cannot be read or is too short.
    """
    frames = args.num_frames or spec.native.frames
    resolution = Resolution(frames, args.height or spec.native.height, args.width or spec.native.width)
    if task != "v2v" or args.image_or_video_path is None:
        return resolution
    available = frames_available(as_user_error(probe, args.image_or_video_path), args.fps or spec.fps)
    # The v2v pipeline encodes the clip and does not pad its latents, but CogVideoX1.5 needs an even number of latent
    # frames. The VAE preserves the number of frames for 8N (an even number of latent frames) and 8N+1 (an odd one).
    remainder = 0 if spec.is_v1_5 else 1
    usable = (min(frames, available) - remainder) // 8 * 8 + remainder
    if usable < 8:
        raise UserError(f"--image_or_video_path {args.image_or_video_path}: {available} frames are too few for v2v.")
    if usable != frames:
        print(f"v2v: {usable} frames ({frames} requested; the clip has {available} at {args.fps or spec.fps:g} fps)")
    return Resolution(usable, resolution.height, resolution.width)


def check(args: DemoArgs, spec: ModelSpec, task: str, resolution: Resolution) -> None:
    """Checks all arguments before any weights are loaded. Raises UserError with all errors."""
    report = CheckReport(spec.resolution_errors(resolution, "--num_frames x --height x --width"))
    errors = report.errors
    required = "i2v" if task == "i2v" else "t2v"
    if spec.task != required:
        errors.append(
            f"--generate_type {task} needs a checkpoint for {required}; {args.model_path} is one for {spec.task}."
        )
    if task != "v2v" and resolution.frames % 8 != 1:
        errors.append(f"--num_frames {resolution.frames}: the number must be 8N+1, such as 49.")
    if task == "v2v" and int(args.num_inference_steps * args.strength) == 0:
        errors.append(f"--strength {args.strength} of --num_inference_steps {args.num_inference_steps} leaves no step.")
    if task != "t2v" and args.image_or_video_path is None and args.prefix_video is None:
        errors.append(f"{task} needs --image_or_video_path.")
    for flag in ("last_image", "prefix_video"):
        if task != "i2v" and getattr(args, flag) is not None:
            errors.append(f"--{flag} is for image to video (i2v); this is {task}.")
    if task == "t2v" and args.image_or_video_path is not None:
        errors.append("--image_or_video_path is given, but t2v takes none; add --generate_type v2v or omit the path.")
    if args.lora_path is not None and args.transformer_path is not None:
        errors.append(
            "--lora_path and --transformer_path cannot be combined; adapters fit only the base they were trained on."
        )
    report.run(check_writable, args.output_path.parent, "--output_path")
    if args.output_path.is_dir():
        errors.append(f"--output_path {args.output_path} is a folder; give the name of an .mp4 file.")
    if args.lora_path is not None:
        report.run(find_lora, args.lora_path)
    if args.transformer_path is not None:
        report.run(check_transformer, args.transformer_path, spec)
    if errors:
        raise UserError(errors)


def check_transformer(path: Path, spec: ModelSpec) -> None:
    """Raises UserError if a fine-tuned transformer cannot replace the transformer of the base."""
    folder, flag = find_transformer(path), "--transformer_path"
    model_class = loading.CogVideoXTransformer3DModel
    if not (folder / "config.json").is_file():
        try:
            shapes = {name: list(stored.shape) for name, stored in read_merged(folder).items()}
        except Exception as error:  # whatever the readers of zip, pickle and safetensors files raise
            raise UserError(f"{flag} {folder} is damaged ({error}); merge the checkpoint again.") from error
        check_shapes(shapes, folder, flag, model_class, spec.transformer, strict=True)
        return
    config = read_config(folder / "config.json", model_class, flag)
    for name, expected in spec.transformer.items():
        if name[0] != "_" and name != LEARNED and config.get(name) != expected:
            raise UserError(
                f"{flag} {folder}: {name} is {config.get(name)}, but {expected} in the base; "
                "was it trained on another checkpoint?"
            )
    check_weights(folder, flag, model_class, config)


def read_condition(args: DemoArgs, spec: ModelSpec, resolution: Resolution) -> Condition | None:
    """Returns the last image or the end of the clip to continue; None if neither is given.

    Raises:
        UserError: a file cannot be read, or the clip does not have fewer frames than the video.
    """
    if args.last_image is not None:
        flag = "--last_image"
        height, width = as_user_error(image_size, args.last_image, flag=flag)
        note_stretch(args, args.last_image, ClipInfo(1, 1.0, 0.0, height, width), resolution)
        frames = as_user_error(load_image, args.last_image, resolution, args.resize_mode, flag=flag)[None]
        return Condition(spec, LAST, to_model_range(frames)[None])
    if args.prefix_video is None:
        return None
    path, flag, fps = args.prefix_video, "--prefix_video", args.fps or spec.fps
    info = as_user_error(probe, path, flag=flag)
    note_stretch(args, path, info, resolution)
    available = frames_available(info, fps)
    count = args.prefix_frames or (available - 1) // 4 * 4 + 1
    if not 5 <= count <= available:
        raise UserError(f"{flag} {path}: it has {available} frames at {fps:g} fps, but {max(count, 5)} are needed.")
    if count >= resolution.frames:
        raise UserError(
            f"{flag} {path}: its {count} frames at {fps:g} fps leave nothing to generate of {resolution.frames}; "
            f"take fewer, such as --prefix_frames {(resolution.frames - 2) // 4 * 4 + 1}."
        )
    print(f"{path}: the last {count} of {available} frames at {fps:g} fps are the first frames of the video")
    size = replace(resolution, frames=count)
    selection = FrameSelection(size, fps, args.resize_mode, available - count, count)
    return Condition(spec, f"prefix:{count}", to_model_range(as_user_error(decode, path, selection, flag=flag))[None])


def read_task_inputs(
    args: DemoArgs, spec: ModelSpec, task: str, resolution: Resolution, condition: Condition | None
) -> dict[str, Any]:
    """Returns the pipeline inputs that depend on the task: number of frames, condition image, source clip.

    Raises:
        UserError: the image or the clip cannot be read.
    """
    path = args.image_or_video_path
    if args.prefix_video is not None and condition is not None:
        first = ((condition.frames[0, 0] + 1) * 127.5).round().byte()  # the condition takes its place
        return {"num_frames": resolution.frames, "image": Image.fromarray(first.numpy())}
    if path is None:
        return {"num_frames": resolution.frames}
    if task == "i2v":
        height, width = as_user_error(image_size, path)
        note_stretch(args, path, ClipInfo(1, 1.0, 0.0, height, width), resolution)
        pixels = as_user_error(load_image, path, resolution, args.resize_mode)
        return {"num_frames": resolution.frames, "image": Image.fromarray(pixels.numpy())}
    note_stretch(args, path, as_user_error(probe, path), resolution)
    selection = FrameSelection(resolution, args.fps or spec.fps, args.resize_mode, 0, resolution.frames)
    clip = as_user_error(decode, path, selection)
    return {"video": [Image.fromarray(frame) for frame in clip.numpy()], "strength": args.strength}


def note_stretch(args: DemoArgs, path: Path, info: ClipInfo, resolution: Resolution) -> None:
    """Prints a note if the given image or clip has another shape than the video."""
    change = stretch(info, resolution)
    if args.resize_mode == "stretch" and change > REPORTED_CHANGE:
        print(f"Note: {path} is stretched by {change:.0%}; --resize_mode crop keeps its shape.")


def as_user_error(function: Any, path: Path, *args: Any, flag: str = "--image_or_video_path") -> Any:
    """Calls a function that reads a clip or an image, and turns its ClipError into a UserError that names the flag."""
    if reason := unreadable(path):
        raise UserError(f"{flag}: {reason}.")
    try:
        return function(path, *args)
    except ClipError as error:
        raise UserError(f"{flag} {path} {error}.") from error


def load_pipeline(args: DemoArgs, model_dir: Path, spec: ModelSpec, task: str) -> Any:
    """Loads the pipeline of a task with its adapters or fine-tuned transformer, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, variant = model_dir / "transformer", args.variant
    tokenizer = loading.load_tokenizer(model_dir)  # the fastest to load, so its errors come early
    dtype = loading.DTYPES[args.dtype] if args.dtype else loading.working_dtype(base, device, variant)
    weights = find_transformer(args.transformer_path) if args.transformer_path else base
    if (weights / "config.json").is_file():
        transformer = loading.load_transformer(weights, dtype, variant=None if args.transformer_path else variant)
    else:
        transformer = load_merged(weights, spec.transformer, dtype)
    set_learned_positions(transformer, spec)
    if args.lora_path is not None:
        matched = load_lora(transformer, args.lora_path, args.lora_scale)
        print(f"LoRA: {matched} adapter modules matched, scale {args.lora_scale:g}, {args.lora_path}")
    cpu = torch.device("cpu")
    pipeline = loading.PIPELINES[task](
        tokenizer=tokenizer,
        text_encoder=loading.load_text_encoder(model_dir, cpu, dtype, variant),
        vae=loading.load_vae(model_dir, cpu, args.enable_slicing, args.enable_tiling, dtype, variant),
        transformer=transformer,
        scheduler=loading.load_scheduler(model_dir),
    )
    if not torch.cuda.is_available():
        return pipeline
    if args.offload == "none":
        return pipeline.to("cuda")
    if args.offload == "model":
        pipeline.enable_model_cpu_offload()
    else:
        pipeline.enable_sequential_cpu_offload()
    return pipeline


if __name__ == "__main__":
    with exit_on_user_error():
        main()

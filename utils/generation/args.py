"""The command line of `cli_demo.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from utils.common.errors import UserError
from utils.config.options import (
    add_options,
    collect,
    make_parser,
    option,
    require_finite,
    require_positive,
    require_seed,
    require_steps,
    require_text,
)
from utils.generation.record import read_record
from utils.model.loading import is_hub_id

# The record is an argument of ffmpeg, which Linux limits to 128 KiB; characters that JSON escapes count twice.
MAX_PROMPT_BYTES = 30_000


@dataclass(frozen=True)
class DemoArgs:
    prompt: str | None = option(None, help="text prompt; include the --id_token of the training run, if it had one")
    prompt_file: Path | None = option(
        None,
        help="several videos: a text file with a prompt per line, or .jsonl with an object per line: prompt, image, "
        "seed and other flags of a video",
    )
    num_videos: int = option(1, help="videos per prompt, with the seeds --seed, --seed + 1, ...")
    model_path: str = option("", help="folder of the base checkpoint, or its model hub id")
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
    lora_path: tuple[Path, ...] = option(
        (), help="folder checkpoint-N of a LoRA run, or a LoRA file of diffusers, ComfyUI, peft or kohya; or several"
    )
    lora_scale: tuple[float, ...] = option(
        (1.0,), help="strength of the LoRAs, one for all or one per file; 1.0: as trained; 0: base model"
    )
    transformer_path: Path | None = option(
        None,
        help="folder checkpoint-N of a full fine-tuning run, a transformer/, the output of zero_to_fp32.py, or a file "
        "for ComfyUI",
    )
    learned_positions: Literal["keep", "interpolate", "drop"] | None = option(
        None,
        help="CogVideoX-5b-I2V: its table of learned positions at other sizes than 480x720, as in training; default: "
        "as the LoRA or the transformer was trained, otherwise keep",
    )
    output_path: Path | None = option(
        None, help="output .mp4 file, or a folder for several videos; default: output.mp4, or videos/"
    )
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
    compare: tuple[float, ...] = option(
        (),
        help="makes one picture and one video that show the base and these strengths of the LoRA side by side, as "
        "factors of --lora_scale, such as 0.5 1",
    )
    again: Path | None = option(
        None, help="an .mp4 file of this program: make it anew with the same settings; other flags replace its settings"
    )
    dtype: Literal["bf16", "fp16", "fp32"] | None = option(
        None,
        help="dtype of the weights; default: that of the checkpoint, but fp32 in place of fp16 on a CPU",
        aliases={"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"},
    )
    quantize: Literal["none", "int8", "fp8", "int4"] = option(
        "none", help="keep the transformer's weights in 8 or 4 bits, as --quantize_base in training; approximate"
    )
    compile: bool = option(False, help="compile the transformer's blocks: minutes before the first video, then faster")
    offload: Literal["none", "model", "sequential"] = option(
        "model",
        help="none: keep transformer and VAE on the GPU; model: one of them at a time; sequential: one layer at a time",
    )
    offload_text_encoder: bool = option(
        False, help="encode prompts with the text encoder in host memory, one layer at a time on the GPU"
    )
    enable_slicing: bool = option(True, help="VAE: process one sample of a batch at a time")
    enable_tiling: bool = option(True, help="VAE: process one tile of the picture at a time; uses far less memory")

    @property
    def is_single(self) -> bool:
        """Whether the command line asks for one video."""
        return self.prompt_file is None and self.num_videos == 1

    def errors(self) -> Iterator[str]:
        yield from require_positive(
            self, "num_videos", "num_frames", "height", "width", "fps", "num_inference_steps", "strength"
        )
        yield from require_seed(self.seed)
        yield from require_steps(self.num_inference_steps)
        if self.prefix_frames is not None and (self.prefix_frames < 5 or self.prefix_frames % 4 != 1):
            yield f"--prefix_frames is {self.prefix_frames}; it must be 4k+1 and at least 5, such as 5 or 9."
        if self.prefix_frames is not None and self.prefix_video is None:
            yield "--prefix_frames needs --prefix_video."
        if self.prefix_video is not None and self.last_image is not None:
            yield "--prefix_video and --last_image cannot be combined; no training gives a model both."
        if self.prefix_video is not None and self.image_or_video_path is not None:
            yield "--prefix_video gives the first frames; leave --image_or_video_path out."
        texts = [name for name in ("prompt", "negative_prompt") if getattr(self, name)]
        yield from require_text(self, *texts)
        for name in texts:
            if len(getattr(self, name).encode(errors="replace")) > MAX_PROMPT_BYTES:
                yield f"--{name} {getattr(self, name)[:40]!r}...: it must be at most {MAX_PROMPT_BYTES} bytes long."
        yield from require_finite(self, "lora_scale", "guidance_scale", "compare")
        if not self.model_path:
            yield "--model_path is required."
        if (self.prompt is None) == (self.prompt_file is None):
            yield (
                "Give --prompt or --prompt_file."
                if self.prompt is None
                else "Give --prompt or --prompt_file, not both."
            )
        if self.strength > 1:
            yield f"--strength is {self.strength}; it must be at most 1."
        if self.output_path is not None and self.is_single != (self.output_path.suffix.lower() == ".mp4"):
            yield (
                f"--output_path {self.output_path}: the name must end in .mp4."
                if self.is_single
                else f"--output_path {self.output_path}: several videos need a folder."
            )
        if self.compare and not self.lora_path:
            yield "--compare compares strengths of a LoRA; give --lora_path."
        if self.quantize != "none" and self.offload == "sequential":
            yield "--offload sequential moves plain weights; use --offload model with --quantize."


PATHS = {"image_or_video_path", "last_image", "prefix_video"}
PATH_SETTINGS = ("model_path", "lora_path", "transformer_path", *sorted(PATHS))
# The flags that say which videos to make and where, and not how a video looks.
NOT_SETTINGS = ("prompt_file", "num_videos", "output_path", "again")


def parse_demo(argv: list[str] | None = None) -> DemoArgs:
    """Parses the command line; under --again, the settings of the given video are the defaults of the flags.

    Raises:
        UserError: a flag or value is invalid, or the video of --again holds no valid settings.
    """
    parser = make_parser("Generates videos with CogVideoX, fine-tuned or not.")
    add_options(parser, DemoArgs)
    args, errors = collect(vars(parser.parse_args(argv)), DemoArgs), []
    if (video := args.again) is not None:
        try:
            record = read_record(video)
            settings = with_folder(record)
            recorded = parser.parse_args(flags_of(settings))
        except UserError as error:
            raise UserError(f"--again {video}: {message}" for message in error.errors) from error
        args = collect(vars(parser.parse_args(argv, recorded)), DemoArgs)
        errors += [f"--again {video}: {message}" for message in missing_paths(args, settings, record.get("folder"))]
        if args.output_path is None:
            args = replace(args, output_path=video.with_name(f"{video.stem}-again.mp4"))
    if errors := [*errors, *args.errors()]:
        raise UserError(errors)
    return args


def relative_paths(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns setting, path for each path in the settings of a record that is relative. The base may be a hub id."""
    values = {name: settings.get(name) for name in PATH_SETTINGS}
    lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [
        (name, path)
        for name, paths in lists.items()
        for path in paths
        if isinstance(path, str) and path and not Path(path).is_absolute()
    ]


def with_folder(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a record. Relative paths start at the folder where the video was made, if they exist."""
    settings, folder = dict(record["settings"]), Path(record.get("folder", "."))
    if folder.absolute() == Path.cwd():
        return settings
    for name, path in relative_paths(settings):
        if (found := folder / path).exists():
            value = settings[name]
            settings[name] = (
                [str(found) if item == path else item for item in value] if isinstance(value, list) else str(found)
            )
    return settings


def missing_paths(args: DemoArgs, settings: dict[str, Any], folder: str | None) -> Iterator[str]:
    """Yields an error for each relative path of a record that exists neither here nor where the video was made.

    Args:
        args: the flags; a path of the record may be replaced.
        settings: as returned by `with_folder`.
        folder: where the video was made; unknown in records of earlier versions.
    """
    used = settings_of(args)
    where = f" ({folder})" if folder else ""
    for name, path in relative_paths(settings):
        if used[name] == settings[name] and not Path(path).exists() and not (name == "model_path" and is_hub_id(path)):
            yield (
                f"its record names {path}, a path relative to the folder where the video was made{where}; there is no "
                f"such file here. Run the command in that folder, or give --{name}."
            )


def settings_of(args: DemoArgs) -> dict[str, Any]:
    """Returns the settings of a video as JSON values; `flags_of` reads them."""
    values = {option.name: getattr(args, option.name) for option in fields(DemoArgs) if option.name not in NOT_SETTINGS}
    return {
        name: [_to_json(item) for item in value] if isinstance(value, tuple) else _to_json(value)
        for name, value in values.items()
    }


def _to_json(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def flags_of(settings: dict[str, Any]) -> list[str]:
    """Returns the settings of a record as flags, so that the parser checks their values.

    Raises:
        UserError: a name is no setting.
    """
    known = {option.name for option in fields(DemoArgs)} - set(NOT_SETTINGS)
    if unknown := settings.keys() - known:
        raise UserError(f"it holds settings that this version does not know: {', '.join(sorted(unknown))}.")
    flags = []
    for name, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags

"""Generates a video with CogVideoX: the base, a LoRA checkpoint, or a fine-tuned transformer.

python cli_demo.py --model_path THUDM/CogVideoX-5b --prompt "A kitten" --lora_path outputs/t2v-lora/checkpoint-500
python cli_demo.py --model_path THUDM/CogVideoX-5b --prompt "A kitten" --transformer_path outputs/t2v-sft/checkpoint-500
python cli_demo.py --model_path THUDM/CogVideoX-5b-I2V --prompt "It runs" --image_or_video_path first_frame.png
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from dataset.video import ClipError, Resolution, View, decode, frames_available, load_image, probe
from utils import components
from utils.command_line import finite, make_parser, option, parse_group, positive, seed_faults
from utils.component_files import check_shapes, check_weights, read_config
from utils.errors import Findings, UserError, told_to_the_user
from utils.lora import find_lora, load_lora
from utils.model_form import ModelForm, read_form
from utils.preflight import check_writable
from utils.stored_weights import read_merged


@dataclass(frozen=True)
class DemoArgs:
    prompt: str = option(help="what to show; with the --id_token of the training, if it had one")
    model_path: str = option(help="folder of the base checkpoint, or its id on the model hub")
    negative_prompt: str = option("", help="what not to show")
    generate_type: Literal["t2v", "i2v", "v2v"] | None = option(None, help="default: what the checkpoint is made for")
    image_or_video_path: Path | None = option(None, help="i2v: the first frame; v2v: the clip to change")
    lora_path: Path | None = option(None, help="folder checkpoint-N of a LoRA run, or its .safetensors file")
    lora_scale: float = option(1.0, help="1.0: the strength of the training; 0: the base")
    transformer_path: Path | None = option(
        None, help="folder checkpoint-N of a full fine-tuning run, a transformer/, or what zero_to_fp32.py wrote"
    )
    output_path: Path = option(Path("output.mp4"), help="the video")
    num_frames: int | None = option(None, help="8N+1; default: the checkpoint's own")
    height: int | None = option(None, help="pixels; default: the checkpoint's own")
    width: int | None = option(None, help="pixels; default: the checkpoint's own")
    fps: float | None = option(None, help="frames a second; default: 8, for CogVideoX1.5 16")
    num_inference_steps: int = option(50, help="denoising steps")
    guidance_scale: float = option(6.0, help="how strictly the prompt is followed; 1 switches guidance off")
    strength: float = option(0.8, help="v2v: how much of the clip is changed, above 0 to 1")
    seed: int = option(42, help="same seed, same video")
    dtype: Literal["bf16", "fp16", "fp32"] | None = option(
        None, help="default: that of the checkpoint's weights; fp32 for fp16 on a CPU"
    )
    offload: Literal["none", "model", "sequential"] = option(
        "model", help="what is on the GPU at a time: none: everything; model: one component; sequential: one layer"
    )
    enable_slicing: bool = option(True, help="VAE: one sample at a time")
    enable_tiling: bool = option(True, help="VAE: one tile of the picture at a time; far less memory")

    def faults(self) -> Iterator[str]:
        yield from positive(self, "num_frames", "height", "width", "fps", "num_inference_steps", "strength")
        yield from seed_faults(self.seed)
        yield from finite(self, "lora_scale", "guidance_scale")
        if self.strength > 1:
            yield f"--strength is {self.strength}; it must be at most 1."
        if self.output_path.suffix.lower() != ".mp4":
            yield f"--output_path {self.output_path}: the video is an .mp4 file."


def main() -> None:
    args = parse_group(make_parser("Generates a video with CogVideoX, fine-tuned or not."), DemoArgs)
    model_dir = components.resolve_model_dir(args.model_path)
    form = read_form(model_dir)
    task = args.generate_type or form.task
    resolution = choose_resolution(args, form, task)
    check(args, form, task, resolution)
    condition = read_condition(args, form, task, resolution)

    pipeline = load_pipeline(args, model_dir, form, task)
    size = {} if task == "v2v" else {"num_frames": resolution.frames}
    print(f"Generating {task}, {resolution}, {args.num_inference_steps} steps, seed {args.seed}", flush=True)
    for note in form.frames_notes(resolution.frames) if task != "v2v" else []:
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
        max_sequence_length=form.max_text_seq_length,
        **size,
        **condition,
    ).frames[0]
    args.output_path.parent.mkdir(parents=True, exist_ok=True)
    components.write_video(video, args.output_path, args.fps or form.fps)
    print(f"{args.output_path}: {len(video)} frames in {time.perf_counter() - started:.1f} s")


def choose_resolution(args: DemoArgs, form: ModelForm, task: str) -> Resolution:
    """What was asked for, else the checkpoint's native clip; v2v is cut to what its source and the model allow."""
    frames = args.num_frames or form.native.frames
    resolution = Resolution(frames, args.height or form.native.height, args.width or form.native.width)
    if task != "v2v" or args.image_or_video_path is None:
        return resolution
    available = frames_available(told(probe, args.image_or_video_path), args.fps or form.fps)
    # The pipeline takes the latents from the clip and does not pad them. 1.5 needs an even number of latent frames, and
    # the VAE gives back as many frames as it got only for 8N (even) and 8N+1 (odd).
    rest = 0 if form.is_v1_5 else 1
    usable = (min(frames, available) - rest) // 8 * 8 + rest
    if usable < 8:
        raise UserError(f"--image_or_video_path {args.image_or_video_path}: {available} frames are too few for v2v.")
    if usable != frames:
        print(f"v2v: {usable} frames ({frames} wanted, the clip has {available} at {args.fps or form.fps:g} fps)")
    return Resolution(usable, resolution.height, resolution.width)


def check(args: DemoArgs, form: ModelForm, task: str, resolution: Resolution) -> None:
    """Raises UserError with everything that speaks against the run, before weights are read."""
    found = Findings(form.resolution_faults(resolution, "--num_frames x --height x --width"))
    faults = found.faults
    needed = "i2v" if task == "i2v" else "t2v"
    if form.task != needed:
        faults.append(f"--generate_type {task} needs a {needed} checkpoint; {args.model_path} is a {form.task} one.")
    if task != "v2v" and resolution.frames % 8 != 1:
        faults.append(f"--num_frames {resolution.frames}: the number must be 8N+1, such as 49.")
    if task == "v2v" and int(args.num_inference_steps * args.strength) == 0:
        faults.append(f"--strength {args.strength} of --num_inference_steps {args.num_inference_steps} leaves no step.")
    if task != "t2v" and args.image_or_video_path is None:
        faults.append(f"{task} needs --image_or_video_path.")
    if task == "t2v" and args.image_or_video_path is not None:
        faults.append("--image_or_video_path is given, but t2v takes none; give --generate_type v2v or leave it out.")
    if args.lora_path is not None and args.transformer_path is not None:
        faults.append("--lora_path and --transformer_path exclude each other: adapters belong to their own base.")
    found.of(check_writable, args.output_path.parent, "--output_path")
    if args.output_path.is_dir():
        faults.append(f"--output_path {args.output_path} is a folder; give the name of an .mp4 file.")
    if args.lora_path is not None:
        found.of(find_lora, args.lora_path)
    if args.transformer_path is not None:
        found.of(check_transformer, args.transformer_path, form)
    if faults:
        raise UserError(faults)


def check_transformer(path: Path, form: ModelForm) -> None:
    """Raises UserError where a fine-tuned transformer cannot take the place of the base's."""
    folder, flag = components.find_transformer(path), "--transformer_path"
    kind = components.CogVideoXTransformer3DModel
    if not (folder / "config.json").is_file():
        try:
            shapes = {name: list(stored.shape) for name, stored in read_merged(folder).items()}
        except Exception as error:  # of zip files, pickles and safetensors
            raise UserError(f"{flag} {folder} is damaged ({error}); merge the checkpoint again.") from error
        check_shapes(shapes, folder, flag, kind, form.transformer, no_others=True)
        return
    config = read_config(folder / "config.json", kind, flag)
    for name, expected in form.transformer.items():
        if name[0] != "_" and config.get(name) != expected:
            raise UserError(
                f"{flag} {folder}: {name} is {config.get(name)}, but {expected} in the base; "
                "was it trained on another checkpoint?"
            )
    check_weights(folder, flag, kind, config)


def read_condition(args: DemoArgs, form: ModelForm, task: str, resolution: Resolution) -> dict[str, Any]:
    """The pipeline's extra inputs: the image of i2v, the clip of v2v."""
    path = args.image_or_video_path
    if path is None:
        return {}
    if task == "i2v":
        pixels = told(load_image, path, resolution, "stretch")
        return {"image": Image.fromarray(pixels.numpy())}
    if task == "v2v":
        clip = told(decode, path, View(resolution, args.fps or form.fps, "stretch", 0, resolution.frames))
        return {"video": [Image.fromarray(frame) for frame in clip.numpy()], "strength": args.strength}
    return {}


def told(function: Any, path: Path, *args: Any) -> Any:
    """Calls a reader of clips and images; its ClipError becomes a sentence about --image_or_video_path."""
    try:
        return function(path, *args)
    except ClipError as error:
        raise UserError(f"--image_or_video_path {path} {error}.") from error


def load_pipeline(args: DemoArgs, model_dir: Path, form: ModelForm, task: str) -> Any:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = components.DTYPES[args.dtype] if args.dtype else components.working_dtype(model_dir / "transformer", device)
    weights = components.find_transformer(args.transformer_path) if args.transformer_path else model_dir / "transformer"
    if (weights / "config.json").is_file():
        transformer = components.load_transformer(weights, dtype)
    else:
        transformer = components.load_merged(weights, form.transformer, dtype)
    if args.lora_path is not None:
        matched = load_lora(transformer, args.lora_path, args.lora_scale)
        print(f"LoRA: {matched} adapter modules matched, scale {args.lora_scale:g}, {args.lora_path}")
    cpu = torch.device("cpu")
    pipeline = components.PIPELINES[task](
        tokenizer=components.load_tokenizer(model_dir),
        text_encoder=components.load_text_encoder(model_dir, cpu, dtype),
        vae=components.load_vae(model_dir, cpu, args.enable_slicing, args.enable_tiling, dtype),
        transformer=transformer,
        scheduler=components.load_scheduler(model_dir),
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
    with told_to_the_user():
        main()

"""Generates clips with a tiny model as `cli_demo.py` does, and prints a table of their attributes.

    python -m examples.measure examples/tiny/t2v
    python -m examples.measure examples/tiny/t2v --lora_path outputs/quickstart/lora --id_token SKS

With adapters or another transformer, it also measures the base for comparison. With an id token, it also measures
prompts with the token, which ask for the concept that is held out from the base. `attributes.py` reads the clips.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from dataset.condition_frames import FIRST, ConditionFrames, select_frames
from dataset.video import Resolution
from examples.attributes import Attributes, read_attributes
from examples.world import CONCEPT, CONCEPT_CAPTION, KNOWN, Scene, draw
from utils.common.errors import exit_on_user_error
from utils.generation.args import DemoArgs
from utils.generation.checks import with_positions
from utils.generation.pipeline import device_here, encode_prompts, load_pipeline
from utils.model.conditioned_pipeline import Condition
from utils.model.encoders import to_model_range
from utils.model.spec import ModelSpec, read_spec

SIZE = Resolution(9, 64, 64)
# Neither the VAE nor the base models were trained on these seeds.
FIRST_SEED = 20_000_000
BATCH = 10
# Smallest PSNR in dB at which a frame counts as the given one.
MIN_IMAGE_PSNR = 23.0
# Layout of the animations: clips per row, screen pixels per pixel, height of a title.
COLUMNS, ZOOM, TITLE_HEIGHT = 8, 2, 20


@dataclass(frozen=True)
class Case:
    """A clip to generate: the expected scene, and a clip of it, uint8 [F, H, W, 3], with the condition frames."""

    prompt: str
    scene: Scene
    seed: int
    clip: np.ndarray


def make_cases(clips: int, id_token: str, size: Resolution = SIZE, varied: bool = False) -> list[Case]:
    """Returns cases of the held-out concept if there is an id token, else of known scenes."""
    rng = np.random.default_rng(FIRST_SEED)
    scenes = CONCEPT if id_token else KNOWN
    cases = []
    for number in range(clips):
        scene = scenes[rng.integers(len(scenes))]
        prompt = f"{id_token} {CONCEPT_CAPTION.format(ground=scene.ground)}" if id_token else scene.caption
        seed = FIRST_SEED + number
        cases.append(Case(prompt, scene, seed, draw(scene, seed, size.frames, size.height, size.width, varied)))
    return cases


def generate(
    pipeline: Any,
    args: DemoArgs,
    spec: ModelSpec,
    cases: list[Case],
    size: Resolution = SIZE,
    condition: ConditionFrames = FIRST,
) -> Iterator[np.ndarray]:
    """Yields one clip per case, uint8 [F, H, W, 3]. An image-to-video model is given the frames of `condition`."""
    place = (device_here(), pipeline.vae.dtype)
    embeddings = encode_prompts(args, Path(args.model_path), spec, ["", *(case.prompt for case in cases)])
    for first in range(0, len(cases), BATCH):
        batch = cases[first : first + BATCH]
        images = {"image": [Image.fromarray(case.clip[0]) for case in batch]} if spec.task == "i2v" else {}
        if condition.addition is not None:
            frames = [select_frames(torch.from_numpy(case.clip), condition.addition) for case in batch]
            pipeline.condition = Condition(spec, condition.addition, to_model_range(torch.stack(frames)))
        videos = pipeline(
            prompt_embeds=torch.cat([embeddings[case.prompt] for case in batch]).to(*place),
            negative_prompt_embeds=torch.cat([embeddings[""]] * len(batch)).to(*place),
            height=size.height,
            width=size.width,
            num_frames=size.frames,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(case.seed) for case in batch],
            max_sequence_length=spec.max_text_seq_length,
            output_type="np",
            **images,
        ).frames
        yield from (videos * 255).round().astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the PSNR of two uint8 arrays, in dB."""
    return -10 * math.log10(max(np.square((a.astype(float) - b) / 255).mean(), 1e-10))


def summarize(
    cases: list[Case], clips: list[np.ndarray], task: str, condition: ConditionFrames = FIRST
) -> dict[str, float]:
    """Returns the shares of clips, 0 to 1, whose attributes match the expected scene."""
    measured = [read_attributes(clip) for clip in clips]
    scenes = [case.scene for case in cases]

    def share(*names: str) -> float:
        return float(np.mean([matches(*pair, names) for pair in zip(measured, scenes, strict=True)]))

    shares = {name: share(name) for name in ("colour", "shape", "direction", "ground")}
    shares["colour and ground"] = share("colour", "ground")
    shares["colour, shape and direction"] = share("colour", "shape", "direction")
    if task == "i2v":
        given = {"first frame is the image": slice(1)}
        if condition.has_last:
            given["last frame is the last image"] = slice(-1, None)
        if condition.prefix > 1:
            given[f"first {condition.prefix} frames are the prefix"] = slice(condition.prefix)
        for name, frames in given.items():
            shares[name] = float(np.mean([equals(*pair, frames) for pair in zip(clips, cases, strict=True)]))
    return shares


def equals(clip: np.ndarray, case: Case, frames: slice) -> bool:
    """Whether each of some frames of a clip counts as that of the case."""
    return all(psnr(*pair) >= MIN_IMAGE_PSNR for pair in zip(clip[frames], case.clip[frames], strict=True))


def matches(measured: Attributes, scene: Scene, names: tuple[str, ...]) -> bool:
    return all(getattr(measured, name) == getattr(scene, name) for name in names)


def save_animation(rows: dict[str, list[np.ndarray]], path: Path, fps: float) -> None:
    """Writes an animated WebP with a title and a row of clips (uint8 [F, H, W, 3]) for each entry of `rows`."""
    frames = []
    for number in range(len(next(iter(rows.values()))[0])):
        strips = [np.concatenate([clip[number] for clip in clips], axis=1) for clips in rows.values()]
        pictures = [Image.fromarray(strip.repeat(ZOOM, 0).repeat(ZOOM, 1)) for strip in strips]
        width, height = pictures[0].size
        frame = Image.new("RGB", (width, len(rows) * (height + TITLE_HEIGHT)), "white")
        for row, (title, picture) in enumerate(zip(rows, pictures, strict=True)):
            top = row * (height + TITLE_HEIGHT)
            ImageDraw.Draw(frame).text((4, top + 4), title, fill="black")
            frame.paste(picture, (0, top + TITLE_HEIGHT))
        frames.append(frame)
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = frames
    first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Generates clips with a tiny model and measures them.")
    parser.add_argument("model_path", help="a folder in examples/tiny")
    parser.add_argument("--lora_path", type=Path, nargs="+", default=())
    parser.add_argument("--lora_scale", type=float, nargs="+", default=(1.0,))
    parser.add_argument("--transformer_path", type=Path)
    parser.add_argument("--id_token", default="", help="also measure prompts with this token")
    parser.add_argument("--learned_positions", choices=("keep", "interpolate", "drop"))
    parser.add_argument("--condition_frames", type=ConditionFrames.parse, default=FIRST)
    parser.add_argument("--varied", action="store_true", help="condition frames of the varied world, see world.py")
    parser.add_argument("--size", type=Resolution.parse, default=SIZE, help="FxHxW of the clips")
    parser.add_argument("--clips", type=int, default=60, help="number of clips for each kind of prompt")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument(
        "--output_dir", type=Path, help="folder for table.json and one animation for each kind of prompt"
    )
    options = vars(parser.parse_args())
    count, token, output_dir, size = (options.pop(name) for name in ("clips", "id_token", "output_dir", "size"))
    condition, varied = options.pop("condition_frames"), options.pop("varied")
    tuned = DemoArgs(prompt="", **options)
    models = {"before": replace(tuned, lora_path=(), transformer_path=None)}
    if tuned.lora_path or tuned.transformer_path:
        models["after"] = tuned
    prompts = {kind or "known": make_cases(count, kind, size, varied) for kind in dict.fromkeys(("", token))}
    spec = with_positions(tuned, read_spec(Path(tuned.model_path)))

    shares: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in prompts}
    shown: dict[str, dict[str, list[np.ndarray]]] = {kind: {} for kind in prompts}
    for model, args in models.items():
        pipeline = load_pipeline(args, Path(args.model_path), spec)
        pipeline.set_progress_bar_config(disable=True)
        for kind, cases in prompts.items():
            started = time.perf_counter()
            clips = list(generate(pipeline, args, spec, cases, size, condition))
            print(f"{model}, {kind} prompts: {count} clips in {time.perf_counter() - started:.0f} s", flush=True)
            shares[kind][model] = summarize(cases, clips, spec.task, condition)
            shown[kind][model] = clips[:COLUMNS]
    print(table(shares))
    if output_dir is not None:
        for kind, rows in shown.items():
            save_animation(rows, output_dir / f"{kind}.webp", spec.fps)
        (output_dir / "table.json").write_text(json.dumps(shares, indent=2) + "\n")


def table(shares: dict[str, dict[str, dict[str, float]]]) -> str:
    """Returns a Markdown table of `shares`: kind of prompt -> model -> attribute -> share."""
    models = list(next(iter(shares.values())))
    lines = [f"| prompts | correct attributes | {' | '.join(models)} |", "|---" * (2 + len(models)) + "|"]
    for kind, by_model in shares.items():
        for name in by_model[models[0]]:
            lines.append(f"| {kind} | {name} | {' | '.join(f'{by_model[model][name]:.0%}' for model in models)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with exit_on_user_error():
        main()

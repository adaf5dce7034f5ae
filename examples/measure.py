"""What a tiny model really generates: clips made as `cli_demo.py` makes them, measured by `attributes.py`, in a table.

    python -m examples.measure examples/tiny/t2v
    python -m examples.measure examples/tiny/t2v --lora_path outputs/quickstart/lora --id_token SKS

Given adapters or another transformer, it measures the base as well, for comparison; given an id token, also prompts
with the token, which ask for what is held back from the base.
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

from cli_demo import DemoArgs, load_pipeline
from examples.attributes import Attributes, read_attributes
from examples.world import CONCEPT, CONCEPT_CAPTION, KNOWN, Scene, draw
from utils.common.errors import exit_on_user_error
from utils.model.spec import ModelSpec, read_spec

SIZE = 64
# Pixels are drawn from seeds that neither the VAE nor the base was trained on.
FIRST_SEED = 20_000_000
BATCH = 10
# A first frame this near to the given image shows it, in dB.
SHOWS_THE_IMAGE = 23.0
# Of the animations: clips in a row, screen pixels a pixel, height of a title.
COLUMNS, ENLARGED, TITLE_HEIGHT = 8, 2, 20


@dataclass(frozen=True)
class Case:
    """One clip to generate: `scene` is what it shall show, `image` uint8 [H, W, 3] its first frame."""

    prompt: str
    scene: Scene
    seed: int
    image: np.ndarray


def make_cases(clips: int, id_token: str) -> list[Case]:
    rng = np.random.default_rng(FIRST_SEED)
    scenes = CONCEPT if id_token else KNOWN
    cases = []
    for number in range(clips):
        scene = scenes[rng.integers(len(scenes))]
        prompt = f"{id_token} {CONCEPT_CAPTION.format(ground=scene.ground)}" if id_token else scene.caption
        seed = FIRST_SEED + number
        cases.append(Case(prompt, scene, seed, draw(scene, seed, 9, SIZE)[0]))
    return cases


def generate(pipeline: Any, args: DemoArgs, spec: ModelSpec, cases: list[Case]) -> Iterator[np.ndarray]:
    """Yields one clip a case, uint8 [F, H, W, 3]."""
    for first in range(0, len(cases), BATCH):
        some = cases[first : first + BATCH]
        images = {"image": [Image.fromarray(case.image) for case in some]} if spec.task == "i2v" else {}
        videos = pipeline(
            prompt=[case.prompt for case in some],
            height=SIZE,
            width=SIZE,
            num_frames=spec.native.frames,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(case.seed) for case in some],
            max_sequence_length=spec.max_text_seq_length,
            output_type="np",
            **images,
        ).frames
        yield from (videos * 255).round().astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of uint8 arrays."""
    return -10 * math.log10(max(np.square((a.astype(float) - b) / 255).mean(), 1e-10))


def summarise(cases: list[Case], clips: list[np.ndarray], task: str) -> dict[str, float]:
    """Shares of the clips, 0 to 1, that show what they shall."""
    found = [read_attributes(clip) for clip in clips]

    def share(*names: str) -> float:
        return float(np.mean([agrees(one, case.scene, names) for one, case in zip(found, cases, strict=True)]))

    shares = {name: share(name) for name in ("colour", "shape", "direction", "ground")}
    shares["colour and ground"] = share("colour", "ground")
    shares["colour, shape and direction"] = share("colour", "shape", "direction")
    if task == "i2v":
        near = [psnr(clip[0], case.image) >= SHOWS_THE_IMAGE for clip, case in zip(clips, cases, strict=True)]
        shares["first frame is the image"] = float(np.mean(near))
    return shares


def agrees(found: Attributes, scene: Scene, names: tuple[str, ...]) -> bool:
    return all(getattr(found, name) == getattr(scene, name) for name in names)


def save_animation(rows: dict[str, list[np.ndarray]], path: Path, fps: float) -> None:
    """Writes an animated WebP with a row of clips, uint8 [F, H, W, 3] each, under each title."""
    frames = []
    for number in range(len(next(iter(rows.values()))[0])):
        strips = [np.concatenate([clip[number] for clip in clips], axis=1) for clips in rows.values()]
        pictures = [Image.fromarray(strip.repeat(ENLARGED, 0).repeat(ENLARGED, 1)) for strip in strips]
        width, height = pictures[0].size
        frame = Image.new("RGB", (width, len(rows) * (height + TITLE_HEIGHT)), "white")
        for row, (title, picture) in enumerate(zip(rows, pictures, strict=True)):
            top = row * (height + TITLE_HEIGHT)
            ImageDraw.Draw(frame).text((4, top + 4), title, fill="black")
            frame.paste(picture, (0, top + TITLE_HEIGHT))
        frames.append(frame)
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *later = frames
    first.save(path, save_all=True, append_images=later, duration=round(1000 / fps), loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Generates clips with a tiny model and measures what they show.")
    parser.add_argument("model_path", help="one of examples/tiny")
    parser.add_argument("--lora_path", type=Path)
    parser.add_argument("--lora_scale", type=float, default=1.0)
    parser.add_argument("--transformer_path", type=Path)
    parser.add_argument("--id_token", default="", help="measure prompts with it as well")
    parser.add_argument("--clips", type=int, default=60, help="generated for each kind of prompt")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--output_dir", type=Path, help="for table.json and an animation of each kind of prompts")
    chosen = vars(parser.parse_args())
    count, token, output_dir = (chosen.pop(name) for name in ("clips", "id_token", "output_dir"))
    tuned = DemoArgs(prompt="", **chosen)
    models = {"before": replace(tuned, lora_path=None, transformer_path=None)}
    if tuned.lora_path or tuned.transformer_path:
        models["after"] = tuned
    prompts = {"known": make_cases(count, "")} | ({token: make_cases(count, token)} if token else {})
    spec = read_spec(Path(tuned.model_path))

    shares: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in prompts}
    shown: dict[str, dict[str, list[np.ndarray]]] = {kind: {} for kind in prompts}
    for model, args in models.items():
        pipeline = load_pipeline(args, Path(args.model_path), spec, spec.task)
        pipeline.set_progress_bar_config(disable=True)
        for kind, cases in prompts.items():
            started = time.perf_counter()
            clips = list(generate(pipeline, args, spec, cases))
            print(f"{model}, {kind} prompts: {count} clips in {time.perf_counter() - started:.0f} s", flush=True)
            shares[kind][model] = summarise(cases, clips, spec.task)
            shown[kind][model] = clips[:COLUMNS]
    print(table(shares))
    if output_dir is not None:
        for kind, rows in shown.items():
            save_animation(rows, output_dir / f"{kind}.webp", spec.fps)
        (output_dir / "table.json").write_text(json.dumps(shares, indent=2) + "\n")


def table(shares: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown from kind of prompt -> model -> attribute -> share."""
    models = list(next(iter(shares.values())))
    lines = [f"| prompts | what is right | {' | '.join(models)} |", "|---" * (2 + len(models)) + "|"]
    for kind, by_model in shares.items():
        for name in by_model[models[0]]:
            lines.append(f"| {kind} | {name} | {' | '.join(f'{by_model[model][name]:.0%}' for model in models)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with exit_on_user_error():
        main()

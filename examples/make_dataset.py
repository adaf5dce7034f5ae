"""Draws the example data folders: short clips of coloured shapes that move over a plain ground, with captions.

python examples/make_dataset.py examples
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
from imageio.v3 import imwrite

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 70), "blue": (40, 80, 220), "yellow": (240, 210, 40)}
GROUNDS = {"white": (245, 245, 245), "black": (15, 15, 15)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SHAPES = ("circle", "square")
FRAMES, SIZE, RADIUS, FPS = 17, 64, 10, 8


def draw(shape: str, colour: str, direction: str, ground: str) -> np.ndarray:
    """One clip: uint8 [F, H, W, 3]."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    across, down = DIRECTIONS[direction]
    clip = np.empty((FRAMES, SIZE, SIZE, 3), np.uint8)
    for number, frame in enumerate(clip):
        travelled = (number / (FRAMES - 1) - 0.5) * (SIZE - 2 * RADIUS)
        x, y = SIZE / 2 + across * travelled, SIZE / 2 + down * travelled
        if shape == "circle":
            inside = (columns - x) ** 2 + (rows - y) ** 2 <= RADIUS**2
        else:
            inside = np.maximum(abs(columns - x), abs(rows - y)) <= RADIUS
        frame[:] = np.where(inside[..., None], COLOURS[colour], GROUNDS[ground])
    return clip


def write(folder: Path, worlds: list[tuple[str, str, str, str]]) -> None:
    """Writes a data folder with one clip for each (shape, colour, direction, ground)."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    prompts, videos = [], []
    for shape, colour, direction, ground in worlds:
        name = f"videos/{colour}_{shape}_{direction}_{ground}.mp4"
        clip = draw(shape, colour, direction, ground)
        imwrite(folder / name, clip, fps=FPS, codec="libx264", pixelformat="yuv444p", output_params=["-crf", "12"])
        prompts.append(f"a {colour} {shape} moves {direction} on a {ground} background")
        videos.append(name)
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (folder / "videos.txt").write_text("\n".join(videos) + "\n")


if __name__ == "__main__":
    things = itertools.product(SHAPES, COLOURS)
    motions = itertools.cycle(zip(DIRECTIONS, itertools.cycle(GROUNDS), strict=False))
    shown = [(*thing, *motion) for thing, motion in zip(things, motions, strict=False)]
    held_out = [("square", "red", "right", "black"), ("circle", "blue", "down", "white")]
    write(Path(sys.argv[1]) / "dataset", shown)
    write(Path(sys.argv[1]) / "validation", held_out)

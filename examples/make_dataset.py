"""Draws the example data folders: short clips of coloured shapes that move over a plain background, with captions.

    python -m examples.make_dataset examples

Edges are hard, and every shape has the same size and speed; `world.py` draws the varied clips of the tiny models.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from examples.world import COLOURS, DIRECTIONS, GROUNDS, Scene, distance, write_clips

FRAMES, SIZE, RADIUS, FPS = 17, 64, 10, 8


def draw(scene: Scene) -> np.ndarray:
    """Returns a clip, uint8 [F, H, W, 3]."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    step_x, step_y = DIRECTIONS[scene.direction]
    clip = np.empty((FRAMES, SIZE, SIZE, 3), np.uint8)
    for number, frame in enumerate(clip):
        travelled = (number / (FRAMES - 1) - 0.5) * (SIZE - 2 * RADIUS)
        x, y = columns - SIZE / 2 - step_x * travelled, rows - SIZE / 2 - step_y * travelled
        inside = distance(scene.shape, x, y, RADIUS) <= 0
        frame[:] = np.where(inside[..., None], COLOURS[scene.colour], GROUNDS[scene.ground])
    return clip


def write(folder: Path, scenes: list[Scene]) -> None:
    """Writes a data folder with one clip for each scene."""

    def clips() -> Iterator[tuple[str, str, np.ndarray]]:
        for scene in scenes:
            yield f"{scene.colour}_{scene.shape}_{scene.direction}_{scene.ground}", scene.caption, draw(scene)

    write_clips(folder, clips(), FPS, "-crf", "12")


if __name__ == "__main__":
    shapes = itertools.product(("circle", "square"), ("red", "green", "blue", "yellow"))
    motions = itertools.cycle(zip(DIRECTIONS, itertools.cycle(("white", "black")), strict=False))
    train = [
        Scene(colour, shape, direction, ground)
        for (shape, colour), (direction, ground) in zip(shapes, motions, strict=False)
    ]
    held_out = [Scene("red", "square", "right", "black"), Scene("blue", "circle", "down", "white")]
    write(Path(sys.argv[1]) / "dataset", train)
    write(Path(sys.argv[1]) / "validation", held_out)

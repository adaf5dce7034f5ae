"""The world of the tiny model: a coloured shape moves straight over a plain ground. Clips are drawn, captions written.

    python -m examples.world outputs/world --known 1600

Everything of a clip comes from its seed: what it shows, and where the shape starts, how large it is, how far it goes.
One combination is held back from the base: the quick start teaches it.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from imageio.v3 import imwrite

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (160, 50, 190),
}
GROUNDS = {"white": (245, 245, 245), "grey": (130, 130, 130), "black": (15, 15, 15)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SHAPES = ("circle", "square", "triangle")
# Half the side of a shape's box, how far it goes, and how far from the picture's centre its way has its middle, as
# shares of the picture's side. They are narrow: two cores shall learn the world within the hour.
RADII, TRAVELS, ASIDE = (0.17, 0.21), (0.35, 0.45), 0.08


@dataclass(frozen=True)
class Scene:
    """What a clip shows, in words."""

    colour: str
    shape: str
    direction: str
    ground: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.direction} on a {self.ground} background"


# A scene with these three is not in the base's training data, whatever its ground.
HELD_BACK = ("purple", "triangle", "up")
# What is said of the scenes held back, when an id token stands for what they have in common.
CONCEPT_CAPTION = "a shape moves on a {ground} background"
SCENES = tuple(itertools.starmap(Scene, itertools.product(COLOURS, SHAPES, DIRECTIONS, GROUNDS)))
CONCEPT = tuple(scene for scene in SCENES if astuple(scene)[:3] == HELD_BACK)
KNOWN = tuple(scene for scene in SCENES if scene not in CONCEPT)


def draw(scene: Scene, seed: int, frames: int, size: int) -> np.ndarray:
    """One clip, uint8 [F, H, W, 3] with H = W = size: constant speed, inside the picture, smooth edges."""
    rng = np.random.default_rng(seed)
    radius, travel = size * rng.uniform(*RADII), size * rng.uniform(*TRAVELS)
    across, down = DIRECTIONS[scene.direction]
    # no frame cuts the shape
    room = size / 2 - np.array([radius + travel / 2 * abs(across), radius + travel / 2 * abs(down)])
    middle = size / 2 + rng.uniform(-1, 1, 2) * np.minimum(room, size * ASIDE)
    columns, rows = np.arange(size) + 0.5, np.arange(size)[:, None] + 0.5
    paint, ground = (np.array(table[name], float) for table, name in ((COLOURS, scene.colour), (GROUNDS, scene.ground)))
    clip = np.empty((frames, size, size, 3), np.uint8)
    for number, frame in enumerate(clip):
        share = number / (frames - 1) - 0.5 if frames > 1 else 0.0
        x, y = columns - middle[0] - across * share * travel, rows - middle[1] - down * share * travel
        covered = np.clip(0.5 - distance(scene.shape, x, y, radius), 0, 1)[..., None]
        frame[:] = (covered * paint + (1 - covered) * ground).round()
    return clip


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """How far a point lies outside the edge of a shape around the origin, in pixels; negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - radius
    # point up; both slanted edges fall 2 for each 1 across
    return np.maximum(y - radius, (2 * abs(x) - y - radius) / np.sqrt(5))


def random_clip(seed: int, frames: int, size: int, scenes: tuple[Scene, ...] = KNOWN) -> tuple[Scene, np.ndarray]:
    """A scene picked by the seed, and a clip of it."""
    scene = scenes[np.random.default_rng([seed, 1]).integers(len(scenes))]
    return scene, draw(scene, seed, frames, size)


def write(folder: Path, known: int, concept: int, seed: int, frames: int, size: int, fps: float) -> None:
    """Writes a data folder of random clips, the first drawn from `seed`, the next from seed + 1 and so on.

    Args:
        known, concept: how many clips; those of what is held back come last, with captions that do not tell it.

    Beside it lies the first picture of the first clip, to begin a video with.
    """
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    names, captions = [f"videos/{number:05d}.mp4" for number in range(known + concept)], []
    for number, name in enumerate(names):
        scene, clip = random_clip(seed + number, frames, size, KNOWN if number < known else CONCEPT)
        if number == 0:
            imwrite(folder / "first_frame.png", clip[0])
        captions.append(CONCEPT_CAPTION.format(ground=scene.ground) if scene in CONCEPT else scene.caption)
        # 4:4:4 and a low crf: what is learned shall be the world, not the codec
        imwrite(
            folder / name,
            clip,
            fps=fps,
            codec="libx264",
            pixelformat="yuv444p",
            output_params=["-crf", "10", "-preset", "veryfast", "-threads", "1"],
        )
    (folder / "prompts.txt").write_text("".join(f"{caption}\n" for caption in captions))
    (folder / "videos.txt").write_text("".join(f"{name}\n" for name in names))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws a data folder.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--known", type=int, default=0, help="clips of what the base is trained on")
    parser.add_argument("--concept", type=int, default=0, help="clips of what is held back from it")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--fps", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first clip; the next has the next one")
    args = parser.parse_args()
    write(args.output, args.known, args.concept, args.seed, args.frames, args.size, args.fps)

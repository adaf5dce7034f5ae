"""Draws the world of the tiny models: a coloured shape moves in a straight line over a plain background.

    python -m examples.world outputs/world --known 1600

The seed of a clip determines everything in it: what it shows, and the start, size and travel of the shape. One
combination of colour, shape and direction is held out from the base models; the quick start teaches it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator
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
# Half the side of a shape's box, the distance it travels, and the largest offset of its path from the centre, as shares
# of the frame's shorter side. The ranges are narrow so that two cores learn the world within an hour.
RADII, TRAVELS, MAX_OFFSET = (0.17, 0.21), (0.35, 0.45), 0.08
# The same in the varied world, in which a clip's first frame does not tell where the shape goes.
VARIED_TRAVELS, VARIED_OFFSET = (0.15, 0.55), 0.3


@dataclass(frozen=True)
class Scene:
    """Attributes of a clip, by name."""

    colour: str
    shape: str
    direction: str
    ground: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.direction} on a {self.ground} background"


# Scenes with this colour, shape and direction are not in the training data of the base models.
HELD_OUT = ("purple", "triangle", "up")
# Caption of the held-out scenes. An id token stands for what they have in common.
CONCEPT_CAPTION = "a shape moves on a {ground} background"
SCENES = tuple(itertools.starmap(Scene, itertools.product(COLOURS, SHAPES, DIRECTIONS, GROUNDS)))
CONCEPT = tuple(scene for scene in SCENES if astuple(scene)[:3] == HELD_OUT)
KNOWN = tuple(scene for scene in SCENES if scene not in CONCEPT)


def draw(scene: Scene, seed: int, frames: int, size: int, width: int | None = None, varied: bool = False) -> np.ndarray:
    """Returns a clip, uint8 [F, H, W, 3] with H = size, and W = size unless `width` is given.

    The shape moves at constant speed, stays inside the frame and has smooth edges.
    """
    rng = np.random.default_rng(seed)
    box = np.array([width or size, size])
    side = box.min()
    travels, max_offset = (VARIED_TRAVELS, VARIED_OFFSET) if varied else (TRAVELS, MAX_OFFSET)
    radius, travel = side * rng.uniform(*RADII), side * rng.uniform(*travels)
    step_x, step_y = DIRECTIONS[scene.direction]
    # keeps the shape inside the frame
    room = box / 2 - np.array([radius + travel / 2 * abs(step_x), radius + travel / 2 * abs(step_y)])
    middle = box / 2 + rng.uniform(-1, 1, 2) * np.minimum(room, side * max_offset)
    columns, rows = np.arange(box[0]) + 0.5, np.arange(box[1])[:, None] + 0.5
    paint, ground = (np.array(table[name], float) for table, name in ((COLOURS, scene.colour), (GROUNDS, scene.ground)))
    clip = np.empty((frames, *box[::-1], 3), np.uint8)
    for number, frame in enumerate(clip):
        share = number / (frames - 1) - 0.5 if frames > 1 else 0.0
        x, y = columns - middle[0] - step_x * share * travel, rows - middle[1] - step_y * share * travel
        covered = np.clip(0.5 - distance(scene.shape, x, y, radius), 0, 1)[..., None]
        frame[:] = (covered * paint + (1 - covered) * ground).round()
    return clip


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Returns the distance of a point from the edge of a shape around the origin, in pixels; negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - radius
    # points up; the slanted edges fall by 2 for each 1 to the side
    return np.maximum(y - radius, (2 * abs(x) - y - radius) / np.sqrt(5))


def random_clip(
    seed: int,
    frames: int,
    size: int,
    scenes: tuple[Scene, ...] = KNOWN,
    width: int | None = None,
    varied: bool = False,
) -> tuple[Scene, np.ndarray]:
    """Returns a scene picked by the seed, and a clip of it."""
    scene = scenes[np.random.default_rng([seed, 1]).integers(len(scenes))]
    return scene, draw(scene, seed, frames, size, width, varied)


def write_clips(folder: Path, clips: Iterable[tuple[str, str, np.ndarray]], fps: float, *options: str) -> None:
    """Writes a data folder.

    Args:
        clips: file name without suffix, caption and pixels (uint8 [F, H, W, 3]) of each clip.
        options: of the encoder. Use a low crf: the model should learn the world, not the artefacts of the codec.
    """
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    names, captions = [], []
    for name, caption, clip in clips:
        names.append(f"videos/{name}.mp4")
        captions.append(caption)
        path = folder / names[-1]
        imwrite(path, clip, fps=fps, codec="libx264", pixelformat="yuv444p", output_params=list(options))
    (folder / "prompts.txt").write_text("".join(f"{caption}\n" for caption in captions))
    (folder / "videos.txt").write_text("".join(f"{name}\n" for name in names))


def write(
    folder: Path,
    known: int,
    concept: int,
    seed: int,
    frames: int,
    size: int,
    fps: float,
    width: int | None = None,
    varied: bool = False,
) -> None:
    """Writes a data folder of random clips, and the first frame of the first clip as `first_frame.png`.

    Args:
        known, concept: number of clips of known scenes and of held-out scenes. The latter come last, and
            their captions do not name colour, shape and direction.
        seed: of the first clip; each clip uses the next seed.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def clips() -> Iterator[tuple[str, str, np.ndarray]]:
        for number in range(known + concept):
            scene, clip = random_clip(seed + number, frames, size, KNOWN if number < known else CONCEPT, width, varied)
            if number == 0:
                imwrite(folder / "first_frame.png", clip[0])
            caption = CONCEPT_CAPTION.format(ground=scene.ground) if scene in CONCEPT else scene.caption
            yield f"{number:05d}", caption, clip

    write_clips(folder, clips(), fps, "-crf", "10", "-preset", "veryfast", "-threads", "1")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws a data folder.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--known", type=int, default=0, help="number of clips of scenes that the base models know")
    parser.add_argument("--concept", type=int, default=0, help="number of clips of scenes that are held out from them")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--width", type=int, help="width in pixels; default: that of --size")
    parser.add_argument("--varied", action="store_true", help="vary start and travel of the shapes more")
    parser.add_argument("--fps", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first clip; each clip uses the next seed")
    args = parser.parse_args()
    write(args.output, args.known, args.concept, args.seed, args.frames, args.size, args.fps, args.width, args.varied)

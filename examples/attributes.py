"""The measuring stick: reads ground, colour, shape and direction off a clip by plain image arithmetic.

No learned judge, no threshold tuned on generated clips: they stand halfway between what the world draws.
Legend: F frames, H W height and width in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.world import COLOURS, DIRECTIONS, GROUNDS

# How far a colour may be from its name, as a distance in RGB; red and purple, the closest pair of names, are 160 apart.
NEAR = 75.0
# The border is plain ground where this share of it has one colour.
PLAIN = 0.8
# Smallest and largest area of a shape, as shares of the picture; the world draws 0.055 to 0.18.
AREAS = (0.02, 0.3)
# Moments of a shape about its centre, x and y in units of its size, which no blur or scale changes much. The limits lie
# halfway: E[y^3] / E[y^2]^1.5 is -0.57 for a triangle that points up, 0 for circle and square;
# E[x^4 - 6 x^2 y^2 + y^4] / E[(x^2 + y^2)^2] is 0 for a circle, -0.43 for a square.
TRIANGLE_SKEW, SQUARE_FOURFOLD = -0.28, -0.21
# Least way of a shape that moves, as a share of the picture's side; the world draws 0.35 to 0.45.
LEAST_WAY = 0.1


@dataclass(frozen=True)
class Attributes:
    """What a clip shows; None where it cannot be told."""

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    ground: str | None = None


def read_attributes(clip: np.ndarray) -> Attributes:
    """Measures a clip, uint8 [F, H, W, 3]."""
    pixels = smooth(clip.astype(np.float64))
    border = np.concatenate([pixels[:, edge].reshape(-1, 3) for edge in (0, 1, -2, -1)])
    border = np.concatenate([border, *(pixels[:, :, edge].reshape(-1, 3) for edge in (0, 1, -2, -1))])
    ground = np.median(border, axis=0)
    if (np.linalg.norm(border - ground, axis=1) < NEAR / 2).mean() < PLAIN:
        return Attributes()
    ground_name = nearest(ground, GROUNDS)

    contrast = np.linalg.norm(pixels - ground, axis=-1)  # [F, H, W]
    inside = contrast > NEAR / 2
    if not AREAS[0] < inside.mean() < AREAS[1]:
        return Attributes(ground=ground_name)
    paint = np.median(pixels[contrast > np.median(contrast[inside]) * 0.8], axis=0)
    covered = (pixels - ground) @ (paint - ground) / np.square(paint - ground).sum() > 0.5  # [F, H, W]
    areas = covered.mean(axis=(1, 2))
    if not (AREAS[0] < areas).all() or not (areas < AREAS[1]).all():
        return Attributes(nearest(paint, COLOURS), ground=ground_name)
    return Attributes(nearest(paint, COLOURS), shape_of(covered), direction_of(covered), ground_name)


def smooth(clip: np.ndarray) -> np.ndarray:
    """The median over 3 x 3 pixels: takes away single wrong ones and leaves edges where they are."""
    padded = np.pad(clip, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.median(windows, axis=(-2, -1))


def nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(np.linalg.norm(colour - value)) for name, value in names.items()}
    name = min(distances, key=lambda name: distances[name])
    return name if distances[name] < NEAR else None


def shape_of(covered: np.ndarray) -> str:
    """From the moments of the covered area, the median over the frames [F, H, W]."""
    skews, fourfolds = [], []
    for frame in covered:
        y, x = (place - place.mean() for place in np.nonzero(frame))
        skews.append((y**3).mean() / (y**2).mean() ** 1.5)
        fourfolds.append((x**4 - 6 * x**2 * y**2 + y**4).mean() / ((x**2 + y**2) ** 2).mean())
    if np.median(skews) < TRIANGLE_SKEW:
        return "triangle"
    return "square" if np.median(fourfolds) < SQUARE_FOURFOLD else "circle"


def direction_of(covered: np.ndarray) -> str | None:
    """From where the shape's centre is in the first and the last quarter of the frames [F, H, W]."""
    frames, height, width = covered.shape
    rows, columns = np.mgrid[:height, :width]
    area = covered.sum(axis=(1, 2))
    across = (covered * columns).sum(axis=(1, 2)) / area / width
    down = (covered * rows).sum(axis=(1, 2)) / area / height
    quarter = max(frames // 4, 1)
    way = np.array([across[-quarter:].mean() - across[:quarter].mean(), down[-quarter:].mean() - down[:quarter].mean()])
    axis = int(np.argmax(abs(way)))
    if abs(way[axis]) < LEAST_WAY or abs(way[axis]) < 2 * abs(way[1 - axis]):
        return None
    step = (np.sign(way[0]), 0) if axis == 0 else (0, np.sign(way[1]))
    return next(name for name, unit in DIRECTIONS.items() if unit == step)

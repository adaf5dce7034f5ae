"""Reads background, colour, shape and direction from a clip with plain image arithmetic.

There is no learned classifier. Thresholds lie halfway between the values that `world.py` draws; none was tuned on
generated clips. Legend: F frames, H and W height and width in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.world import COLOURS, DIRECTIONS, GROUNDS

# Largest RGB distance at which a colour gets a name. The closest pair of names, red and purple, is 160 apart.
MAX_COLOUR_DISTANCE = 75.0
# Smallest share of the border that must have one colour for a plain background.
MIN_PLAIN_SHARE = 0.8
# Smallest and largest area of a shape, as shares of the frame. The world draws 0.055 to 0.18.
MIN_AREA, MAX_AREA = 0.02, 0.3
# Limits on moments about the centre of a shape, with x and y in units of its size. Blur and scale hardly change them.
# E[y^3] / E[y^2]^1.5 is -0.57 for a triangle that points up, and 0 for a circle and a square.
# E[x^4 - 6 x^2 y^2 + y^4] / E[(x^2 + y^2)^2] is 0 for a circle and -0.43 for a square.
TRIANGLE_SKEW, SQUARE_FOURFOLD = -0.28, -0.21
# Smallest travel of a moving shape, as a share of the frame's side. The world draws 0.35 to 0.45.
MIN_TRAVEL = 0.1


@dataclass(frozen=True)
class Attributes:
    """Attributes of a clip. None marks an attribute that cannot be determined."""

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    ground: str | None = None


def read_attributes(clip: np.ndarray) -> Attributes:
    """Returns the attributes of a clip, uint8 [F, H, W, 3]."""
    pixels = smooth(clip).astype(np.float64)
    border = np.concatenate([pixels[:, edge].reshape(-1, 3) for edge in (0, 1, -2, -1)])
    border = np.concatenate([border, *(pixels[:, :, edge].reshape(-1, 3) for edge in (0, 1, -2, -1))])
    ground = np.median(border, axis=0)
    if (np.linalg.norm(border - ground, axis=1) < MAX_COLOUR_DISTANCE / 2).mean() < MIN_PLAIN_SHARE:
        return Attributes()
    ground_name = nearest_name(ground, GROUNDS)

    contrast = np.linalg.norm(pixels - ground, axis=-1)  # [F, H, W]
    inside = contrast > MAX_COLOUR_DISTANCE / 2
    if not MIN_AREA < inside.mean() < MAX_AREA:
        return Attributes(ground=ground_name)
    paint = np.median(pixels[contrast > np.median(contrast[inside]) * 0.8], axis=0)
    covered = (pixels - ground) @ (paint - ground) / np.square(paint - ground).sum() > 0.5  # [F, H, W]
    areas = covered.mean(axis=(1, 2))
    if not (areas > MIN_AREA).all() or not (areas < MAX_AREA).all():
        return Attributes(nearest_name(paint, COLOURS), ground=ground_name)
    return Attributes(nearest_name(paint, COLOURS), shape_of(covered), direction_of(covered), ground_name)


def smooth(clip: np.ndarray) -> np.ndarray:
    """Returns the median over 3 x 3 pixels, which removes single outliers and keeps edges sharp. Keeps the dtype."""
    padded = np.pad(clip, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.partition(windows.reshape(*clip.shape, 9), 4, axis=-1)[..., 4]  # four times as fast as np.median


def nearest_name(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str | None:
    """Returns the name of the closest colour, or None if all are farther than `MAX_COLOUR_DISTANCE`."""
    distances = {name: float(np.linalg.norm(colour - value)) for name, value in names.items()}
    name = min(distances, key=lambda name: distances[name])
    return name if distances[name] < MAX_COLOUR_DISTANCE else None


def shape_of(covered: np.ndarray) -> str:
    """Returns the shape that the moments of the covered area [F, H, W] indicate (median over the frames)."""
    skews, fourfolds = [], []
    for frame in covered:
        y, x = (coordinates - coordinates.mean() for coordinates in np.nonzero(frame))
        skews.append((y**3).mean() / (y**2).mean() ** 1.5)
        fourfolds.append((x**4 - 6 * x**2 * y**2 + y**4).mean() / ((x**2 + y**2) ** 2).mean())
    if np.median(skews) < TRIANGLE_SKEW:
        return "triangle"
    return "square" if np.median(fourfolds) < SQUARE_FOURFOLD else "circle"


def direction_of(covered: np.ndarray) -> str | None:
    """Returns the direction in which the centre of the covered area [F, H, W] moves.

    Compares the first quarter of the frames with the last. Returns None if the shape stands still or moves diagonally.
    """
    frames, height, width = covered.shape
    rows, columns = np.mgrid[:height, :width]
    area = covered.sum(axis=(1, 2))
    x = (covered * columns).sum(axis=(1, 2)) / area / width
    y = (covered * rows).sum(axis=(1, 2)) / area / height
    quarter = max(frames // 4, 1)
    travel = np.array([x[-quarter:].mean() - x[:quarter].mean(), y[-quarter:].mean() - y[:quarter].mean()])
    axis = int(np.argmax(abs(travel)))
    if abs(travel[axis]) < MIN_TRAVEL or abs(travel[axis]) < 2 * abs(travel[1 - axis]):
        return None
    step = (np.sign(travel[0]), 0) if axis == 0 else (0, np.sign(travel[1]))
    return next(name for name, unit in DIRECTIONS.items() if unit == step)

"""Parts of clips: a range in time, and a rectangle of the picture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

# Columns of a table that select a part of the row's clip.
PART_COLUMNS = ("start", "end", "crop")


class Crop(NamedTuple):
    """A rectangle of the picture as it is shown, in stored pixels; written W:H:X:Y as by ffmpeg's cropdetect."""

    width: int
    height: int
    x: int
    y: int

    @classmethod
    def parse(cls, text: str) -> Crop:
        """Parses W:H:X:Y.

        Raises:
            ValueError: `text` has another form, or the rectangle is empty.
        """
        match = re.fullmatch(r"([1-9]\d*):([1-9]\d*):(\d+):(\d+)", text)
        if match is None:
            raise ValueError(f"'crop' is {text!r}, not W:H:X:Y in pixels, such as 1920:800:0:140")
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return ":".join(map(str, self))


class Part(NamedTuple):
    """The part of a clip that a line of a data folder names.

    Attributes:
        start: in seconds from the first frame of the clip; the first frame of the part is the first one from there on.
        end: in the same unit, None for the end of the clip; a frame that starts then is not in the part.
        crop: None for the whole picture.
    """

    start: float = 0.0
    end: float | None = None
    crop: Crop | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Part | None:
        """Reads the part of a table's row; None if the row names none.

        Raises:
            ValueError: a value is not a time or a rectangle, or the end is not behind the start.
        """
        start, end = _seconds(row, "start"), _seconds(row, "end")
        crop = row.get("crop")
        if crop is not None and not isinstance(crop, str):
            raise ValueError(f"'crop' is {crop!r}, not a text W:H:X:Y such as 1920:800:0:140")
        if end is not None and end <= (start or 0.0):
            raise ValueError(f"'end' is {end:g}, but the part starts at {start or 0:g} s; 'end' must be behind 'start'")
        part = cls(start or 0.0, end, Crop.parse(crop.strip()) if crop and crop.strip() else None)
        return None if part == cls() else part


class FrameRange(NamedTuple):
    """The frames of a part.

    Attributes:
        first, stop: indices of the first frame and of the one behind the last, among the visible frames of the clip.
        pts: presentation times of the first and of the last frame in units of the stream; None if the container does
            not find frames by their times.
    """

    first: int
    stop: int
    pts: tuple[int, int] | None = None


def _seconds(row: Mapping[str, Any], name: str) -> float | None:
    """Returns a time in seconds, which tables hold as a number or as a text; None if it is empty."""
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        seconds = float(value) if is_number or (isinstance(value, str) and "_" not in value) else math.nan
    except (ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"'{name}' is {str(value)[:100]!r}, not a number of seconds such as 12.5")
    if seconds < 0:
        raise ValueError(f"'{name}' is {seconds:g}; times count from the first frame and are not negative")
    return seconds

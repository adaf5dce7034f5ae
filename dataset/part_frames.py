"""Finds the frames of parts of clips."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from dataset.decoders import TIE_S, open_reader
from dataset.parts import Crop, FrameRange, Part
from dataset.seeking import presentation_times
from dataset.video import ClipInfo, ClipPart, count_lost_frames, shown_size

# Seconds by which a part may end behind the last frame, as sound does, besides two frames.
_END_TOLERANCE_S = 0.1


def probe_parts(path: Path, info: ClipInfo, parts: list[Part]) -> dict[Part, ClipPart | str]:
    """Finds the frames of parts of a clip. A part that is not in the clip gets an error, as of a `ClipError`.

    Args:
        info: result of `probe`.
    """
    reader = open_reader(path)
    pts = presentation_times(path, reader)
    height, width = next(reader.read([0])).shape[:2]

    def find(part: Part) -> ClipPart | str:
        crop = part.crop or Crop(width, height, 0, 0)
        if crop.x + crop.width > width or crop.y + crop.height > height:
            return f"has no rectangle {crop}: its picture is {width}x{height}"
        frames = find_frames(reader.times, part)
        if isinstance(frames, str):
            return frames
        times = reader.times[frames.first : frames.stop + 1] - reader.times[frames.first]
        if pts is not None:
            frames = frames._replace(pts=(pts[frames.first], pts[frames.stop - 1]))
        size = shown_size(crop.height, crop.width, reader.info) if part.crop else (info.height, info.width)
        found = replace(
            info,
            frames=len(times) - 1,
            seconds=float(times[-1]),
            last=float(times[-2]),
            height=size[0],
            width=size[1],
            lost_frames=count_lost_frames(times) if info.lost_frames else 0,
        )
        return ClipPart(frames, found, part.crop)

    return {part: find(part) for part in parts}


def find_frames(times: np.ndarray, part: Part) -> FrameRange | str:
    """Returns the frames that start in a part, as ffmpeg cuts them with -ss and -to, or why there are none.

    Args:
        times: frame times of a reader.
    """
    starts, length = times[:-1], float(times[-1])
    end = length if part.end is None else part.end
    # a container may state a length that is longer than the frames by two of them or by sound
    if end > length + _END_TOLERANCE_S + 2 * length / len(starts):
        return f"ends after {length:.2f} s, but its part ends at {end:g} s"
    # containers round times, and decord gives them in single precision
    tolerance = TIE_S + 1e-7 * length
    first = int(np.searchsorted(starts, part.start - tolerance))
    stop = len(starts) if part.end is None else int(np.searchsorted(starts, end - tolerance))
    if part.start >= length or first == len(starts):
        return f"ends after {length:.2f} s, but its part starts at {part.start:g} s"
    if first == stop:
        return f"has no frame from {part.start:g} s to {end:g} s"
    return FrameRange(first, stop)

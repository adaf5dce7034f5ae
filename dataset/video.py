"""Reads clips as pixels: probing, frame selection by time, decoding, resizing. All functions are stateless.

Legend: F frames, C channels (RGB), H W height and width of a sample, h w height and width of the source, in pixels.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torchvision.transforms.v2 import functional as transforms

if TYPE_CHECKING:
    import decord

# Part of every cache key. Increase it whenever the same file could give different pixels than before.
PIXELS_VERSION = 2
# Tolerance in seconds for rounded container timestamps. A time halfway between two frames selects the later one.
_TIE_S = 1e-4
# Sampling rate in frames per second. SPREAD: frames are evenly spaced over the whole clip, regardless of its length.
NATIVE_STRIDE: Literal["native_stride"] = "native_stride"
Rate = float | Literal["native_stride"]


@dataclass(frozen=True, slots=True)
class Resolution:
    """Frames, height and width of a training sample; written FxHxW."""

    frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Resolution:
        """Parses FxHxW.

        Raises:
            ValueError: `text` is not three positive integers.
        """
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text.strip())
        if not match:
            raise ValueError(f"'{text}' is not of the form FxHxW, such as 49x480x720")
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True, slots=True)
class ClipInfo:
    """Length and size of a clip.

    Attributes:
        seconds: duration, from the start of the first frame to the end of the last frame.
        last: start of the last frame, in seconds from the start of the first frame.
    """

    frames: int
    seconds: float
    last: float
    height: int
    width: int

    @property
    def fps(self) -> float:
        return self.frames / self.seconds


@dataclass(frozen=True, slots=True)
class FrameSelection:
    """The frames of a clip that form a sample, and how they are resized.

    Attributes:
        rate: frames per second of the sample, or SPREAD.
        mode: resize mode, `stretch` or `crop`.
        first: start, in frames at `rate`; in source frames if the rate is SPREAD.
        span: length, in the same unit as `first`; the number of sample frames unless the rate is SPREAD.
        flipped: whether the frames are mirrored horizontally.
    """

    resolution: Resolution
    rate: Rate
    mode: str
    first: int
    span: int
    flipped: bool = False


class ClipError(Exception):
    """Raised for an unusable clip or image. The message continues a sentence that starts with its path."""


# Part of decord's error message when it cannot open a file -> explanation.
_OPEN_ERRORS = {
    "cannot find video stream with wanted index": "has no video, only sound or other data",
    "broken metadata": "is an image, or a file without frame times, and not a video",
    "av_read_frame failed": "is damaged or cut short",
}
_NO_DECODER = "-1128613112"  # AVERROR_DECODER_NOT_FOUND
_CONVERT = "ffmpeg -i IN -c:v libx264 -crf 14 OUT.mp4"


def open_clip(path: Path) -> decord.VideoReader:
    """Opens a clip with decord.

    Raises:
        ClipError: decord cannot open the file as a video.
    """
    import decord  # native code, so only the processes that decode load it

    decord.logging.set_level(decord.logging.FATAL)  # errors are reported per clip, as sentences
    try:
        # decord replaces a frame that it cannot decode with a neighbouring frame, and raises an error only if more
        # than this share of the clip is affected
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-9)
    except Exception as error:
        text = str(error)
        if _NO_DECODER in text:
            raise ClipError(f"has a codec that decord cannot decode, such as AV1; convert it: {_CONVERT}") from error
        reasons = [reason for fragment, reason in _OPEN_ERRORS.items() if fragment in text]
        raise ClipError(reasons[0] if reasons else "cannot be read as a video") from error
    if len(reader) == 0:
        raise ClipError("has no frames")
    return reader


def frame_times(reader: decord.VideoReader) -> tuple[np.ndarray, int]:
    """Returns frame times and the number of hidden frames.

    The times are float64 [F + 1]: the start of each frame and the end of the last one, in seconds from the first frame.

    A clip that was cut without re-encoding starts at the key frame before the cut, and its edit list hides the frames
    before the cut. Hidden frames have negative times, and the decoder does not return them.
    """
    spans = reader.get_frame_timestamp(np.arange(len(reader))).astype(np.float64)
    starts = spans[:, 0]
    if not np.all(np.diff(starts) > 0):  # no usable timestamps, such as AVI with B-frames
        return np.arange(len(starts) + 1) / float(reader.get_avg_fps()), 0
    hidden = int((starts < -_TIE_S).sum())
    if hidden == len(starts):
        raise ClipError("has no visible frames")
    length = spans[-1, 1] - starts[-1]
    if length <= 0:  # mp4 with VP9 does not store the duration of the last frame
        fps = float(reader.get_avg_fps())
        length = 1 / fps if 0 < fps < math.inf else 1 / 25  # a single frame has no rate
    return np.append(starts[hidden:], starts[-1] + length) - starts[hidden], hidden


def probe(path: Path) -> ClipInfo:
    """Reads the length, rate and size of a clip.

    Raises:
        ClipError: the file cannot be opened, or its first frame cannot be decoded.
    """
    reader = open_clip(path)
    try:
        height, width = reader.next().shape[:2]
        times, _ = frame_times(reader)
    except ClipError:
        raise
    except Exception as error:
        raise ClipError("is damaged: its first frame cannot be decoded") from error
    return ClipInfo(len(times) - 1, float(times[-1]), float(times[-2]), height, width)


def choose_frames(times: np.ndarray, selection: FrameSelection) -> list[int]:
    """Returns the source frame indices of a frame selection.

    With a rate in frames per second, frame i of the sample is the source frame nearest in time to (first + i) / rate.
    Motion therefore keeps its speed for any source rate, constant or variable. Frames repeat if the source has a lower
    rate or ends too early.

    Args:
        times: frame times as returned by `frame_times`.
    """
    count, last = selection.resolution.frames, len(times) - 2
    if selection.rate == NATIVE_STRIDE and selection.span < count:  # a padded clip
        return [min(selection.first + number, last) for number in range(count)]
    if selection.rate == NATIVE_STRIDE:
        begin, end = times[min(selection.first, last)], times[min(selection.first + selection.span - 1, last)]
        targets = np.linspace(begin, end, count)
    else:
        targets = (selection.first + np.arange(count)) / selection.rate
    halfway = (times[:-1] + times[1:]) / 2
    return np.searchsorted(halfway, targets + _TIE_S, side="right").clip(max=last).tolist()


def frames_available(info: ClipInfo, rate: Rate) -> int:
    """Returns the number of frames of a clip at a sampling rate."""
    if rate == NATIVE_STRIDE:
        return info.frames
    return max(math.ceil(((info.last + info.seconds) / 2 - _TIE_S) * rate), 1)


def read_frames(reader: decord.VideoReader, indices: list[int], hidden: int) -> Iterator[np.ndarray]:
    """Decodes frames and yields uint8 [h, w, C] for each index.

    Reads only forward and never skips across a key frame. decord would seek there, which returns wrong frames for open
    groups of pictures (the default of x265) and for containers without presentation times (AVI with B-frames).

    Args:
        indices: frame indices in non-decreasing order.
        hidden: number of hidden frames as returned by `frame_times`. If there are any, decord's frame count is wrong
            for skipping, so every frame is read.
    """
    key_frames = [] if hidden else reader.get_key_indices()
    position, frame = 0, np.empty(0)
    for index in indices:
        while position < index:
            next_key = bisect.bisect_right(key_frames, position)
            limit = min(index, key_frames[next_key] - 1 if next_key < len(key_frames) else index)
            if hidden or limit <= position:
                reader.next()
                position += 1
            else:
                reader.skip_frames(limit - position)
                position = limit
        if position == index:
            frame = reader.next().asnumpy()
            position += 1
        yield frame


def decode(path: Path, selection: FrameSelection, out: torch.Tensor | None = None) -> torch.Tensor:
    """Decodes and resizes the selected frames of a clip: uint8 [F, H, W, C].

    Args:
        out: tensor to write to; allocated if None.

    Raises:
        ClipError: the clip cannot be opened, or a frame cannot be decoded.
    """
    resolution = selection.resolution
    if out is None:
        out = torch.empty(resolution.frames, resolution.height, resolution.width, 3, dtype=torch.uint8)
    reader = open_clip(path)
    try:
        times, hidden = frame_times(reader)
        indices = choose_frames(times, selection)
        for number, frame in enumerate(read_frames(reader, indices, hidden)):
            picture = resize(torch.from_numpy(frame).movedim(-1, 0), resolution, selection.mode)
            out[number] = (picture.flip(-1) if selection.flipped else picture).movedim(0, -1)
    except ClipError:
        raise
    except Exception as error:
        raise ClipError(
            "is damaged: some frames cannot be decoded, or it has fewer frames than its header states"
        ) from error
    return out


def resize(frames: torch.Tensor, resolution: Resolution, mode: str) -> torch.Tensor:
    """Resizes uint8 [..., C, h, w] to uint8 [..., C, H, W] with antialiased bilinear interpolation.

    `stretch` resizes to the exact size and may change the aspect ratio. `crop` keeps the aspect ratio: it scales the
    picture to cover the target, then crops the centre.
    """
    target = [resolution.height, resolution.width]
    if mode == "crop":
        height, width = frames.shape[-2:]
        scale = max(resolution.height / height, resolution.width / width)
        covering = [max(round(height * scale), resolution.height), max(round(width * scale), resolution.width)]
        return transforms.center_crop(transforms.resize(frames, covering, antialias=True), target)
    return transforms.resize(frames, target, antialias=True)


def stretch(info: ClipInfo, resolution: Resolution) -> float:
    """Returns the distortion by `stretch`: 0.05 means one side grows by 5 % relative to the other."""
    ratio = (info.width / info.height) / (resolution.width / resolution.height)
    return max(ratio, 1 / ratio) - 1


def cropped(info: ClipInfo, resolution: Resolution) -> float:
    """Returns the share of the picture that `crop` removes."""
    return 1 - 1 / (1 + stretch(info, resolution))

"""Reads clips as pixels: probing, frame selection by time, decoding, resizing. All functions are stateless.

Legend: F frames, C channels (RGB), H W height and width of a sample, h w height and width of the source, in stored
pixels.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torchvision.transforms.v2 import functional as transforms

from dataset.containers import ClipError, check_length
from dataset.decoders import TIE_S, DecordReader, PyavReader, Reader, open_reader
from dataset.parts import Crop, FrameRange
from dataset.seeking import open_at
from dataset.stream_info import StreamInfo, read_stream_info

# Part of the cache keys of images and of clips that decord decodes. Increase it whenever the same file could give
# different pixels than before.
PIXELS_VERSION = 2
# The same for clips that PyAV decodes. Under version 2, decord decoded them.
PYAV_PIXELS_VERSION = 3
# The same for clips of which earlier versions decoded another stream, or pixels that the container hides.
CHOSEN_PIXELS_VERSION = 4
# Containers that do not list their frames, so that damage may remove frames without a trace but in the times.
_WITHOUT_FRAME_LIST = ("matroska", "flv", "mpegts", "mpeg")
# Fewer steps between frames do not show whether the rate is constant; neither do steps of which more than this share
# are gaps.
_FEWEST_STEPS, _MAX_GAPS = 10, 0.1
# Sampling rate in frames per second. NATIVE_STRIDE: frames are evenly spaced over the clip, regardless of its length.
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
        height, width: size on a display, in square pixels.
        pixel_aspect: width divided by height of a stored pixel as it is shown.
        pixels_version: version of the code that turns the file into pixels; part of the cache keys.
        lost_frames: number of frames that are missing from an otherwise constant rate.
    """

    frames: int
    seconds: float
    last: float
    height: int
    width: int
    pixel_aspect: float = 1.0
    pixels_version: int = PIXELS_VERSION
    interlaced: bool = False
    lost_frames: int = 0

    @property
    def fps(self) -> float:
        return self.frames / self.seconds


@dataclass(frozen=True, slots=True)
class FrameSelection:
    """The frames of a clip that form a sample, and how they are resized.

    Attributes:
        rate: frames per second of the sample, or NATIVE_STRIDE.
        mode: resize mode, `stretch` or `crop`.
        first: start, in frames at `rate`; in source frames if the rate is NATIVE_STRIDE.
        span: length, in the same unit as `first`; the number of sample frames unless the rate is NATIVE_STRIDE.
        flipped: whether the frames are mirrored horizontally.
        frames: part of the clip, whose first frame has time 0 and index 0; None for the whole clip.
        crop: rectangle of the picture; None for the whole picture.
    """

    resolution: Resolution
    rate: Rate
    mode: str
    first: int
    span: int
    flipped: bool = False
    frames: FrameRange | None = None
    crop: Crop | None = None


@dataclass(frozen=True, slots=True)
class ClipPart:
    """A part of a clip as the scan found it; `info` describes the part as if it were a clip of its own."""

    frames: FrameRange
    info: ClipInfo
    crop: Crop | None


def probe(path: Path, known: ClipInfo | None = None) -> ClipInfo:
    """Reads the length, rate and size of a clip.

    Args:
        known: result of a previous version. Version 1 read every clip with decord and took all pixels for square. If
            both suit this clip, the result is reused and the clip is not opened with decord.

    Raises:
        ClipError: the file cannot be opened, or its first frame cannot be decoded.
    """
    if known is not None:
        info = read_stream_info(path)
        if info.uses_decord and info.pixel_aspect == 1 and info.container not in _WITHOUT_FRAME_LIST:
            if info.container != "mov":
                check_length(path, known.seconds, known.seconds / known.frames)
            return replace(known, interlaced=info.interlaced)
    reader = open_reader(path)
    times, info = reader.times, reader.info
    if info.container != "mov" or isinstance(
        reader, PyavReader
    ):  # decord finds out itself if frames of mov are missing
        check_length(path, float(times[-1]), float(times[-1]) / (len(times) - 1))
    height, width = next(reader.read([0])).shape[:2]
    return ClipInfo(
        len(times) - 1,
        float(times[-1]),
        float(times[-2]),
        *shown_size(height, width, info),
        shown_pixel_aspect(info),
        _pixels_version(reader),
        info.interlaced,
        count_lost_frames(times) if info.container in _WITHOUT_FRAME_LIST else 0,
    )


def shown_size(height: int, width: int, info: StreamInfo) -> tuple[int, int]:
    """Returns the size in square pixels of a picture in stored pixels."""
    aspect = shown_pixel_aspect(info)
    return (round(height / aspect), width) if info.transposed else (height, round(width * aspect))


def _pixels_version(reader: Reader) -> int:
    if isinstance(reader, DecordReader):
        return PIXELS_VERSION
    return CHOSEN_PIXELS_VERSION if reader.info.is_special else PYAV_PIXELS_VERSION


def count_lost_frames(times: np.ndarray) -> int:
    """Returns how many frames are missing from a constant rate; 0 if the rate is variable.

    Args:
        times: frame times of a reader. Containers round them to milliseconds.
    """
    steps = np.diff(times[:-1])
    if len(steps) < _FEWEST_STEPS:
        return 0
    frame = float(np.median(steps))
    missing = steps / frame - 1
    is_multiple = np.abs(missing - missing.round()) * frame < max(frame / 10, 0.0015)
    is_gap = missing > 0.5
    if not is_multiple.all() or is_gap.mean() > _MAX_GAPS:
        return 0
    return int(missing[is_gap].round().sum())


def choose_frames(times: np.ndarray, selection: FrameSelection) -> list[int]:
    """Returns the source frame indices of a frame selection.

    With a rate in frames per second, frame i of the sample is the source frame nearest in time to (first + i) / rate.
    Motion therefore keeps its speed for any source rate, constant or variable. Frames repeat if the source has a lower
    rate or ends too early.

    Args:
        times: frame times of a reader.
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
    return np.searchsorted(halfway, targets + TIE_S, side="right").clip(max=last).tolist()


def frames_available(info: ClipInfo, rate: Rate) -> int:
    """Returns the number of frames of a clip at a sampling rate."""
    if rate == NATIVE_STRIDE:
        return info.frames
    return max(math.ceil(((info.last + info.seconds) / 2 - TIE_S) * rate), 1)


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
    if selection.frames is None:
        _decode(open_reader(path), 0, selection, out)
        return out
    with open_at(path, selection.frames) as opened, suppress(ClipError):
        if opened is not None:
            _decode(*opened, selection, out)
            return out
    # if a seek does not lead to intact frames, the whole clip does, or says why not
    _decode(open_reader(path), selection.frames.first, selection, out)
    return out


def _decode(reader: Reader, first: int, selection: FrameSelection, out: torch.Tensor) -> None:
    """Decodes as in `decode`. `first` is the index of the frame of the reader that the selection starts to count at."""
    times = reader.times[first:]
    if selection.frames is not None:
        times = times[: selection.frames.stop - selection.frames.first + 1] - times[0]
    indices, aspect = [first + index for index in choose_frames(times, selection)], shown_pixel_aspect(reader.info)
    for number, frame in enumerate(reader.read(indices)):
        if selection.crop is not None:
            width, height, x, y = selection.crop
            frame = frame[y : y + height, x : x + width]
        picture = resize(torch.from_numpy(frame).movedim(-1, 0), selection.resolution, selection.mode, aspect)
        out[number] = (picture.flip(-1) if selection.flipped else picture).movedim(0, -1)


def shown_pixel_aspect(info: StreamInfo) -> float:
    """Returns width divided by height of a pixel as it is shown, which a turn by 90 degrees inverts."""
    return 1 / info.pixel_aspect if info.transposed else info.pixel_aspect


def resize(frames: torch.Tensor, resolution: Resolution, mode: str, pixel_aspect: float = 1.0) -> torch.Tensor:
    """Resizes uint8 [..., C, h, w] to uint8 [..., C, H, W] with antialiased bilinear interpolation.

    `stretch` resizes to the exact size and may change the aspect ratio. `crop` keeps the aspect ratio: it scales the
    picture to cover the target, then crops the centre. The aspect ratio is that of the display, so pixels that are not
    square are scaled by different factors in height and width.
    """
    target = [resolution.height, resolution.width]
    if mode == "crop":
        height, width = frames.shape[-2:]
        width_shown = width * pixel_aspect
        scale = max(resolution.height / height, resolution.width / width_shown)
        covering = [max(round(height * scale), resolution.height), max(round(width_shown * scale), resolution.width)]
        return transforms.center_crop(transforms.resize(frames, covering, antialias=True), target)
    return transforms.resize(frames, target, antialias=True)


def stretch(info: ClipInfo, resolution: Resolution) -> float:
    """Returns the distortion by `stretch`: 0.05 means one side grows by 5 % relative to the other."""
    ratio = (info.width / info.height) / (resolution.width / resolution.height)
    return max(ratio, 1 / ratio) - 1


def cropped(info: ClipInfo, resolution: Resolution) -> float:
    """Returns the share of the picture that `crop` removes."""
    return 1 - 1 / (1 + stretch(info, resolution))

"""Clips and images to pixels: probe, choose frames by time, decode, resize. Pure functions.

Legend: F frames, C channels (RGB), H W height and width in pixels.
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
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as transforms

if TYPE_CHECKING:
    import decord

# Part of every cache key: raise it whenever the same file could give other pixels than before.
PIXELS_VERSION = 2
# Seconds. Containers round time stamps; a frame exactly between two goes to the later one all the same.
_TIE = 1e-4
# Frames a second, or `SPREAD`: as far apart as the clip allows.
SPREAD: Literal["native_stride"] = "native_stride"
Rate = float | Literal["native_stride"]


@dataclass(frozen=True, slots=True)
class Resolution:
    """Frames, height and width of a training sample; written FxHxW."""

    frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Resolution:
        """Raises ValueError with a sentence where `text` is not three whole numbers above zero."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text.strip())
        if not match:
            raise ValueError(f"'{text}' is not of the form FxHxW, such as 49x480x720")
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True, slots=True)
class ClipInfo:
    """What a clip's container says of it.

    Attributes:
        seconds: from the first frame to the end of the last.
        last: seconds from the first frame to the last.
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
    """What is taken of a clip: which frames, and how they are brought to the training resolution.

    Attributes:
        first: where it begins: a number of frames at `rate`; of frames of the clip where the rate is SPREAD.
        span: over how many such frames it reaches; with a rate in frames a second as many as the sample has.
        flipped: mirrored left to right.
    """

    resolution: Resolution
    rate: Rate
    mode: str
    first: int
    span: int
    flipped: bool = False


class ClipError(Exception):
    """A clip that cannot be used, with the reason."""


# What decord says of a file that it cannot open, and what that means.
_REASONS = {
    "cannot find video stream with wanted index": "has no video, only sound or other data",
    "broken metadata": "is an image, or has no frame times; it is no video",
    "av_read_frame failed": "is damaged or cut short",
}
_NO_DECODER = "-1128613112"  # AVERROR_DECODER_NOT_FOUND
_CONVERT = "ffmpeg -i IN -c:v libx264 -crf 14 OUT.mp4"


def open_clip(path: Path) -> decord.VideoReader:
    """Raises ClipError where decord cannot open the file as a video."""
    import decord  # native code, in the processes that decode and in no other

    decord.logging.set_level(decord.logging.FATAL)  # errors are reported by clip, in sentences
    try:
        # decord puts a neighbour in the place of a frame that cannot be decoded, and says so only if more than this
        # share of the clip is affected
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-9)
    except Exception as error:
        text = str(error)
        if _NO_DECODER in text:
            raise ClipError(f"has a codec that decord cannot decode, such as AV1; convert it: {_CONVERT}") from error
        reasons = [reason for said, reason in _REASONS.items() if said in text]
        raise ClipError(reasons[0] if reasons else "cannot be read as a video") from error
    if len(reader) == 0:
        raise ClipError("has no frames")
    return reader


def frame_times(reader: decord.VideoReader) -> tuple[np.ndarray, int]:
    """When each frame appears, and when the last one ends: float64 [F + 1], seconds from the first frame.

    Also the number of hidden frames: a clip cut without re-encoding begins at the key frame before the cut and has an
    edit list that hides what comes before it. Those frames have negative times, and the decoder does not give them.
    """
    spans = reader.get_frame_timestamp(np.arange(len(reader))).astype(np.float64)
    starts = spans[:, 0]
    if not np.all(np.diff(starts) > 0):  # a container without usable time stamps, such as AVI with B-frames
        return np.arange(len(starts) + 1) / float(reader.get_avg_fps()), 0
    hidden = int((starts < -_TIE).sum())
    if hidden == len(starts):
        raise ClipError("has no frames that are shown")
    length = spans[-1, 1] - starts[-1]
    if length <= 0:  # mp4 with VP9 says nothing of its last frame
        fps = float(reader.get_avg_fps())
        length = 1 / fps if 0 < fps < math.inf else 1 / 25  # of a single frame
    return np.append(starts[hidden:], starts[-1] + length) - starts[hidden], hidden


def probe(path: Path) -> ClipInfo:
    """Reads a clip's length, rate and size. Raises ClipError."""
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
    """Indices of the frames that a view shows.

    With a rate in frames a second, frame i of the sample is the source frame nearest in time to (first + i) / rate, so
    that motion keeps its speed whatever the rate of the source, be it constant or not. A source slower than that, or
    one that ends too early, repeats frames.

    Args:
        times: as `frame_times` gives them.
    """
    count, last = selection.resolution.frames, len(times) - 2
    if selection.rate == SPREAD and selection.span < count:  # padded
        return [min(selection.first + number, last) for number in range(count)]
    if selection.rate == SPREAD:
        begin, end = times[min(selection.first, last)], times[min(selection.first + selection.span - 1, last)]
        wanted = np.linspace(begin, end, count)
    else:
        wanted = (selection.first + np.arange(count)) / selection.rate
    halfway = (times[:-1] + times[1:]) / 2
    return np.searchsorted(halfway, wanted + _TIE, side="right").clip(max=last).tolist()


def frames_available(info: ClipInfo, rate: Rate) -> int:
    """How many frames at this rate a clip has."""
    if rate == SPREAD:
        return info.frames
    return max(math.ceil(((info.last + info.seconds) / 2 - _TIE) * rate), 1)


def read_frames(reader: decord.VideoReader, indices: list[int], hidden: int) -> Iterator[np.ndarray]:
    """Decodes frames: uint8 [h, w, C] for each index; the indices do not fall.

    Only ever forward, and never over a key frame at once: there decord seeks, which gives wrong frames where a group of
    pictures is open (the default of x265) or the container has no presentation times (AVI with B-frames).

    Args:
        hidden: as `frame_times` gives it; with an edit list decord's own count of frames is off, so each is read.
    """
    key_frames = [] if hidden else reader.get_key_indices()
    position, frame = 0, np.empty(0)
    for index in indices:
        while position < index:
            beyond = bisect.bisect_right(key_frames, position)
            limit = min(index, key_frames[beyond] - 1 if beyond < len(key_frames) else index)
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
    """Decodes what a view takes of a clip: uint8 [F, H, W, C], channels last as decoders give them.

    Args:
        out: written to where given.

    Raises:
        ClipError: unreadable, or broken inside.
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
        raise ClipError("is damaged: it has frames that cannot be decoded, or fewer than its header says") from error
    return out


def load_image(path: Path, resolution: Resolution, mode: str) -> torch.Tensor:
    """Reads an image at the training resolution: uint8 [H, W, C].

    Turned as its EXIF data say, 16 bits scaled to 8, transparency laid on white. Raises ClipError where it cannot be
    read.
    """
    pixels = torch.from_numpy(_read_image(path)).movedim(-1, 0)
    return resize(pixels, resolution, mode).movedim(0, -1)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image as it is shown. Decodes all of it; raises ClipError where it cannot be read."""
    height, width, _ = _read_image(path).shape
    return height, width


def _read_image(path: Path) -> np.ndarray:
    """uint8 [h, w, C]."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):
                image = Image.fromarray(
                    (np.array(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)
                )
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except Exception as error:
        raise ClipError("cannot be read as an image") from error


def resize(frames: torch.Tensor, resolution: Resolution, mode: str) -> torch.Tensor:
    """uint8 [..., C, h, w] -> uint8 [..., C, H, W], antialiased bilinear.

    `stretch` changes the aspect ratio where it differs; `crop` scales until the frame is covered and cuts the centre.
    """
    target = [resolution.height, resolution.width]
    if mode == "crop":
        height, width = frames.shape[-2:]
        scale = max(resolution.height / height, resolution.width / width)
        covering = [max(round(height * scale), resolution.height), max(round(width * scale), resolution.width)]
        return transforms.center_crop(transforms.resize(frames, covering, antialias=True), target)
    return transforms.resize(frames, target, antialias=True)


def stretch(info: ClipInfo, resolution: Resolution) -> float:
    """How far `stretch` distorts a clip: 0.05 where one side is drawn out by 5 % against the other."""
    ratio = (info.width / info.height) / (resolution.width / resolution.height)
    return max(ratio, 1 / ratio) - 1


def cropped(info: ClipInfo, resolution: Resolution) -> float:
    """The share of the picture that `crop` cuts off."""
    return 1 - 1 / (1 + stretch(info, resolution))

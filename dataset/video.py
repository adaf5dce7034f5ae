"""Clips and images to pixels: probe, choose frames by time, decode, resize. Pure functions.

Legend: F frames, C channels (RGB), H W height and width in pixels.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import decord
import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as transforms

# Part of every cache key: raise it whenever the same file could give other pixels than before.
PIXELS_VERSION = 1
# Seconds. Containers round time stamps; a frame exactly between two goes to the later one all the same.
_TIE = 1e-4

decord.logging.set_level(decord.logging.FATAL)  # faults are reported by clip, in sentences


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class ClipInfo:
    """What a clip's container says of it; `fps` is the average."""

    frames: int
    fps: float
    seconds: float
    height: int
    width: int


class ClipError(Exception):
    """A clip that cannot be used, with the reason."""


def open_clip(path: Path) -> decord.VideoReader:
    """Raises ClipError where decord cannot open the file as a video."""
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
    except Exception as error:
        raise ClipError("cannot be read as a video") from error
    if len(reader) == 0:
        raise ClipError("has no frames")
    return reader


def frame_times(reader: decord.VideoReader) -> np.ndarray:
    """When each frame appears, and when the last one ends: float64 [F + 1], seconds from the first frame."""
    spans = reader.get_frame_timestamp(np.arange(len(reader))).astype(np.float64)
    times = np.append(spans[:, 0], spans[-1, 1]) - spans[0, 0]
    if np.all(np.diff(times) > 0):
        return times
    return np.arange(len(reader) + 1) / float(reader.get_avg_fps())  # a container without usable time stamps


def probe(path: Path) -> tuple[ClipInfo, np.ndarray]:
    """Reads a clip's length, rate and size, and its frame times. Raises ClipError."""
    reader = open_clip(path)
    try:
        height, width = reader[0].shape[:2]
        times = frame_times(reader)
    except Exception as error:
        raise ClipError("is damaged: its first frame cannot be decoded") from error
    return ClipInfo(len(reader), len(reader) / times[-1], times[-1], height, width), times


def choose_frames(times: np.ndarray, count: int, fps: float) -> list[int]:
    """Indices of the `count` frames that show the clip from its start at `fps` frames a second.

    Frame i of the sample is the source frame nearest in time to i / fps, so that motion keeps its speed whatever the
    rate of the source, be it constant or not; a source slower than `fps` repeats frames.

    Args:
        times: as `frame_times` gives them.

    Raises:
        ClipError: the clip is too short.
    """
    if count > frames_available(times, fps):
        raise ClipError(
            f"is too short: its {len(times) - 1} frames are {times[-1]:.2f} s, but {count} frames at {fps:g} fps take "
            f"{count / fps:.2f} s; use a longer clip, fewer frames in --train_resolution, or a higher --fps"
        )
    halfway = (times[:-1] + times[1:]) / 2
    return np.searchsorted(halfway, np.arange(count) / fps + _TIE, side="right").tolist()


def frames_available(times: np.ndarray, fps: float) -> int:
    """How many frames `choose_frames` can give."""
    return math.ceil(((times[-2] + times[-1]) / 2 - _TIE) * fps)


def decode(path: Path, resolution: Resolution, fps: float, mode: str) -> torch.Tensor:
    """Decodes the chosen frames of a clip at the training resolution: uint8 [F, C, H, W].

    Raises:
        ClipError: unreadable, too short, or broken inside.
    """
    reader = open_clip(path)
    try:
        times = frame_times(reader)
    except Exception as error:
        raise ClipError("is damaged: it has no frame times") from error
    indices = choose_frames(times, resolution.frames, fps)
    try:
        frames = reader.get_batch(indices).asnumpy()
    except Exception as error:
        raise ClipError("is damaged: its frames cannot be decoded") from error
    return resize(torch.from_numpy(frames).movedim(-1, 1), resolution, mode)


def load_image(path: Path, resolution: Resolution, mode: str) -> torch.Tensor:
    """Reads an image at the training resolution: uint8 [C, H, W].

    Turned as its EXIF data say, 16 bits scaled to 8, transparency laid on white. Raises ClipError where it cannot be
    read.
    """
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
            pixels = np.array(image.convert("RGB"))
    except Exception as error:
        raise ClipError("cannot be read as an image") from error
    return resize(torch.from_numpy(pixels).movedim(-1, 0), resolution, mode)


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


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 [-1, 1], as the pipelines' `VideoProcessor` does."""
    return pixels.float() / 127.5 - 1.0


def stretch(info: ClipInfo, resolution: Resolution) -> float:
    """How far `stretch` distorts a clip: 0.05 where one side is drawn out by 5 % against the other."""
    ratio = (info.width / info.height) / (resolution.width / resolution.height)
    return max(ratio, 1 / ratio) - 1

"""Choice of frames by time, resizing, and decoding of real files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import decord
import numpy as np
import pytest
import torch
from imageio.v3 import imwrite
from PIL import Image

from dataset.video import (
    SPREAD,
    ClipError,
    ClipInfo,
    Resolution,
    View,
    choose_frames,
    decode,
    frames_available,
    load_image,
    probe,
    resize,
    stretch,
)


def times(frames: int, fps: float) -> np.ndarray:
    return np.arange(frames + 1) / fps


def view(frames: int, rate=8.0, first=0, span=None, size=(64, 96), mode="stretch") -> View:
    return View(Resolution(frames, *size), rate, mode, first, span or frames)


def info(frames: int, fps: float, height=64, width=96) -> ClipInfo:
    return ClipInfo(frames, frames / fps, (frames - 1) / fps, height, width)


def test_frames_follow_the_clock():
    assert choose_frames(times(49, 8), view(49)) == list(range(49))
    # 30 fps to 8 fps: every 3.75th frame, six seconds for 49 frames
    chosen = choose_frames(times(300, 30), view(49))
    assert chosen[:5] == [0, 4, 8, 11, 15] and chosen[-1] == 180
    assert choose_frames(times(10, 8), view(9, 16.0)) == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert choose_frames(times(300, 30), view(5, first=8)) == [30, 34, 38, 41, 45]
    assert choose_frames(times(4, 8), view(9)) == [0, 1, 2, 3, 3, 3, 3, 3, 3]  # padded
    assert [frames_available(info(49, rate), rate) for rate in (8, 24, 30000 / 1001, 30)] == [49] * 4
    # the true rate of "30 fps" television material must not run out of frames at the end
    assert choose_frames(times(49, 30000 / 1001), view(49, 30.0))[-1] == 48


def test_frames_spread_over_the_whole_clip():
    assert choose_frames(times(97, 30), view(49, SPREAD, span=97)) == list(range(0, 97, 2))
    assert choose_frames(times(60, 24), view(3, SPREAD, first=20, span=20)) == [20, 30, 39]


def test_frames_follow_the_clock_at_a_variable_rate():
    """A second at 24 fps, then one at 6 fps: at 6 fps both give as many frames."""
    starts = np.concatenate([np.arange(24) / 24, 1 + np.arange(7) / 6])
    assert choose_frames(starts, view(12, 6.0)) == [0, 4, 8, 12, 16, 20, 24, 25, 26, 27, 28, 29]


def test_images_are_seen_as_a_viewer_shows_them(tmp_path: Path):
    size = Resolution(1, 16, 32)
    turned = Image.new("RGB", (16, 32))
    turned.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: what was above is on the right
    turned.save(tmp_path / "turned.png", exif=exif)
    pixels = load_image(tmp_path / "turned.png", size, "stretch")
    assert pixels[:, :16].max() == 0 and pixels[:, 16:].min() == 255
    Image.fromarray(np.full((16, 32), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png", size, "stretch").unique().tolist() == [128]
    Image.new("RGBA", (32, 16), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png", size, "stretch").min() == 255


def test_decoded_frames_are_the_readers(tmp_path: Path):
    path = tmp_path / "noise.mp4"
    imwrite(path, np.random.default_rng(0).integers(0, 255, (30, 64, 96, 3), np.uint8), fps=24)
    found = probe(path)
    assert (found.frames, round(found.fps), found.height, found.width) == (30, 24, 64, 96)
    pixels = decode(path, view(9))
    expected = decord.VideoReader(str(path)).get_batch(range(0, 27, 3)).asnumpy()
    assert pixels.shape == (9, 64, 96, 3)
    assert np.array_equal(pixels.numpy(), expected)
    mirrored = decode(path, replace(view(9), flipped=True))
    assert torch.equal(mirrored, pixels.flip(2))


def test_resize_modes():
    frame = torch.zeros(1, 3, 100, 300, dtype=torch.uint8)
    frame[..., 100:200] = 255  # the middle third is white
    target = Resolution(1, 64, 64)
    assert resize(frame, target, "crop")[..., 1:-1].min() == 255  # nothing but the middle is left
    stretched = resize(frame, target, "stretch")
    assert stretched.shape == (1, 3, 64, 64)
    assert stretched[..., :18].max() == 0 and stretched[..., 26:38].min() == 255
    assert stretch(info(1, 1, 480, 720), Resolution(1, 480, 720)) == 0
    assert round(stretch(info(1, 1, 480, 720), Resolution(1, 480, 480)), 3) == 0.5


@pytest.mark.parametrize("content", [b"", b"not a video", b"\0" * 5000])
def test_what_is_no_video_is_told(tmp_path: Path, content: bytes):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(ClipError):
        probe(path)

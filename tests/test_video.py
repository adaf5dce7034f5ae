"""Choice of frames by time, resizing, and decoding of real files."""

from __future__ import annotations

from pathlib import Path

import decord
import numpy as np
import pytest
import torch
from imageio.v3 import imwrite

from dataset.video import ClipError, ClipInfo, Resolution, choose_frames, decode, probe, resize, stretch


def clip_info(frames: int, fps: float) -> ClipInfo:
    return ClipInfo(frames, fps, 480, 720)


def test_frames_follow_the_clock():
    assert choose_frames(clip_info(49, 8), 49, 8) == list(range(49))
    # 30 fps to 8 fps: every 3.75th frame, six seconds for 49 frames
    chosen = choose_frames(clip_info(300, 30), 49, 8)
    assert chosen[:5] == [0, 4, 8, 11, 15] and chosen[-1] == 180
    assert choose_frames(clip_info(10, 8), 9, 16) == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    # the true rate of "30 fps" television material must not run out of frames at the end
    assert choose_frames(clip_info(49, 30000 / 1001), 49, 30)[-1] == 48


def test_short_clips_are_refused_with_their_length():
    with pytest.raises(ClipError, match=r"48 frames at 8 fps are 6\.00 s, but 49 frames at 8 fps take 6\.12 s"):
        choose_frames(clip_info(48, 8), 49, 8)


def test_decoded_frames_are_the_readers(tmp_path: Path):
    path = tmp_path / "noise.mp4"
    imwrite(path, np.random.default_rng(0).integers(0, 255, (30, 64, 96, 3), np.uint8), fps=24)
    info = probe(path)
    assert (info.frames, round(info.fps), info.height, info.width) == (30, 24, 64, 96)
    pixels = decode(path, Resolution(9, 64, 96), 8, "stretch")
    expected = decord.VideoReader(str(path)).get_batch(range(0, 27, 3)).asnumpy()
    assert pixels.shape == (9, 3, 64, 96)
    assert np.array_equal(((pixels + 1) * 127.5).round().movedim(1, -1).numpy(), expected)


def test_resize_modes():
    frame = torch.zeros(1, 3, 100, 300, dtype=torch.uint8)
    frame[..., 100:200] = 255  # the middle third is white
    target = Resolution(1, 64, 64)
    assert resize(frame, target, "crop")[..., 1:-1].min() == 255  # nothing but the middle is left
    stretched = resize(frame, target, "stretch")
    assert stretched.shape == (1, 3, 64, 64)
    assert stretched[..., :18].max() == 0 and stretched[..., 26:38].min() == 255
    assert stretch(clip_info(1, 1), Resolution(1, 480, 720)) == 0
    assert round(stretch(clip_info(1, 1), Resolution(1, 480, 480)), 3) == 0.5


@pytest.mark.parametrize("content", [b"", b"not a video", b"\0" * 5000])
def test_what_is_no_video_is_told(tmp_path: Path, content: bytes):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(ClipError):
        probe(path)

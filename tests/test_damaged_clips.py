"""Clips that were cut short, that lost frames, or whose times are below zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataset.containers import ClipError
from dataset.video import count_lost_frames, probe
from tests.test_containers import AV1, H264, MPEG2, ffmpeg, write_clip


@pytest.mark.parametrize("name", ["a.mkv", "a.flv", "a.avi", "av1.mp4"])
def test_clip_that_ends_before_its_stated_length_is_refused(tmp_path: Path, name: str):
    sound = ("-f", "lavfi", "-i", "sine=duration=4")  # longer than the video
    write_clip(tmp_path / "video.mp4", AV1 if "av1" in name else H264)
    path = tmp_path / name
    ffmpeg("-i", tmp_path / "video.mp4", *sound, "-c:v", "copy", "-c:a", "mp3", "-movflags", "faststart", path)
    assert probe(path).frames == 60
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(ClipError, match=r"is cut short: its header states \d.* it ends after \d.* s; ffmpeg"):
        probe(path)


@pytest.mark.parametrize(("name", "options"), [("a.ts", MPEG2), ("a.flv", H264)])
def test_frames_that_are_missing_from_a_constant_rate_are_counted(tmp_path: Path, name: str, options: tuple):
    path = tmp_path / name
    write_clip(path, options)
    assert probe(path).lost_frames == 0
    content = path.read_bytes()
    begin, length = len(content) // 2 // 188 * 188, 6 * 188
    path.write_bytes(content[:begin] + bytes(length) + content[begin + length :])
    info = probe(path)
    assert info.lost_frames == 60 - info.frames > 0


def test_variable_rates_lack_no_frames():
    rng = np.random.default_rng(0)
    assert count_lost_frames(np.arange(61) / 25) == 0
    assert count_lost_frames(np.cumsum(rng.choice([0.04, 0.08], 60, p=[0.7, 0.3]))) == 0  # dropped everywhere
    assert count_lost_frames(np.cumsum(rng.uniform(0.03, 0.09, 60))) == 0
    assert count_lost_frames(np.delete(np.round(np.arange(61) / 30, 3), [20, 21, 40])) == 3


def test_times_below_zero_are_an_error(tmp_path: Path):
    write_clip(tmp_path / "whole.mp4", H264)
    path = tmp_path / "clip.mkv"
    ffmpeg("-i", tmp_path / "whole.mp4", "-c", "copy", "-avoid_negative_ts", "disabled", "-output_ts_offset", -1, path)
    with pytest.raises(ClipError, match=r"has frame times below zero; ffmpeg .* converts it"):
        probe(path)

"""Choice of the bucket of a clip, and of the windows sampled from it."""

from __future__ import annotations

import pytest

from dataset.bucketing import SamplingPolicy, choose_bucket, select_clip_samples, windows
from dataset.file_index import FileFacts
from dataset.manifest import Sample
from dataset.video import NATIVE_STRIDE, ClipInfo, Resolution

WIDE, TALL, LONG = Resolution(49, 480, 720), Resolution(49, 720, 480), Resolution(81, 480, 720)


def info(seconds: float, height: int, width: int, fps: float = 30.0) -> ClipInfo:
    frames = round(seconds * fps)
    return ClipInfo(frames, frames / fps, (frames - 1) / fps, height, width)


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        (info(7, 480, 720), WIDE),
        (info(11, 480, 720), LONG),
        (info(7, 1920, 1080), TALL),
        (info(60, 1080, 1920), LONG),
        (info(12, 1280, 720), TALL),  # losing half of the frame is worse than losing half of the time
        (info(5, 480, 720), None),
    ],
)
def test_bucket_preserves_most_of_the_clip(clip, expected):
    assert choose_bucket(clip, SamplingPolicy((WIDE, TALL, LONG), 8.0, "crop")) == expected


def test_equal_aspect_ratios_prefer_least_enlargement_then_largest_size():
    sizes = tuple(Resolution(49, height, height * 3 // 2) for height in (320, 480, 640))
    policy = SamplingPolicy(sizes, 8.0, "crop")
    for height, expected in ((240, 320), (500, 480), (1280, 640)):
        assert choose_bucket(info(7, height, height * 3 // 2), policy) == Resolution(49, expected, expected * 3 // 2)


def test_windows_cover_the_clip_without_overlap():
    policy = SamplingPolicy((WIDE,), 8.0, "crop", clips_per_video=3)
    assert windows(info(30, 480, 720), WIDE, policy) == [(0, 49), (95, 49), (191, 49)]
    assert windows(info(13, 480, 720), WIDE, policy) == [(0, 49), (55, 49)]
    assert windows(info(7, 480, 720), WIDE, policy) == [(0, 49)]
    spread = SamplingPolicy((WIDE,), NATIVE_STRIDE, "crop", clips_per_video=3)
    assert windows(info(10, 480, 720), WIDE, spread) == [(0, 100), (100, 100), (200, 100)]


def test_short_clips_are_reported_or_padded():
    samples = [Sample(4, "a", "short.mp4", None), Sample(5, "b", "long.mp4", None)]
    facts = {
        "short.mp4": FileFacts(b"x", info(6, 480, 720, 8), 0),
        "long.mp4": FileFacts(b"y", info(9, 480, 720, 8), 0),
    }
    clip_samples, errors = select_clip_samples(samples, facts, SamplingPolicy((LONG, WIDE), 8.0, "crop"))
    assert [clip_sample.sample.line for clip_sample in clip_samples] == [5]
    assert len(errors) == 1 and errors[0].startswith(
        "short.mp4 (line 4) is too short: its 48 frames are 6.00 s, but 49 frames at 8 fps take 6.12 s"
    )
    clip_samples, errors = select_clip_samples(
        samples, facts, SamplingPolicy((LONG, WIDE), 8.0, "crop", pad_short_clips=True)
    )
    assert [clip_sample.resolution for clip_sample in clip_samples] == [WIDE, WIDE] and not errors

"""Describes the clips and images of a run: sizes, buckets, how much of them is used, and what looks wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from dataset.bucketing import ClipSample
from dataset.file_index import FileFacts
from dataset.stream_info import DEINTERLACE
from dataset.video import NATIVE_STRIDE, ClipInfo, Rate, Resolution, cropped, stretch

# Clips that are stretched or cropped by more than this share are reported.
REPORTED_CHANGE = 0.03


@dataclass
class _BucketStats:
    """Statistics of the clips or the images of one bucket, or of all condition images.

    A change is the share by which a clip is cropped or stretched.

    Attributes:
        num_changed: number of clips with a change above `REPORTED_CHANGE`.
        total_change: sum of the changes of all clips.
        worst: largest change, and the path of its clip.
    """

    num_samples: int = 0
    num_clips: int = 0
    seconds: float = 0.0
    num_changed: int = 0
    total_change: float = 0.0
    worst: tuple[float, str] = (0.0, "")

    def count(self, info: ClipInfo, resolution: Resolution, mode: str, path: str) -> None:
        """Adds a clip or an image."""
        change = (cropped if mode == "crop" else stretch)(info, resolution)
        self.num_clips += 1
        self.num_changed += change > REPORTED_CHANGE
        self.total_change += change
        self.worst = max(self.worst, (change, path))


def summarize(clip_samples: list[ClipSample], facts: Mapping[str, FileFacts], mode: str, rate: Rate) -> list[str]:
    """Returns log lines that describe the clips and images, and how much of them each bucket uses.

    Args:
        clip_samples: samples of one clip must be adjacent.
        mode: resize mode.
        rate: sampling rate.
    """
    kinds: dict[bool, list[ClipSample]] = {False: [], True: []}
    for clip_sample in clip_samples:
        kinds[clip_sample.is_image].append(clip_sample)
    clips, images = kinds[False], kinds[True]
    lines = _summarize_clips(clips, facts, mode, rate) if clips else []
    lines += _summarize_images(images, facts, mode) if images else []
    lines += _condition_images(clip_samples, facts, mode)
    lines += _clip_notes(clips, facts, rate)
    if images and not clips:
        lines.append(
            "Note: all samples are images. A model that is trained on images alone makes static videos; mix clips in."
        )
    return lines


def _first_samples(clip_samples: list[ClipSample]) -> list[ClipSample]:
    """Returns the first sample of each clip."""
    return [first for _, (first, *_) in groupby(clip_samples, lambda clip_sample: id(clip_sample.sample))]


def _summarize_clips(clips: list[ClipSample], facts: Mapping[str, FileFacts], mode: str, rate: Rate) -> list[str]:
    stats_by_bucket: defaultdict[Resolution, _BucketStats] = defaultdict(_BucketStats)
    sizes: Counter[str] = Counter()
    for clip_sample in clips:
        stats_by_bucket[clip_sample.resolution].num_samples += 1
    for clip_sample in _first_samples(clips):
        sample, stats = clip_sample.sample, stats_by_bucket[clip_sample.resolution]
        info = facts[sample.clip].info_of(sample.part)
        sizes[f"{info.width}x{info.height} at {info.fps:.4g} fps"] += 1
        stats.seconds += info.seconds
        stats.count(info, clip_sample.resolution, mode, sample.clip)
    total_seconds = sum(stats.seconds for stats in stats_by_bucket.values())
    lines = [f"Clips: {_list_sizes(sizes)}; {total_seconds:.0f} s in total"]
    for bucket, stats in stats_by_bucket.items():
        used = 1.0 if rate == NATIVE_STRIDE else min(stats.num_samples * bucket.frames / rate / stats.seconds, 1)
        lines.append(
            f"  {bucket}: {stats.num_samples} samples from {stats.num_clips} clips, {used:.0%} of their duration; "
            + _describe_change(stats, mode)
        )
    return lines


def _summarize_images(images: list[ClipSample], facts: Mapping[str, FileFacts], mode: str) -> list[str]:
    stats_by_bucket: defaultdict[Resolution, _BucketStats] = defaultdict(_BucketStats)
    sizes: Counter[str] = Counter()
    for clip_sample in images:
        info = facts[clip_sample.sample.clip].info
        sizes[f"{info.width}x{info.height}"] += 1
        stats_by_bucket[clip_sample.resolution].count(info, clip_sample.resolution, mode, clip_sample.sample.clip)
    return [f"Images: {_list_sizes(sizes)}"] + [
        f"  {bucket}: {stats.num_clips} images; {_describe_change(stats, mode)}"
        for bucket, stats in stats_by_bucket.items()
    ]


def _condition_images(clip_samples: list[ClipSample], facts: Mapping[str, FileFacts], mode: str) -> list[str]:
    stats = _BucketStats()
    for clip_sample in _first_samples(clip_samples):
        if (image := clip_sample.sample.image) is not None:
            stats.count(facts[image].info, clip_sample.resolution, mode, image)
    return [f"  Condition images: {stats.num_clips}; {_describe_change(stats, mode)}"] if stats.num_clips else []


def _clip_notes(clips: list[ClipSample], facts: Mapping[str, FileFacts], rate: Rate) -> list[str]:
    """Returns notes on clips that are interlaced, lack frames or have a low rate."""
    samples = [first.sample for first in _first_samples(clips)]
    infos = [(sample.clip, facts[sample.clip].info_of(sample.part)) for sample in samples]
    interlaced = [path for path, info in infos if info.interlaced]
    lossy = [
        f"{path} ({info.lost_frames} of {info.frames + info.lost_frames})" for path, info in infos if info.lost_frames
    ]
    num_slower = sum(info.fps < rate - 0.5 for _, info in infos) if rate != NATIVE_STRIDE else 0
    lines = []
    if interlaced:
        lines.append(
            f"Note: {len(interlaced)} of {len(infos)} clips are interlaced, such as {interlaced[0]}. The model "
            f"would learn combed edges; deinterlace the clips: {DEINTERLACE}"
        )
    if lossy:
        lines.append(
            f"Note: {len(lossy)} of {len(infos)} clips lack frames, such as {lossy[0]}: their times have gaps. "
            "The motion jumps there; after damage, pictures may be wrong up to the next key frame."
        )
    if num_slower:
        lines.append(
            f"Note: {num_slower} of {len(infos)} clips have a lower frame rate than {rate:g} fps, so frames repeat."
        )
    return lines


def _list_sizes(sizes: Counter[str]) -> str:
    listed = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(3))
    return listed + (f" and {len(sizes) - 3} more sizes" if len(sizes) > 3 else "")


def _describe_change(stats: _BucketStats, mode: str) -> str:
    verb = "cropped" if mode == "crop" else "stretched"
    if not stats.num_changed:
        return f"none {verb} by more than {REPORTED_CHANGE:.0%}"
    amount, path = stats.worst
    advice = "" if verb == "cropped" else "; --resize_mode crop keeps the aspect ratio"
    mean = stats.total_change / stats.num_clips
    return f"{stats.num_changed} {verb}, by {mean:.0%} on average, at most {amount:.0%} ({path}){advice}"

"""Scans every clip and image before encoding, reports unusable files, and summarizes the clips."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dataset.bucketing import ClipSample, SamplingPolicy, select_clip_samples
from dataset.containers import ClipError
from dataset.file_index import FileFacts, FileIndex, digest_file, stat_signature
from dataset.images import check_is_still, image_size, is_image_file
from dataset.manifest import Sample
from dataset.part_frames import probe_parts
from dataset.parts import Part
from dataset.stream_info import DEINTERLACE
from dataset.video import NATIVE_STRIDE, ClipInfo, Rate, Resolution, cropped, probe, stretch
from dataset.worker_pool import Failure, run_in_workers

# Clips that are stretched or cropped by more than this share are reported.
REPORTED_CHANGE = 0.03
_SAVE_INTERVAL_S = 60


@dataclass(frozen=True)
class ScanResult:
    """The clip samples for training and validation.

    Attributes:
        facts: path -> facts, for every file of the samples.
        unusable: an error for each line of the data folders that cannot be used.
    """

    samples: list[ClipSample]
    validation: list[ClipSample]
    facts: dict[str, FileFacts]
    unusable: list[str]


def scan_and_sample(
    samples: list[Sample],
    validation: list[Sample],
    indexes: Sequence[tuple[FileIndex, list[Sample], bool]],
    policy: SamplingPolicy,
    num_workers: int,
    timeout: float,
) -> ScanResult:
    """Scans all files and selects clip samples; a validation clip gives one sample.

    Args:
        indexes: each index, the samples whose files it holds, and whether to write it.
        num_workers, timeout: as in `scan_files`.
    """
    facts: dict[str, FileFacts] = {}
    file_errors: dict[str, str] = {}
    for index, part, save_index in indexes:
        found, errors = scan_files(part, index, num_workers, timeout, save_index)
        for path, file in found.items():  # two folders may name different parts of one file
            facts[path] = (
                replace(file, parts={**(facts[path].parts or {}), **(file.parts or {})}) if path in facts else file
            )
        file_errors |= errors
    unusable: list[str] = []
    clips = {sample.video for sample in samples + validation}

    def select(part: list[Sample], policy: SamplingPolicy) -> list[ClipSample]:
        readable, unreadable_errors = split_readable(part, file_errors, clips)
        clip_samples, length_errors = select_clip_samples(readable, facts, policy)
        unusable.extend(unreadable_errors + length_errors)
        return clip_samples

    return ScanResult(select(samples, policy), select(validation, replace(policy, clips_per_video=1)), facts, unusable)


def scan_files(
    samples: list[Sample],
    index: FileIndex,
    num_workers: int,
    timeout: float,
    save_index: bool,
) -> tuple[dict[str, FileFacts], dict[str, str]]:
    """Scans new and changed files in worker processes and takes all others from the index.

    Args:
        timeout: maximum number of seconds per file.
        save_index: whether to write the updated index.

    Returns:
        Path -> facts of each readable file, and path -> error of each other file.
    """
    wanted = wanted_parts(samples)
    images = (path for sample in samples for path in (sample.image, sample.last_image) if path is not None)
    is_condition = dict.fromkeys(images, True)
    is_condition |= {sample.video: False for sample in samples if sample.video is not None}
    facts, errors, new = {}, {}, []
    for path in is_condition:
        known, is_current = index.get(path)
        missing = [part for part in wanted[path] if known is None or part not in (known.parts or {})]
        if known is not None and is_current and not missing:
            facts[path] = known
        else:
            new.append(_ScanJob(path, is_condition[path], known, is_current, missing))
    scans = run_in_workers(_scan_file, new, num_workers, timeout)
    last_save = time.monotonic()
    for scan in tqdm(scans, "Scanning files", len(new), unit="file", delay=3, leave=False):
        path = scan.job.path
        if isinstance(scan.outcome, Failure):
            errors[path] = scan.outcome.reason
            continue
        facts[path] = scan.outcome
        index.add(path, facts[path])
        if save_index and time.monotonic() - last_save > _SAVE_INTERVAL_S:
            index.save()
            last_save = time.monotonic()
    if save_index:
        index.save()
    return facts, errors


def wanted_parts(samples: list[Sample]) -> defaultdict[str, dict[Part, None]]:
    """Returns the parts of each clip that the samples name, in their order."""
    parts: defaultdict[str, dict[Part, None]] = defaultdict(dict)
    for sample in samples:
        if sample.video is not None and sample.part is not None:
            parts[sample.video][sample.part] = None
    return parts


@dataclass(frozen=True)
class _ScanJob:
    """A file to scan.

    Attributes:
        is_condition: whether the file is only listed as a condition image.
        known: facts of an unchanged file; None if the file is new or has changed.
        is_current: whether this version of the scan found these facts, so that only parts are missing.
        parts: parts of the clip to find.
    """

    path: str
    is_condition: bool
    known: FileFacts | None
    is_current: bool
    parts: list[Part]


def _scan_file(job: _ScanJob, buffer: Any) -> FileFacts:
    """Scans one file in a worker process."""
    path, known = Path(job.path), job.known
    if not os.access(path, os.R_OK, effective_ids=True):
        raise ClipError("cannot be read: this user has no permission")
    signature = stat_signature(job.path)
    if known is not None and job.is_current:
        info = known.info
    elif job.is_condition or is_image_file(job.path):
        if not job.is_condition:
            check_is_still(path)
        height, width = image_size(path)
        info = ClipInfo(1, 1.0, 0.0, height, width)
    else:
        info = probe(path, known.info if known else None)
    parts = dict(known.parts or {}) if known is not None and job.is_current else {}
    if job.parts and not is_image_file(job.path):
        parts |= probe_parts(path, info, job.parts)
    return FileFacts(known.digest if known else digest_file(path), info, signature, parts or None)


def split_readable(
    samples: list[Sample], file_errors: Mapping[str, str], clips: Collection[str | None]
) -> tuple[list[Sample], list[str]]:
    """Returns the samples whose files can all be used, and an error for each file that cannot.

    Args:
        clips: paths that are listed as clips, and so have no place among the images.
    """
    readable, errors = [], []
    for sample in samples:
        unusable = [f"{path} ({sample.place}) {file_errors[path]}." for path in sample.files if path in file_errors]
        if sample.image in clips and sample.image is not None and not is_image_file(sample.image) and not unusable:
            unusable = [f"{sample.image} ({sample.place}) is listed as an image, but is a video."]
        errors += unusable
        if not unusable:
            readable.append(sample)
    return readable, errors


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

"""Scans every clip and image before encoding, and reports unusable files."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
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
from dataset.video import ClipInfo, probe
from dataset.worker_pool import Failure, run_in_workers

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

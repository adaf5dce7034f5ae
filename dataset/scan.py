"""A look at every clip and image before anything is encoded: what cannot be used, and what is worth a word."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dataset.bucketing import ClipSample, SamplingPolicy, select_clip_samples
from dataset.file_index import FileFacts, FileIndex, digest_file, stat_signature
from dataset.manifest import Sample
from dataset.video import SPREAD, ClipInfo, Rate, Resolution, cropped, image_size, probe, stretch
from dataset.worker_pool import Failure, run_in_workers

# A clip drawn out by more than this is worth a word.
STRETCH_WORTH_A_WORD = 0.03
# Seconds between writing down what was found so far.
_SAVE_EVERY = 60


@dataclass(frozen=True)
class ScanResult:
    """What there is to train on and to validate with.

    Attributes:
        facts: of every file that these name.
        bad: a sentence for each line of the data folders that cannot be used.
    """

    samples: list[ClipSample]
    validation: list[ClipSample]
    facts: dict[str, FileFacts]
    bad: list[str]


def scan_and_sample(
    samples: list[Sample],
    validation: list[Sample],
    index: FileIndex,
    policy: SamplingPolicy,
    num_workers: int,
    timeout: float,
    saves: bool,
) -> ScanResult:
    """Looks at every file and cuts the clip_samples, one of each clip for validation. Args as of `scan_files`."""
    facts, errors = scan_files(samples + validation, index, num_workers, timeout, saves)
    bad: list[str] = []

    def clip_samples(part: list[Sample], policy: SamplingPolicy) -> list[ClipSample]:
        sound, unreadable = usable(part, errors)
        taken, too_short = select_clip_samples(sound, facts, policy)
        bad.extend(unreadable + too_short)
        return taken

    return ScanResult(
        clip_samples(samples, policy), clip_samples(validation, replace(policy, clips_per_video=1)), facts, bad
    )


def scan_files(
    samples: list[Sample],
    index: FileIndex,
    num_workers: int,
    timeout: float,
    saves: bool,
) -> tuple[dict[str, FileFacts], dict[str, str]]:
    """Looks at the files that are not in the index as they are now, in worker processes.

    Args:
        timeout: seconds a file.
        saves: whether the index is written.

    Returns:
        what is known of each usable file, and what is wrong with each of the others.
    """
    is_image = {sample.image: True for sample in samples if sample.image is not None}
    is_image |= {sample.video: False for sample in samples if sample.video is not None}
    facts, errors, new = {}, {}, []
    for path in is_image:
        known = index.get(path)
        if known is None:
            new.append(path)
        else:
            facts[path] = known
    looks = run_in_workers(_look, [(path, is_image[path]) for path in new], max(num_workers, 1), timeout)
    saved = time.monotonic()
    for done in tqdm(looks, "Looking at clips", len(new), unit="file", delay=3, leave=False):
        path = done.job[0]
        if isinstance(done.outcome, Failure):
            errors[path] = done.outcome.reason
            continue
        facts[path] = done.outcome
        index.add(path, facts[path])
        if saves and time.monotonic() - saved > _SAVE_EVERY:
            index.save()
            saved = time.monotonic()
    if saves:
        index.save()
    return facts, errors


def _look(job: tuple[str, bool], buffer: Any) -> FileFacts:
    path, is_image = Path(job[0]), job[1]
    signature = stat_signature(job[0])
    if is_image:
        height, width = image_size(path)
        info = ClipInfo(1, 1.0, 0.0, height, width)
    else:
        info = probe(path)
    return FileFacts(digest_file(path), info, signature)


def usable(samples: list[Sample], errors: Mapping[str, str]) -> tuple[list[Sample], list[str]]:
    """The samples whose files can be used, and a sentence for each that cannot."""
    sound, sentences = [], []
    for sample in samples:
        wrong = [path for path in sample.files if path in errors]
        sentences += [f"{path} (line {sample.line}) {errors[path]}." for path in wrong]
        if not wrong:
            sound.append(sample)
    return sound, sentences


@dataclass
class _Tally:
    """What goes to one bucket. `changed` is the share of a clip's picture that is cut, or by which it is stretched."""

    samples: int = 0
    clips: int = 0
    seconds: float = 0.0
    beyond: int = 0
    changed: float = 0.0
    worst: tuple[float, str] = (0.0, "")


def summary(clip_samples: list[ClipSample], facts: Mapping[str, FileFacts], mode: str, rate: Rate) -> list[str]:
    """What the clips are, and how much of them each bucket takes."""
    sizes: Counter[str] = Counter()
    tallies: defaultdict[Resolution, _Tally] = defaultdict(_Tally)
    slower, last = 0, None
    for clip_sample in clip_samples:
        sample, tally = clip_sample.sample, tallies[clip_sample.resolution]
        tally.samples += 1
        if sample is last:  # another part of the same clip
            continue
        last, info = sample, facts[sample.clip].info
        sizes[f"{info.width}x{info.height} at {info.fps:.4g} fps"] += 1
        slower += rate != SPREAD and info.fps < rate - 0.5
        changed = (cropped if mode == "crop" else stretch)(info, clip_sample.resolution)
        tally.clips += 1
        tally.seconds += info.seconds
        tally.beyond += changed > STRETCH_WORTH_A_WORD
        tally.changed += changed
        tally.worst = max(tally.worst, (changed, sample.clip))
    listed = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(3))
    more = f" and {len(sizes) - 3} more sizes" if len(sizes) > 3 else ""
    lines = [f"Clips: {listed}{more}; {sum(tally.seconds for tally in tallies.values()):.0f} s in all"]
    for bucket, tally in tallies.items():
        used = 1.0 if rate == SPREAD else min(tally.samples * bucket.frames / rate / tally.seconds, 1)
        lines.append(
            f"  {bucket}: {tally.samples} samples of {tally.clips} clips, {used:.0%} of their time; "
            + _changed(tally, "cut" if mode == "crop" else "stretched")
        )
    if slower:
        lines.append(
            f"Note: {slower} of {sizes.total()} clips have fewer than {rate:g} frames a second; frames repeat."
        )
    return lines


def _changed(tally: _Tally, done: str) -> str:
    if not tally.beyond:
        return f"none {done} by more than {STRETCH_WORTH_A_WORD:.0%}"
    amount, path = tally.worst
    advice = "" if done == "cut" else "; --resize_mode crop keeps the aspect ratio"
    mean = tally.changed / tally.clips
    return f"{tally.beyond} {done}, by {mean:.0%} on average, the worst by {amount:.0%} ({path}){advice}"

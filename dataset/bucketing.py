"""Which part of each clip is trained on, and at which of the training resolutions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from dataset.file_index import FileFacts, combine_signatures
from dataset.manifest import Sample
from dataset.video import SPREAD, ClipInfo, FrameSelection, Rate, Resolution, frames_available, stretch


@dataclass(frozen=True)
class SamplingPolicy:
    """How clip_samples are cut.

    Attributes:
        buckets: the training resolutions.
        clips_per_video: the most clip_samples of a clip; they do not overlap.
        pads: a clip that is too short for every bucket repeats its last frame.
    """

    buckets: tuple[Resolution, ...]
    rate: Rate
    mode: str
    clips_per_video: int = 1
    pad_short_clips: bool = False


@dataclass(frozen=True, slots=True)
class ClipSample:
    """A sample of the training: a line of the data folder, and what is taken of its clip.

    Attributes:
        signature: of the files as they were when they were looked at.
    """

    sample: Sample
    selection: FrameSelection
    signature: int

    @property
    def resolution(self) -> Resolution:
        return self.selection.resolution

    def selections(self, flip: bool) -> Iterator[FrameSelection]:
        """What is encoded of it: with `flip` the mirror image too."""
        yield self.selection
        if flip:
            yield replace(self.selection, flipped=True)

    def __str__(self) -> str:
        return f"{self.sample}, from frame {self.selection.first}" if self.selection.first else str(self.sample)


def select_clip_samples(
    samples: list[Sample], facts: Mapping[str, FileFacts], policy: SamplingPolicy
) -> tuple[list[ClipSample], list[str]]:
    """Excerpts of all samples, and a sentence for each clip that is too short.

    Args:
        facts: of every file that the samples name.
    """
    clip_samples, errors = [], []
    for sample in samples:
        source = sample.video or sample.image
        if source is None:  # a validation prompt
            clip_samples.append(ClipSample(sample, _view(policy, policy.buckets[0], 0, policy.buckets[0].frames), 0))
            continue
        info = facts[source].info
        bucket = choose_bucket(info, policy if sample.video else replace(policy, pad_short_clips=True))
        if bucket is None:
            errors.append(f"{source} (line {sample.line}) {_too_short(info, policy)}.")
            continue
        signature = combine_signatures(facts[path].signature for path in sample.files)
        clip_samples += [
            ClipSample(sample, _view(policy, bucket, *window), signature) for window in windows(info, bucket, policy)
        ]
    return clip_samples, errors


def choose_bucket(info: ClipInfo, policy: SamplingPolicy) -> Resolution | None:
    """The bucket that keeps most of a clip: share of its picture times share of its time.

    Of several that keep the same, the one that enlarges the picture least, then the largest. None where the clip is too
    short for all of them.
    """
    available = frames_available(info, policy.rate)
    fitting = [bucket for bucket in policy.buckets if bucket.frames <= available]
    if not fitting and policy.pad_short_clips:
        fewest = min(bucket.frames for bucket in policy.buckets)
        fitting = [bucket for bucket in policy.buckets if bucket.frames == fewest]

    def merit(bucket: Resolution) -> tuple[float, float, int]:
        used = len(windows(info, bucket, policy)) * bucket.frames
        kept = min(used / available, 1) / (1 + stretch(info, bucket))
        enlarged = max(bucket.height / info.height, bucket.width / info.width, 1)
        return round(kept, 6), -enlarged, bucket.height * bucket.width

    return max(fitting, key=merit, default=None)


def windows(info: ClipInfo, bucket: Resolution, policy: SamplingPolicy) -> list[tuple[int, int]]:
    """(first, span), as in `FrameSelection`, of the samples of a clip: spread evenly, the first at its start."""
    available, frames = frames_available(info, policy.rate), bucket.frames
    count = max(min(policy.clips_per_video, available // frames), 1)
    if policy.rate == SPREAD:
        starts = [available * number // count for number in range(count + 1)]
        return [(start, end - start) for start, end in pairwise(starts)]
    spare = available - frames
    return [(spare * number // (count - 1) if number else 0, frames) for number in range(count)]


@lru_cache(maxsize=1024)
def _view(policy: SamplingPolicy, bucket: Resolution, first: int, span: int) -> FrameSelection:
    return FrameSelection(bucket, policy.rate, policy.mode, first, span)


def _too_short(info: ClipInfo, policy: SamplingPolicy) -> str:
    count = min(bucket.frames for bucket in policy.buckets)
    length = f"its {info.frames} frames are {info.seconds:.2f} s"
    if policy.rate == SPREAD:
        return f"is too short: {length}, but a sample has {count}; --pad_short_clips repeats the last frame"
    return (
        f"is too short: {length}, but {count} frames at {policy.rate:g} fps take {count / policy.rate:.2f} s; use a "
        "longer clip, fewer frames in --train_resolution, a higher --fps, or --pad_short_clips"
    )

"""Which part of each clip is trained on, and at which of the training resolutions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from dataset.files import FileFacts, combined
from dataset.manifest import Sample
from dataset.video import SPREAD, ClipInfo, Rate, Resolution, View, frames_available, stretch


@dataclass(frozen=True)
class Cutting:
    """How excerpts are cut.

    Attributes:
        buckets: the training resolutions.
        clips_per_video: the most excerpts of a clip; they do not overlap.
        pads: a clip that is too short for every bucket repeats its last frame.
    """

    buckets: tuple[Resolution, ...]
    rate: Rate
    mode: str
    clips_per_video: int = 1
    pads: bool = False


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A sample of the training: a line of the data folder, and what is taken of its clip.

    Attributes:
        stamp: of the files as they were when they were looked at.
    """

    sample: Sample
    view: View
    stamp: int

    @property
    def resolution(self) -> Resolution:
        return self.view.resolution

    def views(self, flip: bool) -> Iterator[View]:
        """What is encoded of it: with `flip` the mirror image too."""
        yield self.view
        if flip:
            yield replace(self.view, flipped=True)

    def __str__(self) -> str:
        return f"{self.sample}, from frame {self.view.first}" if self.view.first else str(self.sample)


def cut(samples: list[Sample], facts: Mapping[str, FileFacts], how: Cutting) -> tuple[list[Excerpt], list[str]]:
    """Excerpts of all samples, and a sentence for each clip that is too short.

    Args:
        facts: of every file that the samples name.
    """
    excerpts, faults = [], []
    for sample in samples:
        source = sample.video or sample.image
        if source is None:  # a validation prompt
            excerpts.append(Excerpt(sample, _view(how, how.buckets[0], 0, how.buckets[0].frames), 0))
            continue
        info = facts[source].info
        bucket = choose_bucket(info, how if sample.video else replace(how, pads=True))
        if bucket is None:
            faults.append(f"{source} (line {sample.line}) {_too_short(info, how)}.")
            continue
        stamp = combined(facts[path].stamp for path in sample.files)
        excerpts += [Excerpt(sample, _view(how, bucket, *window), stamp) for window in windows(info, bucket, how)]
    return excerpts, faults


def choose_bucket(info: ClipInfo, how: Cutting) -> Resolution | None:
    """The bucket that keeps most of a clip: share of its picture times share of its time.

    Of several that keep the same, the one that enlarges the picture least, then the largest. None where the clip is too
    short for all of them.
    """
    available = frames_available(info, how.rate)
    fitting = [bucket for bucket in how.buckets if bucket.frames <= available]
    if not fitting and how.pads:
        fewest = min(bucket.frames for bucket in how.buckets)
        fitting = [bucket for bucket in how.buckets if bucket.frames == fewest]

    def merit(bucket: Resolution) -> tuple[float, float, int]:
        used = len(windows(info, bucket, how)) * bucket.frames
        kept = min(used / available, 1) / (1 + stretch(info, bucket))
        enlarged = max(bucket.height / info.height, bucket.width / info.width, 1)
        return round(kept, 6), -enlarged, bucket.height * bucket.width

    return max(fitting, key=merit, default=None)


def windows(info: ClipInfo, bucket: Resolution, how: Cutting) -> list[tuple[int, int]]:
    """(first, span), as in `View`, of the excerpts of a clip: spread evenly over it, the first at its start."""
    available, frames = frames_available(info, how.rate), bucket.frames
    count = max(min(how.clips_per_video, available // frames), 1)
    if how.rate == SPREAD:
        starts = [available * number // count for number in range(count + 1)]
        return [(start, end - start) for start, end in pairwise(starts)]
    spare = available - frames
    return [(spare * number // (count - 1) if number else 0, frames) for number in range(count)]


@lru_cache(maxsize=1024)
def _view(how: Cutting, bucket: Resolution, first: int, span: int) -> View:
    return View(bucket, how.rate, how.mode, first, span)


def _too_short(info: ClipInfo, how: Cutting) -> str:
    count = min(bucket.frames for bucket in how.buckets)
    length = f"its {info.frames} frames are {info.seconds:.2f} s"
    if how.rate == SPREAD:
        return f"is too short: {length}, but a sample has {count}; --pad_short_clips repeats the last frame"
    return (
        f"is too short: {length}, but {count} frames at {how.rate:g} fps take {count / how.rate:.2f} s; use a longer "
        "clip, fewer frames in --train_resolution, a higher --fps, or --pad_short_clips"
    )

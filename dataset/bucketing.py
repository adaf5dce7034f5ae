"""Selects the resolution and the frames of each training sample. An image is a sample of one frame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from dataset.file_index import FileFacts, combine_signatures
from dataset.images import is_image_file
from dataset.manifest import Sample
from dataset.parts import Part
from dataset.video import (
    NATIVE_STRIDE,
    ClipInfo,
    ClipPart,
    FrameSelection,
    Rate,
    Resolution,
    frames_available,
    stretch,
)

# Images that every bucket would distort by more than this are refused. The user can give them a resolution.
MAX_STRETCH = 1.0


@dataclass(frozen=True)
class SamplingPolicy:
    """How samples are taken from clips.

    Attributes:
        buckets: the training resolutions.
        rate: frames per second of a sample, or NATIVE_STRIDE.
        mode: resize mode, `stretch` or `crop`.
        clips_per_video: maximum number of samples per clip; they do not overlap.
        pad_short_clips: whether a clip that is too short for every bucket repeats its last frame.
    """

    buckets: tuple[Resolution, ...]
    rate: Rate
    mode: str
    clips_per_video: int = 1
    pad_short_clips: bool = False

    def for_clips(self) -> SamplingPolicy:
        """Returns the policy for clips, which use buckets of one frame only if there are no others."""
        longer = tuple(bucket for bucket in self.buckets if bucket.frames > 1)
        return replace(self, buckets=longer or self.buckets)

    def for_images(self) -> SamplingPolicy:
        """Returns the policy for images. Without buckets of one frame, images have the sizes of the others."""
        given = tuple(bucket for bucket in self.buckets if bucket.frames == 1)
        sizes = tuple(dict.fromkeys(replace(bucket, frames=1) for bucket in self.buckets))
        return SamplingPolicy(given or sizes, NATIVE_STRIDE, self.mode)


@dataclass(frozen=True, slots=True)
class ClipSample:
    """A training sample: a line of the data folder and the frames selected from its clip.

    Attributes:
        signature: combined stat signature of the sample's files at the time of the scan.
    """

    sample: Sample
    selection: FrameSelection
    signature: int

    @property
    def resolution(self) -> Resolution:
        return self.selection.resolution

    @property
    def is_image(self) -> bool:
        """Whether the sample is an image in the place of a clip."""
        return self.sample.video is not None and is_image_file(self.sample.video)

    def selections(self, flip: bool) -> Iterator[FrameSelection]:
        """Yields the frame selections to encode: the sample and, with `flip`, its mirror image."""
        yield self.selection
        if flip:
            yield replace(self.selection, flipped=True)

    def __str__(self) -> str:
        return f"{self.sample}, from frame {self.selection.first}" if self.selection.first else str(self.sample)


def select_clip_samples(
    samples: list[Sample], facts: Mapping[str, FileFacts], policy: SamplingPolicy
) -> tuple[list[ClipSample], list[str]]:
    """Returns the clip samples of all samples, and an error for each clip that is too short, and for each image that
    has another shape than all buckets.

    Args:
        facts: path -> facts, for every file of the samples.
    """
    clip_samples, errors = [], []
    images, policy = policy.for_images(), policy.for_clips()
    for sample in samples:
        path = sample.video or sample.image
        if path is None:  # a validation prompt
            bucket = policy.buckets[0]
            clip_samples.append(ClipSample(sample, _selection(policy, bucket, 0, bucket.frames), 0))
            continue
        is_image = sample.video is not None and is_image_file(path)
        if is_image and sample.part is not None:
            errors.append(f"{path} ({sample.place}) is an image, and start, end and crop are for clips.")
            continue
        found = (facts[path].parts or {})[sample.part] if sample.part is not None else None
        if isinstance(found, str):
            errors.append(f"{path} ({sample.place}) {found}.")
            continue
        info = found.info if found is not None else facts[path].info
        used = images if is_image else policy
        chosen = choose_bucket(info, used if sample.video else replace(used, pad_short_clips=True))
        if chosen is None:
            errors.append(f"{path} ({sample.place}) {_too_short(info, policy, sample.part)}.")
            continue
        if is_image and stretch(info, chosen) > MAX_STRETCH:
            errors.append(f"{path} ({sample.place}) {_other_shape(info, chosen, policy, images)}.")
            continue
        signature = combine_signatures(facts[path].signature for path in sample.files)
        clip_samples += [
            ClipSample(sample, _of_part(_selection(used, chosen, *window), found, facts[path].info), signature)
            for window in windows(info, chosen, used)
        ]
    return clip_samples, errors


def choose_bucket(info: ClipInfo, policy: SamplingPolicy) -> Resolution | None:
    """Returns the bucket that preserves most of a clip, or None if the clip is too short for all of them.

    The preserved share is the share of the picture times the share of the duration. Ties go to the bucket that upscales
    the picture least, then to the largest bucket.
    """
    available = frames_available(info, policy.rate)
    candidates = [bucket for bucket in policy.buckets if bucket.frames <= available]
    if not candidates and policy.pad_short_clips:
        fewest = min(bucket.frames for bucket in policy.buckets)
        candidates = [bucket for bucket in policy.buckets if bucket.frames == fewest]

    def score(bucket: Resolution) -> tuple[float, float, int]:
        used = len(windows(info, bucket, policy)) * bucket.frames
        preserved = min(used / available, 1) / (1 + stretch(info, bucket))
        upscaling = max(bucket.height / info.height, bucket.width / info.width, 1)
        return round(preserved, 6), -upscaling, bucket.height * bucket.width

    return max(candidates, key=score, default=None)


def windows(info: ClipInfo, bucket: Resolution, policy: SamplingPolicy) -> list[tuple[int, int]]:
    """Returns the (first, span) of each sample of a clip, as in `FrameSelection`.

    The samples are evenly spaced, and the first one starts at the beginning of the clip.
    """
    available, frames = frames_available(info, policy.rate), bucket.frames
    count = max(min(policy.clips_per_video, available // frames), 1)
    if policy.rate == NATIVE_STRIDE:
        starts = [available * number // count for number in range(count + 1)]
        return [(start, end - start) for start, end in pairwise(starts)]
    last_start = available - frames
    return [(last_start * number // (count - 1) if number else 0, frames) for number in range(count)]


@lru_cache(maxsize=1024)
def _selection(policy: SamplingPolicy, bucket: Resolution, first: int, span: int) -> FrameSelection:
    # cached, because many samples share an equal selection
    return FrameSelection(bucket, policy.rate, policy.mode, first, span)


def _other_shape(info: ClipInfo, nearest: Resolution, clips: SamplingPolicy, images: SamplingPolicy) -> str:
    area = nearest.height * nearest.width
    height = max(round((area * info.height / info.width) ** 0.5 / 16), 1) * 16
    buckets = [*clips.buckets, *images.buckets, Resolution(1, height, max(round(area / height / 16), 1) * 16)]
    return (
        f"is {info.width} pixels wide and {info.height} high, and {nearest} would cut off or stretch half of it; crop "
        f"it, or add a resolution of its shape: --train_resolution {' '.join(map(str, dict.fromkeys(buckets)))}"
    )


def _of_part(selection: FrameSelection, found: ClipPart | None, clip: ClipInfo) -> FrameSelection:
    """Restricts a selection to a part. All frames of a clip are no part of it, so they keep their cache entries."""
    if found is None:
        return selection
    is_whole = (found.frames.first, found.frames.stop) == (0, clip.frames)
    return replace(selection, frames=None if is_whole else found.frames, crop=found.crop)


def _too_short(info: ClipInfo, policy: SamplingPolicy, part: Part | None) -> str:
    count = min(bucket.frames for bucket in policy.buckets)
    length = f"its {info.frames} frames are {info.seconds:.2f} s"
    if part is not None:
        end = "the end" if part.end is None else f"{part.end:g} s"
        length = f"its {info.frames} frames from {part.start:g} s to {end} are {info.seconds:.2f} s"
    if policy.rate == NATIVE_STRIDE:
        return f"is too short: {length}, but a sample has {count} frames; --pad_short_clips repeats the last frame"
    return (
        f"is too short: {length}, but {count} frames at {policy.rate:g} fps take {count / policy.rate:.2f} s; use a "
        f"longer {'clip' if part is None else 'part'}, fewer frames in --train_resolution, a higher --fps, or "
        "--pad_short_clips"
    )

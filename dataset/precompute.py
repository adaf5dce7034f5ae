"""Fills the latent cache before training: worker processes decode ahead, the rank encodes and writes.

Entries are assigned to ranks by position, so ranks do not communicate while they work, and each rank checks only its
own shard. Prompts and clips are separate passes, so their encoders are never in memory together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

import torch
from tqdm import tqdm

from dataset.bucketing import ClipSample
from dataset.condition_frames import select_frames
from dataset.containers import ClipError
from dataset.entry_writer import ClipBar, ClipWriter
from dataset.file_index import combine_signatures, stat_signature
from dataset.images import load_image
from dataset.latent_cache import LatentCache, SampleKeys
from dataset.video import FrameSelection, decode
from dataset.worker_pool import Failure, run_in_workers

# Takes prompts and a function that sends a heartbeat, and yields the embedding of each prompt.
EncodePrompts = Callable[[list[str], Callable[[], None]], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class PixelEncoders:
    """The VAE as plain functions.

    Attributes:
        video: uint8 [F, H, W, C] -> moments [2C, F, H, W], with C, F, H, W of the latent.
        image: frames uint8 [F, H, W, C] of a condition and a seed for the image noise -> moments [K, 2C, F, H, W] of K
            noise draws.
        mark: returns a function that waits for all moments returned so far. None if moments are complete when they are
            returned, otherwise a GPU still computes them.
    """

    video: Callable[[torch.Tensor], torch.Tensor]
    image: Callable[[torch.Tensor, int], torch.Tensor]
    mark: Callable[[], Callable[[], None]] | None = None


@dataclass(frozen=True)
class RankShard:
    """The part of the work that belongs to one rank."""

    rank: int
    world_size: int

    def select(self, items: Iterable) -> list:
        """Returns every `world_size`-th item, starting at `rank`."""
        return list(items)[self.rank :: self.world_size]


@dataclass(frozen=True)
class _Job:
    """A frame selection of a sample and the names of the missing entries to encode from it."""

    clip_sample: ClipSample
    selection: FrameSelection
    video: str | None
    image: str | None
    additions: dict[str, str] = field(default_factory=dict)  # condition frames -> name

    @property
    def names(self) -> list[str]:
        return [name for name in (self.video, self.image, *self.additions.values()) if name is not None]

    @property
    def needs_clip(self) -> bool:
        """Whether entries of more than the first frame are missing."""
        return self.video is not None or bool(self.additions)

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """[H, W, C] of an image file; None if no image file is needed."""
        size = self.selection.resolution
        return (size.height, size.width, 3) if self.image and self.clip_sample.sample.image else None

    @property
    def clip_shape(self) -> tuple[int, ...] | None:
        """[F, H, W, C] of the frames to decode: one frame if only the image is needed, None if no frame is."""
        size = self.selection.resolution
        if not self.needs_clip and self.image_shape:
            return None
        return (size.frames if self.needs_clip else 1), size.height, size.width, 3


def precompute_prompts(
    cache: LatentCache,
    prompts: dict[str, str],
    load_encoder: Callable[[], AbstractContextManager[EncodePrompts]],
    shard: RankShard,
    beat: Callable[[], None],
) -> dict[str, str]:
    """Encodes the missing prompts of this rank's shard.

    Args:
        prompts: entry name -> text.
        beat: sends a heartbeat; called for every prompt.

    Returns:
        Entry name -> error, for each prompt that could not be encoded. The error continues a sentence that starts with
        the sample.
    """
    missing, errors = [], {}
    for name in shard.select(prompts):
        beat()  # the check reads copied entries, which takes time
        if not cache.verify(name):
            missing.append(name)
    if not missing:
        return {}
    with load_encoder() as encode:
        bar = tqdm(missing, desc="Encoding prompts", unit="prompt", disable=shard.rank != 0)
        for name, embedding in zip(bar, encode([prompts[name] for name in missing], beat), strict=True):
            if embedding.isfinite().all():
                cache.write(name, embedding)
            else:
                errors[name] = f"has the prompt {prompts[name]!r}, for which the text encoder returned NaN or Inf"
            beat()
    return errors


def precompute_clips(
    cache: LatentCache,
    clip_samples: list[ClipSample],
    keys: list[SampleKeys],
    load_encoders: Callable[[], AbstractContextManager[PixelEncoders]],
    shard: RankShard,
    num_workers: int,
    timeout: float,
    beat: Callable[[], None],
) -> dict[str, str]:
    """Encodes the missing clips and images of this rank's shard.

    Args:
        timeout: maximum number of seconds to decode one clip.
        beat: sends a heartbeat; called for every clip.

    Returns:
        Entry name -> error, for each entry that could not be encoded. All other entries are in the cache.
    """
    jobs = missing_jobs(cache, clip_samples, keys, shard, beat)
    if not jobs:
        return {}
    largest = max(_numel(job.clip_shape) + _numel(job.image_shape) for job in jobs)
    errors: dict[str, str] = {}
    encode = None
    with ExitStack() as stack, ClipBar(len(jobs), shard.rank, shard.world_size) as bar:

        def still_missing() -> Iterator[_Job]:
            for job in jobs:
                if all(cache.verify(name) for name in job.names):
                    bar.update()  # encoded by another run on the same folder
                else:
                    yield job

        writer = ClipWriter(cache, bar)
        for result in run_in_workers(_decode, still_missing(), min(num_workers, len(jobs)), timeout, largest):
            if isinstance(result.outcome, Failure):
                errors |= dict.fromkeys(result.job.names, result.outcome.reason)
                bar.update()
            else:
                encode = encode or stack.enter_context(load_encoders())  # loaded with the first decoded clip
                moments, failed = _encode(encode, result.job, result.buffer, result.outcome)
                errors |= failed
                writer.add(moments, encode.mark() if encode.mark else None)
            beat()
        writer.finish()
        summary = bar.summary()
    if summary:
        print(summary)
    return errors | writer.errors


def _decode(job: _Job, buffer: torch.Tensor) -> str:
    """Decodes a job in a worker process: writes the pixels of the clip, then those of the image file, to the buffer.

    Returns:
        The error of the image, or an empty string. The clip is encoded in either case.

    Raises:
        ClipError: the clip cannot be decoded, or a file has changed since the scan.
    """
    pixels, image = _split_buffer(job, buffer)
    sample, image_error = job.clip_sample.sample, ""
    if pixels is not None:
        selection = (
            job.selection
            if job.needs_clip
            else replace(job.selection, resolution=replace(job.selection.resolution, frames=1))
        )
        decode_sample(job.clip_sample, selection, pixels)
    if image is not None and sample.image is not None:
        try:
            loaded = load_image(Path(sample.image), job.selection.resolution, job.selection.mode)
            image.copy_(loaded.flip(1) if job.selection.flipped else loaded)
        except ClipError as error:
            image_error = f"has the image {sample.image}, which {error}"
    # the key belongs to the content at the time of the scan
    if combine_signatures(map(stat_signature, sample.files)) != job.clip_sample.signature:
        raise ClipError("was changed during the run; run the same command again")
    return image_error


def decode_sample(clip_sample: ClipSample, selection: FrameSelection, out: torch.Tensor | None = None) -> torch.Tensor:
    """Decodes the selected frames of a clip, or an image in its place: uint8 [F, H, W, C].

    Raises:
        ClipError: the file cannot be decoded.
    """
    path = Path(clip_sample.sample.clip)
    if not clip_sample.is_image:
        return decode(path, selection, out)
    image = load_image(path, selection.resolution, selection.mode)[None]
    if selection.flipped:
        image = image.flip(2)
    return image if out is None else out.copy_(image)


def _split_buffer(job: _Job, buffer: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns the views of the buffer that hold the clip [F, H, W, C] and the image file [H, W, C]."""
    clip, image = _numel(job.clip_shape), _numel(job.image_shape)
    return (
        buffer[:clip].view(job.clip_shape) if job.clip_shape else None,
        buffer[clip : clip + image].view(job.image_shape) if job.image_shape else None,
    )


def _encode(
    encode: PixelEncoders, job: _Job, buffer: torch.Tensor, image_error: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Encodes a decoded job. Returns entry name -> moments, and entry name -> error for those without an image."""
    pixels, image = _split_buffer(job, buffer)
    if image is None and pixels is not None:
        image = pixels[0]
    moments, errors = {}, {}
    if job.video is not None and pixels is not None:
        moments[job.video] = encode.video(pixels)
    if job.image is not None and image_error:
        errors[job.image] = image_error
    elif job.image is not None and image is not None:
        moments[job.image] = encode.image(image[None], _noise_seed(job.image))
    for addition, name in job.additions.items():
        if pixels is not None:
            moments[name] = encode.image(select_frames(pixels, addition), _noise_seed(name))
    return moments, errors


def _noise_seed(name: str) -> int:
    """Returns a seed from the key, so that the bytes of an entry do not depend on the order or the rank."""
    return int(name.rpartition("-")[2][:8], 16)


def missing_jobs(
    cache: LatentCache,
    clip_samples: list[ClipSample],
    keys: list[SampleKeys],
    shard: RankShard,
    beat: Callable[[], None],
) -> list[_Job]:
    """Returns the jobs for the missing entries of this rank's shard.

    An entry that several samples share belongs to one job only.
    """
    claimed: set[str] = set()
    missing, position = [], 0
    for clip_sample, key in zip(clip_samples, keys, strict=True):
        beat()
        columns = zip_longest(key.video, key.image, *key.additions.values())
        for selection, names in zip(clip_sample.selections(flip=True), columns, strict=False):
            unclaimed = [None if name in claimed else name for name in names]
            claimed.update(name for name in unclaimed if name is not None)
            if any(unclaimed):
                position += 1
                if position % shard.world_size == shard.rank:
                    video, image, *rest = (None if name is None or cache.verify(name) else name for name in unclaimed)
                    additions = {part: name for part, name in zip(key.additions, rest, strict=True) if name is not None}
                    if video or image or additions:
                        missing.append(_Job(clip_sample, selection, video, image, additions))
    return missing


def _numel(shape: tuple[int, ...] | None) -> int:
    return math.prod(shape) if shape else 0

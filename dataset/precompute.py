"""The stage before training: whatever the cache lacks is decoded ahead in worker processes, encoded, written.

Each rank takes its share of the entries by position, so that the ranks need not agree on anything while they work, and
checks only that share. Prompts and clips are two passes, so that their encoders are never in memory together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
from tqdm import tqdm

from dataset.bucketing import ClipSample
from dataset.file_index import combine_signatures, stat_signature
from dataset.latent_cache import LatentCache, SampleKeys
from dataset.video import ClipError, FrameSelection, decode, load_image
from dataset.worker_pool import Failure, run_in_workers

EncodePrompt = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class PixelEncoders:
    """Plain functions that stand for the VAE.

    Attributes:
        video: uint8 [F, H, W, C] -> moments.
        image: uint8 [H, W, C], and a seed for its noise -> moments.
    """

    video: Callable[[torch.Tensor], torch.Tensor]
    image: Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class RankShard:
    """The part of the work that is this process's own."""

    rank: int
    world_size: int

    def select(self, items: Iterable) -> list:
        return list(items)[self.rank :: self.world_size]


@dataclass(frozen=True)
class _Job:
    """A view of a sample, and the names of the entries to be made of it."""

    clip_sample: ClipSample
    selection: FrameSelection
    video: str | None
    image: str | None

    @property
    def names(self) -> list[str]:
        return [name for name in (self.video, self.image) if name is not None]

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """[H, W, C] of an image that is a file of its own."""
        size = self.selection.resolution
        return (size.height, size.width, 3) if self.image and self.clip_sample.sample.image else None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """[F, H, W, C] of what is decoded of the clip: a single frame where only its image is wanted."""
        size = self.selection.resolution
        if self.video is None and self.image_shape:
            return None
        return (size.frames if self.video else 1), size.height, size.width, 3


def precompute_prompts(
    cache: LatentCache,
    prompts: dict[str, str],
    load_encoder: Callable[[], AbstractContextManager[EncodePrompt]],
    shard: RankShard,
    beat: Callable[[], None],
) -> dict[str, str]:
    """Encodes the missing prompts of this rank's share.

    Args:
        prompts: entry name -> text.
        alive: called after each.

    Returns:
        entry name -> what is wrong with its sample, for each prompt that could not be encoded.
    """
    missing, errors = [], {}
    for name in shard.select(prompts):
        beat()  # entries that were copied are read, which takes its time
        if not cache.is_intact(name):
            missing.append(name)
    if not missing:
        return {}
    with load_encoder() as encode:
        for name in tqdm(missing, desc="Encoding prompts", unit="prompt", disable=shard.rank != 0):
            embedding = encode(prompts[name])
            if embedding.isfinite().all():
                cache.write(name, embedding)
            else:
                errors[name] = f"has a prompt, {prompts[name]!r}, of which the text encoder makes what is not finite"
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
    """Encodes the missing clips and images of this rank's share.

    Args:
        timeout: seconds that a clip may take to decode.
        alive: called after each.

    Returns:
        entry name -> what is wrong with its sample, for each that could not be made; the others are in the cache.
    """
    jobs = missing_jobs(cache, clip_samples, keys, shard, beat)
    if not jobs:
        return {}
    largest = max(_numel(job.shape) + _numel(job.image_shape) for job in jobs)
    errors: dict[str, str] = {}
    encode = None
    with (
        ExitStack() as stack,
        tqdm(total=len(jobs), desc="Encoding clips", unit="clip", disable=shard.rank != 0) as bar,
    ):

        def still_lacking() -> Iterator[_Job]:
            for job in jobs:
                if all(cache.is_intact(name) for name in job.names):
                    bar.update()  # another run on the same folder was here
                else:
                    yield job

        for done in run_in_workers(_decode, still_lacking(), min(max(num_workers, 1), len(jobs)), timeout, largest):
            if isinstance(done.outcome, Failure):
                errors |= dict.fromkeys(done.job.names, done.outcome.reason)
            else:
                encode = encode or stack.enter_context(load_encoders())  # not read where nothing can be decoded
                errors |= _encode(cache, encode, done.job, done.buffer, done.outcome)
            bar.update()
            beat()
    return errors


def _decode(job: _Job, buffer: torch.Tensor) -> str:
    """In a worker: pixels into the buffer, the clip's and behind them those of an image of its own.

    Returns:
        what is wrong with the image; the clip may still be of use.
    """
    pixels, image = _pixels(job, buffer)
    sample, fault = job.clip_sample.sample, ""
    if pixels is not None:
        selection = (
            job.selection
            if job.video
            else replace(job.selection, resolution=replace(job.selection.resolution, frames=1))
        )
        decode(Path(sample.clip), selection, pixels)
    if image is not None and sample.image is not None:
        try:
            loaded = load_image(Path(sample.image), job.selection.resolution, job.selection.mode)
            image.copy_(loaded.flip(1) if job.selection.flipped else loaded)
        except ClipError as error:
            fault = f"has an image, {sample.image}, that {error}"
    if (
        combine_signatures(map(stat_signature, sample.files)) != job.clip_sample.signature
    ):  # the entry would stand under the old content's key
        raise ClipError("was changed while the run worked; run the same command again")
    return fault


def _pixels(job: _Job, buffer: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The parts of the buffer: [F, H, W, C] of the clip, [H, W, C] of the image."""
    clip, image = _numel(job.shape), _numel(job.image_shape)
    return (
        buffer[:clip].view(job.shape) if job.shape else None,
        buffer[clip : clip + image].view(job.image_shape) if job.image_shape else None,
    )


def _encode(
    cache: LatentCache, encode: PixelEncoders, job: _Job, buffer: torch.Tensor, image_fault: str
) -> dict[str, str]:
    """Writes the entries of a decoded job; gives those that cannot be made, with the reason."""
    pixels, image = _pixels(job, buffer)
    if image is None and pixels is not None:
        image = pixels[0]
    moments, errors = {}, {}
    if job.video is not None and pixels is not None:
        moments[job.video] = encode.video(pixels)
    if job.image is not None and image_fault:
        errors[job.image] = image_fault
    elif job.image is not None and image is not None:
        # the seed comes from the key, so that the entry's bytes do not depend on order or rank
        moments[job.image] = encode.image(image, int(job.image.rpartition("-")[2][:8], 16))
    for name, tensor in moments.items():
        if tensor.isfinite().all():
            cache.write(name, tensor)
        else:
            errors[name] = "gives latents that are not finite"
    return errors


def missing_jobs(
    cache: LatentCache,
    clip_samples: list[ClipSample],
    keys: list[SampleKeys],
    shard: RankShard,
    beat: Callable[[], None],
) -> list[_Job]:
    """What the cache lacks of this rank's share; each entry is made once, however many samples name it."""
    claimed: set[str] = set()
    missing, position = [], 0
    for clip_sample, key in zip(clip_samples, keys, strict=True):
        beat()
        for selection, names in zip(clip_sample.selections(flip=True), zip_longest(key.video, key.image), strict=False):
            own = [None if name in claimed else name for name in names]
            claimed.update(name for name in own if name is not None)
            if any(own):
                position += 1
                if position % shard.world_size == shard.rank:
                    video, image = (None if name is None or cache.is_intact(name) else name for name in own)
                    if video or image:
                        missing.append(_Job(clip_sample, selection, video, image))
    return missing


def _numel(shape: tuple[int, ...] | None) -> int:
    return math.prod(shape) if shape else 0

"""The stage before training: whatever the cache lacks is decoded ahead in worker processes, encoded, written.

Each rank takes its share of the entries by position, so that the ranks need not agree on anything while they work, and
checks only that share. Prompts and clips are two passes, so that their encoders are never in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset.latent_cache import LatentCache, SampleKeys
from dataset.manifest import Sample
from dataset.video import ClipError, Resolution, decode, load_image

EncodePrompt = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class PixelEncoders:
    """Plain functions that stand for the VAE.

    Attributes:
        video: uint8 [F, C, H, W] -> moments.
        image: uint8 [C, H, W], and a seed for its noise -> moments.
    """

    video: Callable[[torch.Tensor], torch.Tensor]
    image: Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Share:
    """The part of the work that is this process's own."""

    rank: int
    world_size: int

    def of(self, items: Iterable) -> list:
        return list(items)[self.rank :: self.world_size]


@dataclass(frozen=True)
class _Job:
    sample: Sample
    video: str | None
    image: str | None


class _Decoded(Dataset):
    """Job -> (job, pixels of the clip or None, pixels of the image or None, fault or None).

    Pixels travel between processes as uint8, a quarter of what the encoder computes with.
    """

    def __init__(self, jobs: list[_Job], resolution: Resolution, fps: float, mode: str) -> None:
        self.jobs, self.resolution, self.fps, self.mode = jobs, resolution, fps, mode

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[_Job, torch.Tensor | None, torch.Tensor | None, str | None]:
        job, video, image = self.jobs[index], None, None
        at_fault: Path | None = job.sample.video
        try:
            if job.video is not None:
                video = decode(job.sample.clip, self.resolution, self.fps, self.mode)
            if job.image is not None and job.sample.image is not None:
                at_fault = job.sample.image
                image = load_image(job.sample.image, self.resolution, self.mode)
            elif job.image is not None:
                first = Resolution(1, self.resolution.height, self.resolution.width)
                image = (decode(job.sample.clip, first, self.fps, self.mode) if video is None else video)[0]
        except ClipError as error:
            return job, None, None, f"{at_fault} (line {job.sample.line}) {error}."
        return job, video, image, None


def precompute_prompts(
    cache: LatentCache,
    prompts: dict[str, str],
    load_encoder: Callable[[], AbstractContextManager[EncodePrompt]],
    share: Share,
) -> list[str]:
    """Encodes the missing prompts of this rank's share.

    Args:
        prompts: entry name -> text.

    Returns:
        one sentence for each prompt that could not be encoded.
    """
    missing, faults = [name for name in share.of(prompts) if not cache.is_intact(name)], []
    if not missing:
        return []
    with load_encoder() as encode:
        for name in tqdm(missing, desc="Encoding prompts", unit="prompt", disable=share.rank != 0):
            embedding = encode(prompts[name])
            if embedding.isfinite().all():
                cache.write(name, embedding)
            else:
                faults.append(f"The prompt {prompts[name]!r}: the text encoder gave values that are not finite.")
    return faults


def precompute_clips(
    cache: LatentCache,
    samples: list[Sample],
    keys: list[SampleKeys],
    load_encoders: Callable[[], AbstractContextManager[PixelEncoders]],
    share: Share,
    resolution: Resolution,
    fps: float,
    mode: str,
    num_workers: int,
) -> list[str]:
    """Encodes the missing clips and images of this rank's share.

    Returns:
        one sentence for each clip that could not be encoded; all the others are in the cache.
    """
    jobs = _missing_jobs(cache, samples, keys, share)
    if not jobs:
        return []
    faults = []
    decoded = DataLoader(
        _Decoded(jobs, resolution, fps, mode),
        batch_size=None,
        num_workers=min(num_workers, len(jobs)),
        prefetch_factor=2 if num_workers else None,
    )
    with load_encoders() as encode:
        for job, video, image, fault in tqdm(
            decoded, total=len(jobs), desc="Encoding clips", unit="clip", disable=share.rank != 0
        ):
            if fault is not None:
                faults.append(fault)
                continue
            moments = {}
            if video is not None:
                moments[job.video] = encode.video(video)
            if image is not None:
                # the seed comes from the key, so that the entry's bytes do not depend on order or rank
                moments[job.image] = encode.image(image, int(job.image.rpartition("-")[2][:8], 16))
            if all(tensor.isfinite().all() for tensor in moments.values()):
                for name, tensor in moments.items():
                    cache.write(name, tensor)
            else:
                faults.append(f"{job.sample.video} (line {job.sample.line}): the VAE gave latents that are not finite.")
    return faults


def _missing_jobs(cache: LatentCache, samples: list[Sample], keys: list[SampleKeys], share: Share) -> list[_Job]:
    """What the cache lacks of this rank's share; each entry is made once, however many samples name it."""
    claimed: set[str | None] = {None}
    jobs = []
    for sample, key in zip(samples, keys, strict=True):
        job = _Job(sample, *(None if name in claimed else name for name in (key.video, key.image)))
        claimed |= {key.video, key.image}
        if job.video or job.image:
            jobs.append(job)

    def lacking(name: str | None) -> str | None:
        return None if name is None or cache.is_intact(name) else name

    mine = [_Job(job.sample, lacking(job.video), lacking(job.image)) for job in share.of(jobs)]
    return [job for job in mine if job.video or job.image]

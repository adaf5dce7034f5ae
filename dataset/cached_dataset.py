"""Cached entries to batches, in an order that depends on the seed and on nothing else.

The samples of a run form one endless stream: the dataset in a new random order each epoch, one epoch after the other.
Sample n of the stream has its order, noise and timestep from (seed, n) alone. However the stream is dealt out, to
ranks, micro-batches or a resumed run, every sample meets the same noise; resuming needs to know one number, n.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset.latent_cache import DamagedEntry, LatentCache, SampleKeys
from utils.errors import UserError

# What a random number is for: the same seed and position serve each purpose with numbers of its own.
ORDER, CAPTION_DROPOUT, DRAWS, HELD_OUT = range(4)


def seed_for(purpose: int, seed: int, number: int) -> int:
    """A well-mixed 63-bit seed for item `number` of what `seed` starts."""
    return int(np.random.SeedSequence([purpose, seed, number]).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Place:
    """Sample `index` of the dataset, at position `number` of the stream."""

    number: int
    index: int


class SampleStream(Sampler[list[Place]]):
    """Deals the stream out in micro-batches: to each rank in turn, then the next micro-batch.

    Args:
        dataset_size: number of samples.
        batch_size: samples a rank and micro-batch.
        start: position in the stream from which to go on.
    """

    def __init__(self, dataset_size: int, batch_size: int, rank: int, world_size: int, seed: int, start: int) -> None:
        self.dataset_size, self.batch_size, self.seed = dataset_size, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[Place]]:
        epoch, order = -1, []
        for first in _count(self.start + self.rank * self.batch_size, self.world_size * self.batch_size):
            places = []
            for number in range(first, first + self.batch_size):
                if number // self.dataset_size != epoch:
                    epoch = number // self.dataset_size
                    order = self._order(epoch)
                places.append(Place(number, order[number % self.dataset_size]))
            yield places

    def _order(self, epoch: int) -> list[int]:
        return np.random.default_rng(seed_for(ORDER, self.seed, epoch)).permutation(self.dataset_size).tolist()


def _count(start: int, step: int) -> Iterator[int]:
    while True:
        yield start
        start += step


class CachedDataset(Dataset):
    """Reads a sample's moments and prompt embedding from the cache.

    Args:
        empty_prompt: the entry of the empty prompt, which caption dropout puts in place of the sample's.
    """

    def __init__(
        self, cache: LatentCache, keys: list[SampleKeys], empty_prompt: str, caption_dropout: float, seed: int
    ) -> None:
        self.cache, self.keys, self.empty_prompt = cache, keys, empty_prompt
        self.caption_dropout, self.seed = caption_dropout, seed

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place: Place) -> dict[str, Any] | DamagedEntry:
        keys = self.keys[place.index]
        assert keys.video is not None  # only validation prompts go without a clip
        generator = np.random.default_rng(seed_for(CAPTION_DROPOUT, self.seed, place.number))
        dropped = generator.random() < self.caption_dropout
        item: dict[str, Any] = {"number": place.number, "index": place.index}
        try:
            item["video"] = self.cache.read(keys.video)
            item["prompt"] = self.cache.read(self.empty_prompt if dropped else keys.prompt)
            if keys.image is not None:
                item["image"] = self.cache.read(keys.image)
        except DamagedEntry as damage:
            return damage  # raised in a worker it would reach the user as a traceback
        return item


def batches(
    dataset: CachedDataset, stream: SampleStream, num_workers: int, pin_memory: bool
) -> Iterator[dict[str, Any]]:
    """Endless batches: `number` and `index` (lists), `video` [B, 2C, F, H, W], `prompt` [B, S, D] and, for i2v,
    `image` [B, K, 2C, 1, H, W], all in the encoders' own dtypes.

    Raises:
        UserError: an entry of the cache was damaged since the run began.
    """
    for batch in DataLoader(
        dataset,
        batch_sampler=stream,
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
    ):
        if isinstance(batch, DamagedEntry):
            raise UserError(
                f"{dataset.cache.folder}: the entry {batch} was damaged or removed while training ran; "
                "run the same command again to have it encoded anew.",
                on_every_rank=False,
            )
        yield batch


def _collate(items: list[dict[str, Any] | DamagedEntry]) -> dict[str, Any] | DamagedEntry:
    intact = []
    for item in items:
        if isinstance(item, DamagedEntry):
            return item
        intact.append(item)
    return {
        name: torch.stack([item[name] for item in intact])
        if torch.is_tensor(value)
        else [item[name] for item in intact]
        for name, value in intact[0].items()
    }

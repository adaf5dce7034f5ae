"""Cached entries to batches, in an order that depends on the seed and on nothing else.

The samples of a run form one endless stream: the dataset in a new random order each epoch, one epoch after the other.
Sample n of the stream has its order, noise and timestep from (seed, n) alone. An update takes the next samples that
have the same resolution: as the stream goes by, each bucket collects, and the first that is full is the next update.
However an update is dealt out, to ranks and micro-batches, and wherever a run is resumed, every sample meets the same
noise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset.latent_cache import DamagedEntry, LatentCache, SampleKeys
from utils.errors import UserError

# What a random number is for: the same seed and position serve each purpose with numbers of its own.
ORDER, CAPTION_DROPOUT, DRAWS, HELD_OUT, FLIP, ROUNDING = range(6)


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
        buckets: of every sample of the dataset; equal where two may share a batch.
        batch_size: samples a rank and micro-batch.
        samples_per_update: of all ranks and micro-batches.
        start: number of samples of the stream that were trained on before.
    """

    def __init__(
        self,
        buckets: Sequence[Any],
        batch_size: int,
        samples_per_update: int,
        rank: int,
        world_size: int,
        seed: int,
        start: int,
    ) -> None:
        self.buckets, self.batch_size, self.samples_per_update = buckets, batch_size, samples_per_update
        self.rank, self.world_size, self.seed, self.start = rank, world_size, seed, start

    def __iter__(self) -> Iterator[list[Place]]:
        for update in self._updates():
            mine = range(self.rank * self.batch_size, self.samples_per_update, self.world_size * self.batch_size)
            for first in mine:
                yield update[first : first + self.batch_size]

    def _updates(self) -> Iterator[list[Place]]:
        """The samples of each update; the first `start` that would be trained on go by."""
        collected: defaultdict[Any, list[tuple[int, int]]] = defaultdict(list)
        buckets, size, to_pass = self.buckets, self.samples_per_update, self.start
        for number, index in self._stream():
            waiting = collected[buckets[index]]
            waiting.append((number, index))
            if to_pass and len(waiting) >= min(size, to_pass):  # the last ones need not fill an update of today's size
                gone = min(size, to_pass)
                del waiting[:gone]
                to_pass -= gone
            elif len(waiting) == size:
                yield [Place(*place) for place in waiting]
                waiting.clear()

    def _stream(self) -> Iterator[tuple[int, int]]:
        """Endless (number, index)."""
        number = 0
        while True:
            epoch = number // len(self.buckets)
            order = np.random.default_rng(seed_for(ORDER, self.seed, epoch)).permutation(len(self.buckets))
            yield from enumerate(order.tolist(), number)
            number += len(self.buckets)


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
        dropped = self._draw(CAPTION_DROPOUT, place) < self.caption_dropout
        mirrored = len(keys.video) > 1 and self._draw(FLIP, place) < 0.5
        item: dict[str, Any] = {"number": place.number, "index": place.index}
        try:
            item["video"] = self.cache.read(keys.video[mirrored])
            item["prompt"] = self.cache.read(self.empty_prompt if dropped else keys.prompt)
            if keys.image:
                item["image"] = self.cache.read(keys.image[mirrored])
        except DamagedEntry as damage:
            return damage  # raised in a worker it would reach the user as a traceback
        return item

    def _draw(self, purpose: int, place: Place) -> float:
        return np.random.default_rng(seed_for(purpose, self.seed, place.number)).random()


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
            dataset.cache.remove(str(batch))
            raise UserError(
                f"{dataset.cache.folder}: the entry {batch} is damaged or was removed while training ran; "
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

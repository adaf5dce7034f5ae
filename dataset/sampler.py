"""The endless sample stream, dealt out to ranks and micro-batches.

The stream is the dataset in a new random order per epoch, one epoch after another. Sample n of the stream takes its
order, noise and timestep from (seed, n) alone. An update takes the next samples of one resolution: each bucket collects
samples as the stream passes, and the first full bucket becomes the next update. Every sample therefore meets the same
noise, however an update is divided among ranks and micro-batches, and wherever a run is resumed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from utils.common.seeds import ORDER, seed_for


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

"""The endless sample stream and its division among ranks and micro-batches.

The stream is the dataset in a new random order per epoch, one epoch after another. Samples of a folder with repeats
occur several times per epoch. Sample n of the stream takes its order, noise and timestep from (seed, n) alone. An
update takes the next samples of one resolution: each bucket collects samples as the stream passes, and the first full
bucket becomes the next update. Every sample therefore gets the same noise, however an update is divided among ranks
and micro-batches, and wherever a run is resumed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.common.seeds import ORDER, seed_for


@dataclass(frozen=True)
class StreamPosition:
    """Position `number` of the stream, which holds sample `index` of the dataset."""

    number: int
    index: int


class SampleStream:
    """Yields the micro-batches of one rank. Consecutive micro-batches of an update go to the ranks in turn.

    Args:
        buckets: bucket of each sample of the dataset; samples of equal buckets may share a batch.
        batch_size: samples per rank and micro-batch.
        samples_per_update: samples per update, over all ranks and micro-batches.
        start: number of samples of the stream that earlier runs trained on.
        repeats: number of times that each sample occurs in an epoch; once by default.
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
        repeats: Sequence[int] | None = None,
    ) -> None:
        indices = np.arange(len(buckets))
        self.indices = indices if repeats is None else np.repeat(indices, repeats)  # of the samples of an epoch
        self.buckets, self.batch_size, self.samples_per_update = buckets, batch_size, samples_per_update
        self.rank, self.world_size, self.seed, self.start = rank, world_size, seed, start

    def __iter__(self) -> Iterator[list[StreamPosition]]:
        for update in self._updates():
            offsets = range(self.rank * self.batch_size, self.samples_per_update, self.world_size * self.batch_size)
            for offset in offsets:
                yield update[offset : offset + self.batch_size]

    def _updates(self) -> Iterator[list[StreamPosition]]:
        """Yields the samples of each update, after skipping the first `start` samples that updates would use."""
        collected: defaultdict[Any, list[tuple[int, int]]] = defaultdict(list)
        buckets, size, to_skip = self.buckets, self.samples_per_update, self.start
        for number, index in self._stream():
            pending = collected[buckets[index]]
            pending.append((number, index))
            # the earlier run may have used another update size, so the last samples to skip need not fill an update
            if to_skip and len(pending) >= min(size, to_skip):
                num_skipped = min(size, to_skip)
                del pending[:num_skipped]
                to_skip -= num_skipped
            elif len(pending) == size:
                yield [StreamPosition(*position) for position in pending]
                pending.clear()

    def _stream(self) -> Iterator[tuple[int, int]]:
        """Yields (number, index) without end."""
        number = 0
        while True:
            epoch = number // len(self.indices)
            order = np.random.default_rng(seed_for(ORDER, self.seed, epoch)).permutation(len(self.indices))
            yield from enumerate(self.indices[order].tolist(), number)
            number += len(self.indices)

"""Cached entries to batches, in an order that depends on the seed and on nothing else.

The samples of a run form one endless stream: the dataset in a new random order each epoch, one epoch after the other.
Sample n of the stream has its order, noise and timestep from (seed, n) alone. An update takes the next samples that
have the same resolution: as the stream goes by, each bucket collects, and the first that is full is the next update.
However an update is dealt out, to ranks and micro-batches, and wherever a run is resumed, every sample meets the same
noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset.latent_cache import DamagedEntry, LatentCache, SampleKeys
from dataset.sampler import Place, SampleStream
from utils.common.errors import UserError
from utils.common.seeds import CAPTION_DROPOUT, FLIP, seed_for


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

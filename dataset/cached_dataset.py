"""Reads batches of cached latents and prompt embeddings.

Caption dropout and mirroring are drawn from the seed and the sample's position in the stream, so they do not depend on
the number of ranks or on where a run is resumed. `dataset.sampler` describes the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset.latent_cache import DamagedEntry, LatentCache, SampleKeys
from dataset.sampler import SampleStream, StreamPosition
from utils.common.errors import UserError
from utils.common.seeds import CAPTION_DROPOUT, FLIP, seed_for


class CachedDataset(Dataset):
    """Reads the moments and the prompt embedding of a sample from the cache.

    Args:
        empty_prompt: name of the cache entry that caption dropout uses in place of the sample's prompt.
    """

    def __init__(
        self, cache: LatentCache, keys: list[SampleKeys], empty_prompt: str, caption_dropout: float, seed: int
    ) -> None:
        self.cache, self.keys, self.empty_prompt = cache, keys, empty_prompt
        self.caption_dropout, self.seed = caption_dropout, seed

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, position: StreamPosition) -> dict[str, Any] | DamagedEntry:
        keys = self.keys[position.index]
        dropped = self._draw(CAPTION_DROPOUT, position) < self.caption_dropout
        mirrored = len(keys.video) > 1 and self._draw(FLIP, position) < 0.5
        item: dict[str, Any] = {"number": position.number, "index": position.index}
        try:
            item["video"] = self.cache.read(keys.video[mirrored])
            item["prompt"] = self.cache.read(self.empty_prompt if dropped else keys.prompt)
            if keys.image:
                item["image"] = self.cache.read(keys.image[mirrored])
        except DamagedEntry as error:
            return error  # an exception raised in a DataLoader worker would reach the user as a traceback
        return item

    def _draw(self, purpose: int, position: StreamPosition) -> float:
        return np.random.default_rng(seed_for(purpose, self.seed, position.number)).random()


def batches(
    dataset: CachedDataset, stream: SampleStream, num_workers: int, pin_memory: bool
) -> Iterator[dict[str, Any]]:
    """Yields batches without end, in the dtypes of the encoders.

    A batch holds `number` and `index` (lists), `video` [B, 2C, F, H, W], `prompt` [B, S, D] and, for i2v, `image`
    [B, K, 2C, 1, H, W] with K noise draws.

    Raises:
        UserError: a cache entry was damaged or removed after the run started.
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
                f"{dataset.cache.folder}: the entry {batch} was damaged or removed during training. Run the same "
                "command again to encode it again.",
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

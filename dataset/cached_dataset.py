"""Reads batches of cached latents and prompt embeddings.

Caption dropout and mirroring are drawn from the seed and the sample's position in the stream, so they do not depend on
the number of ranks or on where a run is resumed. `dataset.sampler` describes the stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from dataset.folder import DataFolder
from dataset.latent_cache import DamagedEntry, LatentCache, SampleKeys
from dataset.prefetch import prefetch
from dataset.sampler import StreamPosition
from utils.common.errors import UserError
from utils.common.seeds import CAPTION_DROPOUT, FLIP, seed_for

PREFETCHED_BATCHES = 2  # reading a batch takes milliseconds, a training step seconds


class CachedDataset:
    """Reads the moments and the prompt embedding of a sample from the cache.

    Args:
        empty_prompt: name of the cache entry that caption dropout uses in place of the sample's prompt.
        folders: data folder of each sample, with its share of caption dropout and its loss weight.
    """

    def __init__(
        self, cache: LatentCache, keys: list[SampleKeys], empty_prompt: str, folders: list[DataFolder], seed: int
    ) -> None:
        self.cache, self.keys, self.empty_prompt = cache, keys, empty_prompt
        self.folders, self.seed = folders, seed

    def read(self, position: StreamPosition) -> dict[str, Any]:
        """Reads one sample.

        Raises:
            DamagedEntry: a cache entry is missing, truncated or altered.
        """
        keys, folder = self.keys[position.index], self.folders[position.index]
        dropped = self._draw(CAPTION_DROPOUT, position) < folder.caption_dropout
        mirrored = len(keys.video) > 1 and self._draw(FLIP, position) < 0.5
        item: dict[str, Any] = {"number": position.number, "index": position.index}
        item["loss_weight"] = folder.loss_weight
        item["video"] = self.cache.read(keys.video[mirrored])
        item["prompt"] = self.cache.read(self.empty_prompt if dropped else keys.prompt)
        if keys.image:
            item["image"] = self.cache.read(keys.image[mirrored])
        for addition, names in keys.additions.items():
            item[addition] = self.cache.read(names[mirrored])
        return item

    def _draw(self, purpose: int, position: StreamPosition) -> float:
        return np.random.default_rng(seed_for(purpose, self.seed, position.number)).random()


def batches(
    dataset: CachedDataset, stream: Iterable[list[StreamPosition]], pin_memory: bool
) -> Iterator[dict[str, Any]]:
    """Yields a batch for each item of the stream, in the dtypes of the encoders. A thread reads the batches ahead.

    A batch holds `number`, `index` and `loss_weight` (lists), `video` [B, 2C, F, H, W], `prompt` [B, S, D] and, for
    i2v, `image` [B, K, 2C, 1, H, W] with K noise draws, and further condition frames by name [B, K, 2C, F, H, W].

    Args:
        pin_memory: whether to use pinned memory if there is a GPU.

    Raises:
        UserError: a cache entry was damaged or removed after the run started, or the host memory does not suffice.
    """
    device = torch.cuda.current_device() if pin_memory and torch.cuda.is_available() else None

    def load() -> Iterator[dict[str, Any]]:
        if device is not None:
            torch.cuda.set_device(device)  # a new thread uses GPU 0, where pinning would create a context for each rank
        for positions in stream:
            yield _collate([dataset.read(position) for position in positions], device is not None)

    try:
        yield from prefetch(load(), PREFETCHED_BATCHES)
    except DamagedEntry as error:
        dataset.cache.remove(str(error))
        raise UserError(
            f"{dataset.cache.folder_of(str(error))}: the entry {error} was damaged or removed during training. Run the "
            "same command again to encode it again.",
            on_every_rank=False,
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("allocate memory|out of memory", str(error)):
            raise
        raise UserError(
            "The host memory does not suffice for the next batches; lower --batch_size, or try --pin_memory false.",
            on_every_rank=False,
        ) from error


def _collate(items: list[dict[str, Any]], pin_memory: bool) -> dict[str, Any]:
    return {
        name: _stack([item[name] for item in items], pin_memory)
        if torch.is_tensor(value)
        else [item[name] for item in items]
        for name, value in items[0].items()
    }


def _stack(tensors: list[torch.Tensor], pin_memory: bool) -> torch.Tensor:
    """Returns `torch.stack(tensors)`.

    NumPy copies in the calling thread. PyTorch would start a second pool of OpenMP threads, which competes with that of
    the training thread for the cores.
    """
    stacked = torch.empty(len(tensors), *tensors[0].shape, dtype=tensors[0].dtype, pin_memory=pin_memory)
    np.stack([tensor.view(torch.uint8).numpy() for tensor in tensors], out=stacked.view(torch.uint8).numpy())
    return stacked

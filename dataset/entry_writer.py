"""Writes the entries of encoded clips, and shows the progress of a process and of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from dataset.latent_cache import LatentCache


class ClipBar(tqdm):
    """A progress bar of one process, shown by the first one. The processes have shards of equal size.

    Args:
        total: number of clips of this process.
    """

    def __init__(self, total: int, rank: int, world_size: int) -> None:
        self.world_size, self.num_encoded = world_size, 0
        super().__init__(
            total=total,
            desc="Encoding clips",
            disable=rank != 0,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {speed}]",
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """The values of `bar_format`."""
        values: dict[str, Any] = super().format_dict
        rate = values["rate"] or values["n"] / max(values["elapsed"], 1e-3)
        return values | {"speed": self._speed(60 * rate)}

    def _speed(self, per_minute: float) -> str:
        all_processes = f", {self.world_size * per_minute:.1f} on {self.world_size} processes"
        return f"{per_minute:.1f} clips per minute" + (all_processes if self.world_size > 1 else "")

    def encoded(self) -> None:
        """Counts a clip that this process has encoded."""
        self.num_encoded += 1
        self.update()

    def summary(self) -> str:
        """Returns a line for the log; an empty string on other processes, or if this one has encoded no clip."""
        if self.disable or not self.num_encoded:
            return ""
        elapsed = self.format_dict["elapsed"]
        speed = self._speed(60 * self.num_encoded / elapsed)
        by = f" on process 0 of {self.world_size}" if self.world_size > 1 else ""
        return f"Encoded {self.num_encoded} clips in {self.format_interval(elapsed)}{by}: {speed}"


class ClipWriter:
    """Writes the entries of one job after another.

    Attributes:
        errors: entry name -> error, for each entry that is not finite.
    """

    def __init__(self, cache: LatentCache, bar: ClipBar) -> None:
        self.cache, self.bar = cache, bar
        self.errors: dict[str, str] = {}
        self.moments: dict[str, torch.Tensor] | None = None
        self.wait: Callable[[], None] | None = None

    def add(self, moments: dict[str, torch.Tensor], wait: Callable[[], None] | None) -> None:
        """Writes moments at once. With `wait`, writes those of the job before, while a GPU computes these.

        Args:
            wait: waits for the moments.
        """
        self.finish()
        self.moments, self.wait = moments, wait
        if wait is None:
            self.finish()

    def finish(self) -> None:
        """Writes what is left."""
        if self.moments is None:
            return
        if self.wait is not None:
            self.wait()
        for name, tensor in self.moments.items():
            if tensor.isfinite().all():
                self.cache.write(name, tensor)
            else:
                self.errors[name] = "has latents that are not finite"
        self.moments = None
        self.bar.encoded()

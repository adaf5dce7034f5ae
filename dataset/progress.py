"""The progress of encoding clips: clips per minute and the time left, of one process and of all."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


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

    def print_summary(self) -> None:
        """Prints one line, on the first process if it has encoded clips."""
        if self.disable or not self.num_encoded:
            return
        elapsed = self.format_dict["elapsed"]
        speed = self._speed(60 * self.num_encoded / elapsed)
        by = f" on process 0 of {self.world_size}" if self.world_size > 1 else ""
        self.write(f"Encoded {self.num_encoded} clips in {self.format_interval(elapsed)}{by}: {speed}")

"""Length of a run and due dates, in optimizer updates."""

from __future__ import annotations

import math


def total_updates(train_steps: int | None, epochs: int, dataset_size: int, samples_per_update: int) -> int:
    """Returns `train_steps` if set, otherwise the number of updates in `epochs` passes over the dataset."""
    return train_steps or math.ceil(epochs * dataset_size / samples_per_update)


def is_due(step: int, every: int, total: int) -> bool:
    """Whether a periodic action is due after update `step`: after every `every` updates and after the last one."""
    return step > 0 and (step % every == 0 or step == total)

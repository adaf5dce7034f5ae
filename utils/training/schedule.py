"""When things happen, counted in optimizer updates done so far."""

from __future__ import annotations

import math


def total_updates(train_steps: int | None, epochs: int, dataset_size: int, samples_per_update: int) -> int:
    """`train_steps` where given, else what `epochs` passes over the dataset take."""
    return train_steps or math.ceil(epochs * dataset_size / samples_per_update)


def is_due(step: int, every: int, total: int) -> bool:
    """After update `step` (counted from 1): at every `every`th update and at the last."""
    return step > 0 and (step % every == 0 or step == total)

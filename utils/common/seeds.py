"""Seeds derived from a purpose, the seed of the run and a position."""

from __future__ import annotations

import numpy as np

# What a random number is for: the same seed and position serve each purpose with numbers of its own.
ORDER, CAPTION_DROPOUT, DRAWS, HELD_OUT, FLIP, ROUNDING = range(6)


def seed_for(purpose: int, seed: int, number: int) -> int:
    """A well-mixed 63-bit seed for item `number` of what `seed` starts."""
    return int(np.random.SeedSequence([purpose, seed, number]).generate_state(1, np.uint64)[0] >> 1)

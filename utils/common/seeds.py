"""Seeds derived from a purpose, the seed of the run and a position."""

from __future__ import annotations

import numpy as np

# Purposes of random numbers. Each purpose gets its own numbers from the same seed and position.
ORDER, CAPTION_DROPOUT, DRAWS, HELD_OUT, FLIP, ROUNDING, CONDITION_FRAMES = range(7)


def seed_for(purpose: int, seed: int, number: int) -> int:
    """Returns a well-mixed 63-bit seed for item `number` of a sequence."""
    return int(np.random.SeedSequence([purpose, seed, number]).generate_state(1, np.uint64)[0] >> 1)

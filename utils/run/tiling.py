"""Chooses whether the VAE encodes clips in tiles or as whole pictures, for `--enable_tiling auto`.

Both give other bytes, so the choice is part of the cache keys. A latent cache that holds entries of these clips
therefore decides before the free memory does, and a run that is repeated encodes nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable

from utils.common.subprocesses import run_in_subprocess
from utils.estimate.context import Machine, RunContext
from utils.estimate.prediction import required_gib
from utils.estimate.simulated_run import clip_encoding_peak
from utils.run.plan import RunPlan


def choose_tiling(make: Callable[[bool], RunPlan], context: RunContext, machine: Machine) -> tuple[RunPlan, set[str]]:
    """Returns the plan of a run that encodes in tiles or whole pictures, and the entries that its cache lacks.

    If clips are still to be encoded, a note of the plan tells what `auto` has chosen and why.

    Args:
        make: whether to encode in tiles -> plan.
    """
    choice = context.args.system.enable_tiling
    tiles = make(choice is not False)
    missing = tiles.missing_entries()
    num_entries, num_tiled = count_clip_entries(tiles, missing)
    if choice != "auto" or num_tiled == num_entries:
        return tiles, missing
    whole = make(False)
    missing_whole = whole.missing_entries()
    _, num_whole = count_clip_entries(whole, missing_whole)
    if num_tiled or num_whole:
        in_tiles = num_tiled >= num_whole
        reason = f"as {max(num_tiled, num_whole)} of {num_entries} entries in the latent cache are"
    elif machine.gpu_gib is None:
        in_tiles, reason = True, "since there is no GPU"
    else:
        needed_gib = required_gib(run_in_subprocess(clip_encoding_peak, context, False))
        budget = context.args.memory.vram_budget_gib
        limit_gib = min(machine.gpu_gib, budget) if isinstance(budget, float) else machine.gpu_gib
        in_tiles = needed_gib > limit_gib
        reason = f"since whole pictures need {needed_gib:.1f} GiB with a margin, and {limit_gib:.1f} GiB are available"
    plan, missing = (tiles, missing) if in_tiles else (whole, missing_whole)
    plan.notes.append(f"--enable_tiling auto: clips are encoded {'in tiles' if in_tiles else 'whole'}, {reason}.")
    return plan, missing


def count_clip_entries(plan: RunPlan, missing: set[str]) -> tuple[int, int]:
    """Returns the number of entries that the VAE encodes, and of those that the cache holds."""
    names = {name for keys in plan.keys + plan.validation_keys for name in keys.pixels}
    return len(names), len(names - missing)

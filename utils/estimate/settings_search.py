"""Settings for the memory that there is: the fastest of those that are predicted to fit."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil
import torch

from utils.common.errors import UserError
from utils.config.args import Args
from utils.estimate.prediction import GIB, Prediction, combine, extrapolated_updates, gib_to_have, non_training_peaks
from utils.model.spec import ModelSpec
from utils.training.trainable import compile_error

# What the choice is about; every setting names some of it, and all together name all.
CHOSEN = (
    *("gradient_checkpointing", "offload_activations", "quantize_base", "quantize_optimizer"),
    *("optimizer_in_backward", "offload_optimizer", "offload_text_encoder", "autocast", "compile_blocks"),
)
# What blocks keep, from the fastest to the smallest, each with the share of an update's time that it costs: what is
# computed anew, of work; copies are made beside it. These and those below are estimates; no GPU has measured them.
ACTIVATIONS: tuple[tuple[float, dict[str, Any]], ...] = (
    (0.0, {"gradient_checkpointing": "none", "offload_activations": False}),
    (0.2, {"gradient_checkpointing": "selective", "offload_activations": False}),
    (0.22, {"gradient_checkpointing": "selective", "offload_activations": True}),
)


def weights_and_states(
    args: Args, zero: dict[str, Any] | None, num_processes: int
) -> Iterator[tuple[float, dict[str, Any]]]:
    """How weights and optimizer may be held, as above: codes have to be decoded, and the host's Adam is slow.

    Compiled blocks are reported to be a sixth faster whatever else is chosen. The attention kernel is left to torch,
    which takes cuDNN's where it is faster.
    """
    training, is_lora = args.training, args.model.training_type == "lora"
    can_be_plain = zero is None and training.mixed_precision != "no"
    exact = {
        **{"quantize_base": "none", "quantize_optimizer": "none", "optimizer_in_backward": False},
        **{"offload_optimizer": False, "autocast": not (can_be_plain and is_lora)},
        "compile_blocks": zero is None and not (torch.cuda.is_available() and compile_error()),
    }
    yield 0.0, exact
    if zero is not None:
        return
    if is_lora:
        yield 0.03, exact | {"quantize_base": "int8"}
        yield 0.06, exact | {"quantize_base": "int4"}
        return
    keeps_none = num_processes == training.gradient_accumulation_steps == 1 and training.max_grad_norm == 0
    of_half = exact | {"autocast": not can_be_plain}
    quantized = of_half | {"optimizer_in_backward": keeps_none and training.mixed_precision != "fp16"}
    yield 0.4, quantized | {"quantize_optimizer": "8bit"}
    yield 0.45, quantized | {"quantize_optimizer": "4bit"}
    if num_processes == 1:
        yield 1.5, of_half | {"offload_optimizer": True}


def free_gpu_memory() -> float | None:
    """GiB of this process's GPU; None without one."""
    return torch.cuda.mem_get_info()[0] / GIB if torch.cuda.is_available() else None


def free_host_memory() -> float:
    """GiB of this machine; without end where it has no GPU, since the run will be on another."""
    return psutil.virtual_memory().available / GIB if torch.cuda.is_available() else math.inf


def host_gib(prediction: Prediction, num_processes: int) -> float:
    """GiB of host memory that this machine's share of the processes needs for what is offloaded."""
    return prediction.host / GIB * int(os.environ.get("LOCAL_WORLD_SIZE", num_processes)) / num_processes


def fit_to_budget(
    args: Args,
    spec: ModelSpec,
    text_encoder: dict[str, Any],
    zero: dict[str, Any] | None,
    num_processes: int,
    dictated: dict[str, Any],
) -> tuple[Args, str]:
    """The settings for `--vram_budget_gib`, and a note that says them as flags.

    Args:
        dictated: what is not to be chosen, since a checkpoint to go on from has it.

    Raises:
        UserError: nothing fits, or there is no GPU to ask.
    """
    budget = args.memory.vram_budget_gib
    if budget == "auto":
        budget = free_gpu_memory()
        if budget is None:
            raise UserError("--vram_budget_gib auto needs a GPU; say how many GiB there will be.")
    assert isinstance(budget, float)
    chosen = fastest_that_fits(args, spec, text_encoder, zero, num_processes, budget, dictated)
    if isinstance(chosen, Prediction):
        raise UserError(
            f"--vram_budget_gib {budget:g}: {gib_to_have(chosen.peak):.1f} GiB are needed with every saving on "
            f"(training {sum(chosen.training.values()) / GIB:.1f}, validation {chosen.validation / GIB:.1f}, encoding "
            f"{chosen.encoding / GIB:.1f} GiB, and a margin), beside {host_gib(chosen, num_processes):.1f} GiB of host "
            "memory. Fewer frames or a smaller --train_resolution need less."
        )
    return chosen, f"Fastest settings that fit {budget:g} GiB: {flags(chosen)}"


def fastest_that_fits(
    args: Args,
    spec: ModelSpec,
    text_encoder: dict[str, Any],
    zero: dict[str, Any] | None,
    num_processes: int,
    budget_gib: float,
    dictated: dict[str, Any],
) -> Args | Prediction:
    """The settings, or what the smallest of them would take."""
    choices = list(weights_and_states(args, zero, num_processes))
    # where none is left, reading the checkpoint tells what does not agree
    choices = [choice for choice in choices if choice[1].items() >= dictated.items()] or choices
    for offload in (False, True):  # slower once, and no update is
        args = replace(args, memory=replace(args.memory, offload_text_encoder=offload))
        beside = non_training_peaks(args, spec, text_encoder, zero is not None)
        if gib_to_have(beside.encoding) <= budget_gib:
            break
    known: dict[tuple[Any, ...], Prediction] = {}

    def predicted(settings: dict[str, Any]) -> Prediction:
        key = tuple(settings.values())
        if key not in known:
            tried = replace(args, memory=replace(args.memory, **settings))
            updates = extrapolated_updates(tried, spec, zero is not None, num_processes)
            known[key] = combine(tried, updates, beside, zero, num_processes)
        return known[key]

    def fits(settings: dict[str, Any]) -> bool:
        return gib_to_have(predicted(settings).peak) <= budget_gib

    best: tuple[float, dict[str, Any]] | None = None
    host = free_host_memory()
    for cost, activations in ACTIVATIONS:
        options = [
            (cost + more, activations | weights) for more, weights in choices if best is None or cost + more < best[0]
        ]
        while options and host_gib(predicted(options[-1][1]), num_processes) > host:
            options.pop()
        if options and fits(options[-1][1]):  # the smallest first: where it does not fit, no other does
            best = next(option for option in options if option is options[-1] or fits(option[1]))
    if best is None:
        return min(known.values(), key=lambda prediction: prediction.peak)
    return replace(args, memory=replace(args.memory, **best[1]))


def flags(args: Args) -> str:
    return " ".join(f"--{name} {str(getattr(args.memory, name)).lower()}" for name in CHOSEN)


def check_fits(
    args: Args, spec: ModelSpec, text_encoder: dict[str, Any], zero: dict[str, Any] | None, num_processes: int
) -> list[str]:
    """Compares what a run is predicted to take with what its GPU has free; returns notes.

    Raises:
        UserError: it cannot fit, even if the prediction misses nothing; says which flags would fit.
    """
    free = free_gpu_memory()
    if free is None:
        return []
    updates = extrapolated_updates(args, spec, zero is not None, num_processes)
    beside = non_training_peaks(args, spec, text_encoder, zero is not None)
    prediction = combine(args, updates, beside, zero, num_processes)
    needed = f"about {prediction.peak / GIB:.1f} GiB of GPU memory are needed, and {free:.1f} GiB are free"
    if prediction.peak / GIB > free:
        chosen = fastest_that_fits(args, spec, text_encoder, zero, num_processes, free, {})
        advice = f"These flags would fit: {flags(chosen)}" if isinstance(chosen, Args) else "No settings would fit"
        raise UserError(f"{needed[0].upper()}{needed[1:]}. {advice}.")
    notes = [f"{needed}; that is close."] if gib_to_have(prediction.peak) > free else []
    host, free_host = host_gib(prediction, num_processes), free_host_memory()
    if host > free_host:
        notes.append(f"about {host:.1f} GiB of host memory are needed for what is offloaded; {free_host:.1f} are free.")
    return notes

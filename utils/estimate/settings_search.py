"""Chooses memory settings: the fastest ones that are predicted to fit the memory of a machine.

The search leaves `--compile_blocks` as it is: compiled blocks are faster with any settings, and they are the default
where the machine can compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from utils.common.errors import UserError
from utils.common.units import GIB
from utils.config.args import Args
from utils.estimate.context import Machine, RunContext
from utils.estimate.prediction import (
    Prediction,
    combine,
    extrapolated_updates,
    non_training_peaks,
    predict,
    required_gib,
)
from utils.training.trainable import needs_autocast

# Options that the search sets. Each candidate sets some of them.
SEARCHED = (
    *("gradient_checkpointing", "offload_activations", "quantize_base", "quantize_optimizer"),
    *("optimizer_in_backward", "offload_optimizer", "offload_text_encoder", "autocast"),
)
Settings = dict[str, Any]
# How activations are saved, from fastest to smallest, with the estimated slowdown: the share of work that is
# recomputed. Copies overlap with computation. No GPU has measured these figures or those of `optimizer_candidates`.
ACTIVATION_CANDIDATES: tuple[tuple[float, Settings], ...] = (
    (0.0, {"gradient_checkpointing": "none", "offload_activations": False}),
    (0.2, {"gradient_checkpointing": "selective", "offload_activations": False}),
    (0.22, {"gradient_checkpointing": "selective", "offload_activations": True}),
)


def optimizer_candidates(context: RunContext) -> Iterator[tuple[float, Settings]]:
    """Ways to hold weights and optimizer states, from fastest to smallest, with the estimated slowdown.

    Quantized weights cost decoding, and Adam on the host is slow. Autocast is used where it is the default.
    """
    for slowdown, settings in _states_candidates(context):
        args = context.with_memory(**settings).args
        yield slowdown, settings | {"autocast": needs_autocast(args, context.uses_deepspeed)}


def _states_candidates(context: RunContext) -> Iterator[tuple[float, Settings]]:
    training = context.args.training
    exact: Settings = {
        **{"quantize_base": "none", "quantize_optimizer": "none", "optimizer_in_backward": False},
        "offload_optimizer": False,
    }
    yield 0.0, exact
    if context.uses_deepspeed:
        return
    if context.args.model.training_type == "lora":
        yield 0.03, exact | {"quantize_base": "int8"}
        yield 0.06, exact | {"quantize_base": "int4"}
        return
    one_pass = context.num_processes == training.gradient_accumulation_steps == 1 and training.max_grad_norm == 0
    quantized = exact | {"optimizer_in_backward": one_pass and training.mixed_precision != "fp16"}
    yield 0.4, quantized | {"quantize_optimizer": "8bit"}
    yield 0.45, quantized | {"quantize_optimizer": "4bit"}
    if context.num_processes == 1:
        yield 1.5, exact | {"offload_optimizer": True}


def host_gib(prediction: Prediction, context: RunContext, machine: Machine) -> float:
    """Host memory in GiB that this machine's share of the processes needs for offloaded tensors."""
    local_processes = machine.local_processes or context.num_processes
    return prediction.host / GIB * local_processes / context.num_processes


def fit_to_budget(context: RunContext, machine: Machine, fixed: Settings) -> tuple[Args, str]:
    """Returns the arguments for `--vram_budget_gib`, and a note that lists the chosen flags.

    Args:
        fixed: settings that must stay as in the checkpoint to resume from.

    Raises:
        UserError: nothing fits, or the budget is `auto` and there is no GPU.
    """
    budget = context.args.memory.vram_budget_gib
    if budget == "auto":
        budget = machine.gpu_gib
        if budget is None:
            raise UserError("--vram_budget_gib auto needs a GPU; give the budget in GiB instead.")
    assert isinstance(budget, float)
    chosen = fastest_that_fits(context, machine, budget, fixed)
    if isinstance(chosen, Prediction):
        raise UserError(
            f"--vram_budget_gib {budget:g}: {required_gib(chosen.peak):.1f} GiB are needed with every saving on "
            f"(training {sum(chosen.training.values()) / GIB:.1f}, validation {chosen.validation / GIB:.1f}, encoding "
            f"{chosen.encoding / GIB:.1f}, start {chosen.start / GIB:.1f} GiB, and a margin), and "
            f"{host_gib(chosen, context, machine):.1f} GiB of host memory. Use fewer frames or a smaller "
            "--train_resolution."
        )
    return chosen, f"Fastest settings that fit {budget:g} GiB: {flags(chosen)}"


def fastest_that_fits(context: RunContext, machine: Machine, budget_gib: float, fixed: Settings) -> Args | Prediction:
    """Returns the arguments with the fastest settings that fit, or else the smallest prediction."""
    candidates = list(optimizer_candidates(context))
    # Without a candidate that agrees with the checkpoint, the check of the checkpoint reports the difference.
    candidates = [candidate for candidate in candidates if candidate[1].items() >= fixed.items()] or candidates
    for offload in (False, True):  # one-time cost; steps are unaffected
        context = context.with_memory(offload_text_encoder=offload)
        other_peaks = non_training_peaks(context)
        if required_gib(other_peaks.encoding) <= budget_gib:
            break
    predictions: dict[tuple[Any, ...], Prediction] = {}

    def predicted(settings: Settings) -> Prediction:
        key = tuple(settings.values())
        if key not in predictions:
            candidate = context.with_memory(**settings)
            predictions[key] = combine(candidate, extrapolated_updates(candidate), other_peaks)
        return predictions[key]

    def fits(settings: Settings) -> bool:
        return required_gib(predicted(settings).peak) <= budget_gib

    best: tuple[float, Settings] | None = None
    for slowdown, activations in ACTIVATION_CANDIDATES:
        options = [
            (slowdown + more, activations | settings)
            for more, settings in candidates
            if best is None or slowdown + more < best[0]
        ]
        while options and host_gib(predicted(options[-1][1]), context, machine) > machine.host_gib:
            options.pop()
        if options and fits(options[-1][1]):  # if the smallest does not fit, no other does
            best = next(option for option in options if option is options[-1] or fits(option[1]))
    if best is None:
        return min(predictions.values(), key=lambda prediction: prediction.peak)
    return context.with_memory(**best[1]).args


def flags(args: Args) -> str:
    return " ".join(f"--{name} {str(getattr(args.memory, name)).lower()}" for name in SEARCHED)


def check_fits(context: RunContext, machine: Machine) -> list[str]:
    """Compares the predicted memory with the free memory of the GPU; returns notes. Does nothing without a GPU.

    Raises:
        UserError: the run cannot fit, even without a margin; names flags that would fit.
    """
    if machine.gpu_gib is None:
        return []
    prediction = predict(context)
    needed = f"about {prediction.peak / GIB:.1f} GiB of GPU memory are needed, and {machine.gpu_gib:.1f} GiB are free"
    if prediction.peak / GIB > machine.gpu_gib:
        chosen = fastest_that_fits(context, machine, machine.gpu_gib, {})
        advice = f"These flags would fit: {flags(chosen)}" if isinstance(chosen, Args) else "No settings would fit"
        raise UserError(f"{needed[0].upper()}{needed[1:]}. {advice}.")
    notes = [f"{needed}, which is close."] if required_gib(prediction.peak) > machine.gpu_gib else []
    host = host_gib(prediction, context, machine)
    if host > machine.host_gib:
        notes.append(
            f"about {host:.1f} GiB of host memory are needed for offloaded tensors; {machine.host_gib:.1f} are free."
        )
    return notes

"""Predicts GPU and host memory, work and time of a run, and the cards that it fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from utils.common.gpus import PEAK_TFLOPS
from utils.common.units import GIB
from utils.config.deepspeed_config import get_key
from utils.estimate.context import RunContext
from utils.estimate.simulated_run import (
    UpdateProfile,
    clip_encoding_peak,
    profile_generation,
    prompt_encoding_peak,
    simulate_updates,
)
from utils.estimate.start import start_peak
from utils.training.trainable import compute_dtype

# Safety margin, relative and in GiB, for the CUDA context, fragmentation and kernel workspaces. Fake tensors include
# none of these. No GPU has calibrated the margin yet.
MARGIN, CONTEXT_GIB = 1.15, 1.0
# Memory of common cards in GB.
CARDS_GB = (12, 16, 24, 32, 40, 48, 80, 141)
# Range of the GPU utilization that a training step is expected to reach.
UTILIZATION = (0.25, 0.5)
# Numbers of blocks to extrapolate from. The first must exceed the number of blocks with copies in flight.
SIMULATED_DEPTHS = (4, 5)


@dataclass(frozen=True)
class Prediction:
    """Peaks of one process in bytes, unless noted otherwise.

    Attributes:
        training: parts of the peak of an update, by name.
        validation: peak of generating a validation video; 0 without validation.
        encoding: peak of filling the latent cache.
        start: peak between loading the transformer and the first batch, resuming included.
        host: offloaded tensors of one machine.
        flop: floating-point operations of an update, recomputation included.
        traffic: bytes that an update reads from and writes to GPU memory, by kind of operation.
    """

    training: dict[str, int]
    validation: int
    encoding: int
    start: int
    host: int
    flop: int
    traffic: dict[str, int]

    @property
    def peak(self) -> int:
        return max(sum(self.training.values()), self.validation, self.encoding, self.start)


@dataclass(frozen=True)
class NonTrainingPeaks:
    """Peaks in bytes that do not depend on how the transformer is trained.

    Attributes:
        encoding: filling the latent cache.
        generating: a validation video, without the trained weights; 0 without validation.
    """

    encoding: int
    generating: int


def required_gib(peak: int) -> float:
    """Free memory in GiB that a card should have for a peak in bytes."""
    return peak / GIB * MARGIN + CONTEXT_GIB


def predict(context: RunContext) -> Prediction:
    """Simulates updates, a validation video and encoding on fake tensors."""
    return combine(context, extrapolated_updates(context), non_training_peaks(context))


def non_training_peaks(context: RunContext) -> NonTrainingPeaks:
    generating = 0
    if context.args.validation.do_validation:
        profile = profile_generation(context)
        generating = profile.vae + max(profile.denoising, profile.decoding)
    clips = clip_encoding_peak(context, context.args.system.uses_tiles)
    return NonTrainingPeaks(max(clips, prompt_encoding_peak(context)), generating)


def combine(context: RunContext, updates: UpdateProfile, other: NonTrainingPeaks) -> Prediction:
    """Combines the peaks. Adds DeepSpeed's states, and the tensors that stay on the GPU during validation."""
    training, host = updates.terms, context.num_processes * updates.host
    if context.zero is not None:
        itemsize = compute_dtype(context.args).itemsize
        training, offloaded = zero_terms(updates, context.zero, itemsize, context.num_processes)
        host += offloaded
    if context.args.training.ema_decay:  # float32, on the main process or divided among all
        host += 4 * updates.trained * (2 if context.args.validation.validate_ema else 1)  # the weights wait there
    validation = 0
    if other.generating:
        resident = ["weights", "adapters", "optimizer", *(["gradients"] if context.num_processes > 1 else [])]
        validation = other.generating + sum(training.get(name, 0) for name in resident)
    passes = context.args.training.gradient_accumulation_steps
    traffic = {kind: num_bytes * (1 if kind == "optimizer" else passes) for kind, num_bytes in updates.traffic.items()}
    start = start_peak(context, updates)
    return Prediction(training, validation, other.encoding, start, host, updates.flop * passes, traffic)


def extrapolated_updates(context: RunContext) -> UpdateProfile:
    """The result of `simulate_updates`, by linear extrapolation from 4 and 5 blocks; exact for up to 5 blocks.

    Each phase is extrapolated separately, because the peak of a deeper model can be in another phase. With 4 blocks,
    the backward pass has no middle.
    """
    num_layers, (shallow, deep) = context.spec.transformer["num_layers"], SIMULATED_DEPTHS
    if num_layers <= deep:
        return simulate_updates(context)
    small, large = (simulate_updates(context.with_num_layers(depth)) for depth in SIMULATED_DEPTHS)

    def extrapolate(at_shallow: int, at_deep: int) -> int:
        return at_deep + (at_deep - at_shallow) * (num_layers - deep) // (deep - shallow)

    phases = {}
    for phase, at_shallow in small.phases.items():
        terms = {name: extrapolate(num_bytes, large.phases[phase][name]) for name, num_bytes in at_shallow.items()}
        # If the peak is late in the backward pass, some saved activations are freed by then, which would make the
        # working set negative.
        freed = min(terms["working set"], 0)
        terms["saved activations"] += freed
        terms["working set"] -= freed
        phases[phase] = terms
    weights, trained, flop, host = (
        extrapolate(getattr(small, name), getattr(large, name)) for name in ("weights", "trained", "flop", "host")
    )
    traffic = {kind: extrapolate(small.traffic[kind], num_bytes) for kind, num_bytes in large.traffic.items()}
    return UpdateProfile(phases, weights, trained, flop, host, traffic)


def zero_terms(
    updates: UpdateProfile, zero: dict[str, Any], itemsize: int, num_processes: int
) -> tuple[dict[str, int], int]:
    """Returns the terms of one process, and the bytes that all processes of a machine offload to the host.

    DeepSpeed keeps float32 masters and Adam's two states, 12 bytes per trained weight, and gradients in the dtype of
    the weights. Each is divided among the processes from a certain stage on (arXiv:1910.02054, section 5). Buffer sizes
    come from the configuration. An update creates float32 gradients after the activations are freed.

    Args:
        itemsize: bytes of a weight.
    """
    section = zero["zero_optimization"]
    stage, trained = section["stage"], updates.trained
    offloads = {name: get_key(section, f"offload_{name}.device") == "cpu" for name in ("optimizer", "param")}
    shards = {name: num_processes if stage >= first else 1 for name, first in (("gradients", 2), ("weights", 3))}
    bucket = itemsize * section.get("reduce_bucket_size", 500_000_000)
    buffers = bucket * (2 if section.get("overlap_comm", stage == 3) else 1)
    if stage == 3:  # whole weights, gathered for the layers in use
        live = section.get("stage3_max_live_parameters", 1_000_000_000)
        prefetched = section.get("stage3_prefetch_bucket_size", 50_000_000)
        buffers += itemsize * min(live + prefetched, updates.weights)
    activations = {name: updates.terms[name] for name in ("saved activations", "working set")}
    gradients = 0 if offloads["optimizer"] else itemsize * trained // shards["gradients"]
    terms = {
        "weights": 0 if offloads["param"] else itemsize * updates.weights // shards["weights"],
        "optimizer": 0 if offloads["optimizer"] else 12 * trained // num_processes,
        "gradients": gradients,
        **activations,
        "buffers": buffers,
    }
    update = 0 if offloads["optimizer"] else 4 * trained // num_processes
    terms["working set"] += max(0, update - sum(activations.values()) - buffers)
    # float32 masters, gradients and Adam's states, and a buffer of the weights or gradients in their dtype
    host = (16 + itemsize) * trained * offloads["optimizer"] + itemsize * updates.weights * offloads["param"]
    return terms, host


def describe_encoding(context: RunContext) -> list[str]:
    """Returns a log line on the GPU memory that decides what `--enable_tiling auto` chooses."""
    if context.args.system.enable_tiling != "auto":
        return []
    peak = clip_encoding_peak(context, tiling=False)
    return [
        f"GPU memory of encoding clips without tiles: {peak / GIB:.1f} GiB; --enable_tiling auto does so where "
        f"{required_gib(peak):.1f} GiB are free"
    ]


def describe_generation(context: RunContext) -> list[str]:
    """Returns log lines on the GPU memory of `cli_demo.py` for the model and size of a run, without LoRA."""
    model = replace(context.args.model, training_type="lora")
    memory = replace(context.args.memory, autocast=False)
    lora = replace(context.args.lora, rank=1)
    context = replace(context, args=replace(context.args, model=model, memory=memory, lora=lora), zero=None)
    profile = profile_generation(context)
    text_encoder, by_layers = (
        prompt_encoding_peak(context.with_memory(offload_text_encoder=offload)) for offload in (False, True)
    )
    denoising, decoding = profile.transformer + profile.denoising, profile.vae + profile.decoding
    peaks = {
        "none": max(denoising + profile.vae, decoding + profile.transformer),
        "model": max(denoising, decoding),
    }
    by_offload = ", ".join(f"{peak / GIB:.1f} GiB with --offload {name}" for name, peak in peaks.items())
    return [
        f"GPU memory of cli_demo.py: {by_offload}; before that {text_encoder / GIB:.1f} GiB for the prompts, "
        f"or {by_layers / GIB:.1f} GiB with --offload_text_encoder"
    ]


def describe_prediction(prediction: Prediction, context: RunContext) -> list[str]:
    """Returns log lines."""

    def gib(num_bytes: float) -> str:
        return f"{num_bytes / GIB:.1f} GiB"

    terms = ", ".join(f"{name} {gib(num_bytes)}" for name, num_bytes in prediction.training.items() if num_bytes)
    tflop = prediction.flop / 1e12
    times = [
        f"{name} {' to '.join(f'{tflop / peak / share:.1f}' for share in reversed(UTILIZATION))} s"
        for name, peak in PEAK_TFLOPS.items()
    ]
    terabytes = f"{sum(prediction.traffic.values()) / 1e12:.2f}"
    traffic = ", ".join(f"{kind} {num_bytes / 1e12:.2f} TB" for kind, num_bytes in prediction.traffic.items())
    required = required_gib(prediction.peak)
    fitting = ", ".join(str(card) for card in CARDS_GB if card >= required)
    lines = [
        f"GPU memory of an update: {gib(sum(prediction.training.values()))} ({terms})",
        f"GPU memory of encoding clips and prompts, before training: {gib(prediction.encoding)}",
        f"GPU memory of starting or resuming, before the first update: {gib(prediction.start)}",
    ]
    if prediction.validation:
        lines.append(f"GPU memory of generating a validation video: {gib(prediction.validation)}")
    if prediction.host:
        lines.append(f"Host memory for offloaded tensors, per machine: {gib(prediction.host)}")
    video_tokens, text_tokens = context.spec.tokens(context.resolution)
    return [
        *lines,
        f"Required free GPU memory, with a safety margin: {required:.1f} GiB; "
        + (f"fits cards of {fitting} GB" if fitting else f"fits no card of up to {CARDS_GB[-1]} GB"),
        f"Work per update: {tflop:.0f} TFLOP; {video_tokens} video and {text_tokens} text tokens per sample",
        f"Memory traffic per update, without fused kernels: {terabytes} TB ({traffic})",
        f"Time per update, from data sheets, not measured: {', '.join(times)}",
    ]

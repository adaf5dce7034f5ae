"""What a run will take: memory of a GPU and of the host, work, time, and which cards it fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dataset.video import Resolution
from utils.config.args import Args
from utils.config.deepspeed_config import get
from utils.estimate.simulated_run import (
    Updates,
    peak_of_encoding_clips,
    peak_of_encoding_prompts,
    peak_of_generating,
    run_updates,
)
from utils.model.spec import ModelSpec
from utils.training.trainable import compute_dtype

GIB = 2**30
# Until a GPU has calibrated it: the CUDA context, fragments, workspaces of kernels, of which fake tensors know nothing.
MARGIN, BESIDE = 1.15, 1.0
CARDS = (12, 16, 24, 32, 40, 48, 80, 141)  # GiB, nearly, of cards as they are sold
# Dense bf16 TFLOP/s of the data sheets, and the share of them that a training step may reach.
GPUS = {"H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
UTILISATION = (0.25, 0.5)
# Copies under way are those of more blocks than the first of these.
SAMPLED_DEPTHS = (6, 8)


@dataclass(frozen=True)
class Prediction:
    """Of one process, in bytes, unless said otherwise.

    Attributes:
        training: what the peak of an update is made of.
        validation: peak while a validation video is made; 0 where none is.
        encoding: peak while the latent cache is filled.
        host: of one machine, for what is offloaded to it.
        flop: floating-point operations of an update, those of recomputing included.
    """

    training: dict[str, int]
    validation: int
    encoding: int
    host: int
    flop: int

    @property
    def peak(self) -> int:
        return max(sum(self.training.values()), self.validation, self.encoding)


@dataclass(frozen=True)
class NonTrainingPeaks:
    """Peaks in bytes of what is not training, and does not depend on how the transformer is trained.

    Attributes:
        encoding: of filling the latent cache.
        generating: of a validation video, beside the trained weights; 0 where there is none.
    """

    encoding: int
    generating: int


def gib_to_have(peak: int) -> float:
    """Free memory that a card should have for a peak of so many bytes."""
    return peak / GIB * MARGIN + BESIDE


def predict(
    args: Args, spec: ModelSpec, text_encoder: dict[str, Any], zero: dict[str, Any] | None, num_processes: int
) -> Prediction:
    """Predicts from updates, a validation video and an encoding on fake tensors.

    Args:
        args: resolved.
        text_encoder: config of the T5 encoder.
        zero: DeepSpeed's configuration without "auto"; None for DDP.
    """
    updates = extrapolated_updates(args, spec, zero is not None, num_processes)
    beside = non_training_peaks(args, spec, text_encoder, zero is not None)
    return combine(args, updates, beside, zero, num_processes)


def non_training_peaks(
    args: Args, spec: ModelSpec, text_encoder: dict[str, Any], uses_deepspeed: bool
) -> NonTrainingPeaks:
    resolution = largest(args, spec)
    prompts = peak_of_encoding_prompts(spec, text_encoder, args.memory.offload_text_encoder)
    return NonTrainingPeaks(
        max(peak_of_encoding_clips(args, spec, resolution), prompts),
        peak_of_generating(args, spec, resolution, uses_deepspeed) if args.validation.do_validation else 0,
    )


def combine(
    args: Args, updates: Updates, beside: NonTrainingPeaks, zero: dict[str, Any] | None, num_processes: int
) -> Prediction:
    training, host = updates.terms, num_processes * updates.host
    if zero is not None:
        training, offloaded = zero_terms(updates, zero, compute_dtype(args).itemsize, num_processes)
        host += offloaded
    validation = 0
    if beside.generating:
        stays = ("weights", "adapters", "optimizer", *(["gradients"] if num_processes > 1 else []))
        validation = beside.generating + sum(training.get(name, 0) for name in stays)
    flop = updates.flop * args.training.gradient_accumulation_steps
    return Prediction(training, validation, beside.encoding, host, flop)


def extrapolated_updates(args: Args, spec: ModelSpec, uses_deepspeed: bool, num_processes: int) -> Updates:
    """What `run_updates` would find, from transformers of few blocks: all of it is a line in their number, nearly."""
    blocks, (few, more) = spec.transformer["num_layers"], SAMPLED_DEPTHS
    if blocks <= more:
        return run_updates(args, spec, largest(args, spec), uses_deepspeed, num_processes)
    small, large = (
        run_updates(
            args,
            replace(spec, transformer=spec.transformer | {"num_layers": count}),
            largest(args, spec),
            uses_deepspeed,
            num_processes,
        )
        for count in SAMPLED_DEPTHS
    )

    def extrapolate(at_few: int, at_more: int) -> int:
        return at_more + (at_more - at_few) * (blocks - more) // (more - few)

    terms = {name: extrapolate(small.terms[name], large.terms[name]) for name in large.terms}
    gone = min(terms["working set"], 0)  # where many gradients make the peak, less of what was kept is left by then
    terms |= {"kept activations": terms["kept activations"] + gone, "working set": terms["working set"] - gone}
    weights, trained, flop, host = (
        extrapolate(getattr(small, name), getattr(large, name)) for name in ("weights", "trained", "flop", "host")
    )
    return Updates(terms, weights, trained, flop, host)


def largest(args: Args, spec: ModelSpec) -> Resolution:
    """The training resolution with the most tokens."""
    return max(args.data.train_resolution, key=lambda resolution: sum(spec.tokens(resolution)))


def zero_terms(updates: Updates, zero: dict[str, Any], itemsize: int, num_processes: int) -> tuple[dict[str, int], int]:
    """The terms of a process, and the bytes offloaded to the host of a machine with all processes.

    DeepSpeed keeps float32 masters and Adam's two states, 12 bytes a trained weight, and gradients in the dtype of the
    weights, each divided among the processes from some stage on (arXiv:1910.02054, section 5); the buffers are those of
    the configuration. An update makes float32 gradients when the activations are gone.

    Args:
        itemsize: bytes of a weight.
    """
    section = zero["zero_optimization"]
    stage, trained = section["stage"], updates.trained
    offloads = {name: get(section, f"offload_{name}.device") == "cpu" for name in ("optimizer", "param")}
    share = {name: num_processes if stage >= first else 1 for name, first in (("gradients", 2), ("weights", 3))}
    bucket = itemsize * section.get("reduce_bucket_size", 500_000_000)
    buffers = bucket * (2 if section.get("overlap_comm", stage == 3) else 1)
    if stage == 3:  # whole weights, gathered for the layers at work
        live = section.get("stage3_max_live_parameters", 1_000_000_000)
        ahead = section.get("stage3_prefetch_bucket_size", 50_000_000)
        buffers += itemsize * min(live + ahead, updates.weights)
    activations = {name: updates.terms[name] for name in ("kept activations", "working set")}
    gradients = 0 if offloads["optimizer"] else itemsize * trained // share["gradients"]
    terms = {
        "weights": 0 if offloads["param"] else itemsize * updates.weights // share["weights"],
        "optimizer": 0 if offloads["optimizer"] else 12 * trained // num_processes,
        "gradients": gradients,
        **activations,
        "buffers": buffers,
    }
    update = 0 if offloads["optimizer"] else 4 * trained // num_processes
    terms["working set"] += max(0, update - sum(activations.values()) - buffers)
    host = 16 * trained * offloads["optimizer"] + itemsize * updates.weights * offloads["param"]
    return terms, host


def describe_prediction(prediction: Prediction, args: Args, spec: ModelSpec) -> list[str]:
    """Lines for the log."""

    def gib(bytes_: float) -> str:
        return f"{bytes_ / GIB:.1f} GiB"

    terms = ", ".join(f"{name} {gib(bytes_)}" for name, bytes_ in prediction.training.items() if bytes_)
    tflop = prediction.flop / 1e12
    times = [
        f"{name} {' to '.join(f'{tflop / peak / share:.1f}' for share in reversed(UTILISATION))} s"
        for name, peak in GPUS.items()
    ]
    fits = ", ".join(str(card) for card in CARDS if card >= gib_to_have(prediction.peak))
    lines = [
        f"Memory of a GPU: {gib(sum(prediction.training.values()))} in an update ({terms})",
        f"Before that, encoding clips and prompts: {gib(prediction.encoding)}",
    ]
    if prediction.validation:
        lines.append(f"A validation video: {gib(prediction.validation)}")
    if prediction.host:
        lines.append(f"Host memory of the machine, for what is offloaded: {gib(prediction.host)}")
    video_tokens, text_tokens = spec.tokens(largest(args, spec))
    return [
        *lines,
        f"To have free, with a margin for what cannot be predicted: {gib_to_have(prediction.peak):.1f} GiB; "
        + (f"fits cards of {fits} GB" if fits else f"fits no card of {CARDS[-1]} GB or less"),
        f"Work of an update: {tflop:.0f} TFLOP, {video_tokens} video and {text_tokens} text tokens a sample",
        f"Time of an update, by data sheets and not measured: {', '.join(times)}",
    ]

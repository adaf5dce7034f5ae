"""Seconds of an update by part, and the work that the update does in this time."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from dataset.video import Resolution
from utils.common.gpus import peak_tflops
from utils.common.units import GIB
from utils.config.args import Args
from utils.model.spec import ModelSpec

# Parts of an update: waiting for data, forward and backward passes, clipping and optimizer.
DATA, MODEL, OPTIMIZER = "data_s", "forward_backward_s", "optimizer_s"


@dataclass(frozen=True)
class Work:
    """The work of one update.

    Attributes:
        tokens: video and text tokens on all processes.
        flop: useful floating-point operations on one process; see `model_flop`.
    """

    tokens: int
    flop: float


def work_per_update(args: Args, spec: ModelSpec, num_trained: int, num_processes: int, resolution: Resolution) -> Work:
    """Returns the work of one update on samples of one resolution.

    Args:
        num_trained: number of trained weights.
    """
    samples = args.training.batch_size * args.training.gradient_accumulation_steps
    adapter_weights = num_trained if args.model.training_type == "lora" else 0
    return Work(
        tokens=samples * num_processes * sum(spec.tokens(resolution)),
        flop=samples * model_flop(spec, resolution, adapter_weights),
    )


def model_flop(spec: ModelSpec, resolution: Resolution, adapter_weights: int) -> float:
    """Returns the useful floating-point operations of a forward and backward pass on one sample.

    These are the matrix products of linear layers and attention; a multiply-add counts as two. Recomputation is left
    out: that of checkpointed blocks, and that of the scores in the backward pass of attention. So is the product for a
    gradient that training does not need (PaLM, arXiv:2204.02311, appendix B).

    Args:
        adapter_weights: number of LoRA weights; 0 for full fine-tuning.
    """
    config, width = spec.transformer, spec.width
    video, text = spec.tokens(resolution)
    tokens, blocks, is_lora = video + text, config["num_layers"], adapter_weights > 0
    patch = spec.patch_size**2 * (spec.patch_size_t or 1)
    embedding = width * (video * patch * config["in_channels"] + text * config["text_embed_dim"])
    linear = tokens * 12 * width**2 * blocks  # four products of attention, eight of the feed-forward layers
    # a frozen layer has no gradient of its weights; nothing before the first adapter has any gradient
    without_gradient = tokens * 3 * width**2 if is_lora else embedding
    output = video * width * patch * config["out_channels"]
    passes = 2 if is_lora else 3
    products = passes * (linear + output) + (1 if is_lora else 3) * embedding - without_gradient
    attention = 3 * 2 * tokens**2 * width * blocks
    return 2.0 * (products + 3 * tokens * adapter_weights + attention)


class StepTimer:
    """Times the parts of each update without making the host wait for the GPU.

    On a GPU, a mark is a CUDA event. The events of an update are read once the next update is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.peak_tflops = peak_tflops(torch.cuda.get_device_name(device)) if self.is_cuda else None
        self.laps: list[dict[str, float]] = []
        self.parts: list[dict[str, float]] = []
        self._previous: list[tuple[str, Any]] = []
        self.start()

    def start(self) -> None:
        """Starts timing an update."""
        self._started = time.perf_counter()
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def mark(self, part: str) -> None:
        """Ends a part of the update. The part began at the mark before."""
        self._marks.append((part, self._now()))

    def lap(self, work: Work) -> dict[str, float]:
        """Ends the update and returns its metrics. The seconds of the parts are those of the update before.

        Call it after the host has read a result of the update; otherwise the seconds would not include all of its work.
        """
        seconds = time.perf_counter() - self._started
        tflops = work.flop / seconds / 1e12
        lap = {"step_s": seconds, "tokens_per_s": work.tokens / seconds, "tflops": tflops}
        if self.peak_tflops is not None:
            lap["utilization"] = tflops / self.peak_tflops
        self.laps.append(lap)
        if self.is_cuda:
            lap = lap | {"reserved_gib": torch.cuda.max_memory_reserved() / GIB}
        return lap | self._read_parts()

    def summary(self) -> str:
        """Describes the updates of this run; figures are medians."""
        self._read_parts()
        median = {
            name: statistics.median(values[name] for values in group)
            for group in (self.laps, self.parts)
            for name in group[0]
        }
        utilization = f" ({median['utilization']:.0%} of the GPU's peak)" if "utilization" in median else ""
        return (
            f"{len(self.laps)} updates in this run, {median['step_s']:.3g} s per step (data {median[DATA]:.2g}, "
            f"forward and backward {median[MODEL]:.3g}, optimizer {median[OPTIMIZER]:.2g}), "
            f"{median['tokens_per_s']:.0f} tokens/s, {median['tflops']:.3g} TFLOP/s per process{utilization}"
        )

    def _read_parts(self) -> dict[str, float]:
        """Returns the seconds of the parts of the previous update; empty for the first update."""
        marks, self._previous = self._previous, self._marks
        if not marks:
            return {}
        if self.is_cuda:
            marks[-1][1].synchronize()  # reached long ago
        parts = dict.fromkeys((DATA, MODEL, OPTIMIZER), 0.0)
        for (_, start), (part, end) in pairwise(marks):
            parts[part] += start.elapsed_time(end) / 1000 if self.is_cuda else end - start
        self.parts.append(parts)
        return parts

    def _now(self) -> Any:
        """Returns the present on the clock of the device: a CUDA event or seconds."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

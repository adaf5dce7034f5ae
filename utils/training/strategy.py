"""DDP and DeepSpeed behind one interface. Checkpoints, which differ too, are in `utils.checkpoint.manager`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
)

from utils.config.args import Args
from utils.training.divergence import gradient_overflow_error
from utils.training.metrics import TRACKERS
from utils.training.optimizer import clip, make_loss_scale


class Strategy(Protocol):
    """The interface that the training loop uses.

    Attributes:
        uses_deepspeed: whether DeepSpeed owns weights, gradients and updates.
    """

    uses_deepspeed: bool
    accelerator: Accelerator

    def transformer_folder(self, model_dir: Path, resume_from: Path | None) -> Path:
        """Returns the folder of the weights to start from."""

    def prepare(self, transformer: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Wraps model and optimizer for distributed training."""

    def backward(self, loss: torch.Tensor, step: int) -> None:
        """Accumulates gradients of the mean loss of a micro-batch."""

    def clip_gradients(self) -> float:
        """Clips the gradients of an update to `--max_grad_norm`; returns their norm before clipping."""


class DDP:
    """Every process holds all weights and states. With several processes, accelerate adds DistributedDataParallel."""

    uses_deepspeed = False

    def __init__(self, args: Args) -> None:
        self.args = args
        self.accelerator = make_accelerator(args, args.training.mixed_precision if args.memory.autocast else "no")

    def transformer_folder(self, model_dir: Path, resume_from: Path | None) -> Path:
        """Returns the transformer of the checkpoint to resume full fine-tuning from, otherwise that of the base."""
        if resume_from is not None and self.args.model.training_type == "sft":
            return resume_from / "transformer"
        return model_dir / "transformer"

    def prepare(self, transformer: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        if self.args.training.mixed_precision == "fp16":
            self.accelerator.scaler = make_loss_scale(self.args, self.accelerator.device)
        placement = [True, not self.args.memory.offload_optimizer]
        model, wrapped_optimizer = self.accelerator.prepare(transformer, optimizer, device_placement=placement)
        self.optimizer = wrapped_optimizer.optimizer
        return model, wrapped_optimizer

    def backward(self, loss: torch.Tensor, step: int) -> None:
        self.accelerator.backward(loss)

    def clip_gradients(self) -> float:
        scaler, max_norm = self.accelerator.scaler, self.args.training.max_grad_norm
        if scaler is None:
            return float(clip(self.optimizer, max_norm))
        scaler.unscale_(self.optimizer)
        return float(clip(self.optimizer, max_norm, scaler.get_scale()))


class DeepSpeed:
    """ZeRO shards optimizer states, gradients and weights. The last `backward` of an update updates the weights."""

    uses_deepspeed = True

    def __init__(self, args: Args, config: dict[str, Any]) -> None:
        self.args = args
        self.accelerator = make_accelerator(
            args, args.training.mixed_precision, DeepSpeedPlugin(config, zero3_init_flag=False)
        )

    def transformer_folder(self, model_dir: Path, resume_from: Path | None) -> Path:
        """Always returns the base: DeepSpeed loads the weights of a checkpoint itself."""
        return model_dir / "transformer"

    def prepare(self, transformer: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        return self.accelerator.prepare(transformer, optimizer)

    def backward(self, loss: torch.Tensor, step: int) -> None:
        try:
            self.accelerator.backward(loss)
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise gradient_overflow_error(step) from error

    def clip_gradients(self) -> float:
        return float(self.accelerator.clip_grad_norm_((), self.args.training.max_grad_norm or math.inf))


def make_strategy(args: Args, zero: dict[str, Any] | None) -> Strategy:
    """Returns the strategy of a run.

    Args:
        zero: DeepSpeed configuration without "auto"; None for DDP.
    """
    return DDP(args) if zero is None else DeepSpeed(args, zero)


def make_accelerator(args: Args, mixed_precision: str | None, plugin: DeepSpeedPlugin | None = None) -> Accelerator:
    output_dir = args.output.output_dir
    return Accelerator(
        mixed_precision=mixed_precision,
        # unlike the plain number, a plugin is not overridden by ACCELERATE_GRADIENT_ACCUMULATION_STEPS
        gradient_accumulation_plugin=GradientAccumulationPlugin(args.training.gradient_accumulation_steps),
        log_with=TRACKERS[args.output.report_to] or None,
        deepspeed_plugin=plugin,
        # Gradients are views of DDP's buckets, without a second copy. Buffers (positions, codes of a quantized base)
        # are equal on all processes and need no broadcast per forward pass.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "logs")),
    )

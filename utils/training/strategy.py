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
from diffusers import CogVideoXTransformer3DModel

from utils.config.args import Args
from utils.model.loading import load_transformer
from utils.training.divergence import gradient_overflow_error
from utils.training.metrics import TRACKERS
from utils.training.optimizer import LossScale, clip
from utils.training.trainable import weight_dtype


class Strategy(Protocol):
    """The interface that the training loop uses.

    Attributes:
        uses_deepspeed: whether DeepSpeed owns weights, gradients and updates.
    """

    uses_deepspeed: bool
    accelerator: Accelerator

    def load_transformer(self, model_dir: Path, resume_from: Path | None) -> CogVideoXTransformer3DModel:
        """Loads the weights to start from."""

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

    def load_transformer(self, model_dir: Path, resume_from: Path | None) -> CogVideoXTransformer3DModel:
        """Loads the base, or the transformer of the checkpoint to resume full fine-tuning from.

        A base that will be quantized stays on the host.
        """
        is_sft, is_quantized = self.args.model.training_type == "sft", self.args.memory.quantize_base != "none"
        folder = resume_from if is_sft and resume_from is not None else model_dir
        device = "cpu" if is_quantized else self.accelerator.device.type
        dtype = weight_dtype(self.args, self.uses_deepspeed)
        return load_transformer(folder / "transformer", dtype, device, self.args.model.variant)

    def prepare(self, transformer: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        if self.args.training.mixed_precision == "fp16":
            self.accelerator.scaler = LossScale(self.accelerator.device.type)
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
        self.args, self.config = args, config
        self.accelerator = make_accelerator(
            args, args.training.mixed_precision, DeepSpeedPlugin(config, zero3_init_flag=False)
        )

    def load_transformer(self, model_dir: Path, resume_from: Path | None) -> CogVideoXTransformer3DModel:
        """Loads the base; DeepSpeed loads the weights of a checkpoint itself. Weights to be divided stay on the host.

        On the host they keep the dtype of the files, so the processes of a machine share the memory-mapped pages.
        """
        folder, variant = model_dir / "transformer", self.args.model.variant
        if self.divides_weights:
            return load_transformer(folder, variant=variant)
        dtype = weight_dtype(self.args, self.uses_deepspeed)
        return load_transformer(folder, dtype, self.accelerator.device.type, variant)

    @property
    def divides_weights(self) -> bool:
        return self.config["zero_optimization"]["stage"] == 3

    def prepare(self, transformer: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        if self.divides_weights:
            dtype = weight_dtype(self.args, self.uses_deepspeed)
            divide_weights(transformer, self.config, self.accelerator.device, dtype)
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


def divide_weights(
    transformer: torch.nn.Module, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> None:
    """Divides the weights among the processes as ZeRO-3 does, one block at a time.

    `deepspeed.initialize` alone would first move the whole transformer to the GPU. It accepts divided weights as they
    are, without casting them or moving buffers.

    Args:
        config: DeepSpeed configuration without "auto".
    """
    from deepspeed import zero  # takes two seconds to import

    # DeepSpeed checks the batch size against the number of processes, which it does not know yet
    config = {key: value for key, value in config.items() if key != "train_batch_size"}
    for child in transformer.children():
        for module in child if isinstance(child, torch.nn.ModuleList) else [child]:
            module.to(device, dtype)
            zero.Init(module=module, config_dict_or_path=config)


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

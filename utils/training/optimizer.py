"""Optimizer and learning-rate schedule, both counted in optimizer updates whatever the number of processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler

from utils.config.args import Args, TrainingArgs
from utils.memory.cpu_offload_adam import CPUOffloadAdam
from utils.memory.low_bit_adam import LowBitAdam


def make_optimizer(parameters: list[torch.nn.Parameter], args: Args, uses_deepspeed: bool) -> torch.optim.Optimizer:
    training = args.training
    settings, is_decoupled = _settings(training), training.optimizer == "adamw"
    if args.memory.offload_optimizer:
        return CPUOffloadAdam(parameters, **settings, decoupled_weight_decay=is_decoupled)
    if args.memory.quantize_optimizer != "none":
        return LowBitAdam(
            parameters,
            **settings,
            mean_bits={"8bit": 8, "4bit": 4}[args.memory.quantize_optimizer],
            decoupled_weight_decay=is_decoupled,
            seed=training.seed,
            in_backward=args.memory.optimizer_in_backward,
        )
    kind = torch.optim.AdamW if is_decoupled else torch.optim.Adam  # accelerate gives DeepSpeed's of the same class
    # Fused is one kernel, without the three temporary copies of all weights that the default makes. Not with torch's
    # loss scale: it leaves the skipping of an update to a fused optimizer, and nobody learns of it.
    return kind(parameters, **settings, fused=uses_deepspeed or training.mixed_precision != "fp16")


class LossScale(torch.amp.GradScaler):
    """Torch's dynamic loss scale for fp16, also for gradients that are in fp16 themselves.

    Those it looks through and leaves as they are; `LowBitAdam` divides them in float32.

    Args:
        device: where the gradients are.
    """

    def __init__(self, device: str, **options: Any) -> None:
        super().__init__(device, **options)
        self._lazy_init_scale_growth_tracker(torch.device(device))  # later it would go to where the loss is

    def _unscale_grads_(self, optimizer: Any, inv_scale: torch.Tensor, found_inf: Any, allow_fp16: bool) -> Any:
        if isinstance(optimizer, LowBitAdam):
            inv_scale, allow_fp16 = torch.ones_like(inv_scale), True
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)


def make_loss_scale(args: Args, device: torch.device) -> LossScale:
    return LossScale("cpu" if args.memory.offload_optimizer else device.type)


def clip_gradients(accelerator: Accelerator, optimizer: AcceleratedOptimizer, max_norm: float) -> torch.Tensor:
    """Clips the gradients to a norm, or not with 0; returns the norm they had, those that are gone already too."""
    inner, scaler = optimizer.optimizer, accelerator.scaler
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.clip_grad_norm_((), max_norm or math.inf)
    if scaler is None:
        return clip(inner, max_norm)
    scaler.unscale_(inner)
    return clip(inner, max_norm, scaler.get_scale())


def clip(optimizer: torch.optim.Optimizer, max_norm: float, scale: float = 1.0) -> torch.Tensor:
    """The same for one process; `scale` as of `LowBitAdam.clip`."""
    if isinstance(optimizer, LowBitAdam):
        return optimizer.clip(max_norm or math.inf, scale)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)


def _settings(args: TrainingArgs) -> dict[str, Any]:
    return {
        "lr": args.learning_rate,
        "betas": (args.beta1, args.beta2),
        "eps": args.epsilon,
        "weight_decay": args.weight_decay,
    }


def make_lr_scheduler(
    optimizer: Any, args: TrainingArgs, total_steps: int, step: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule from update `step` on; it is a function of the step alone. Takes the prepared optimizer.

    Is to be stepped once an update and not to be given to accelerate, which would step it once a process. Settings that
    a resumed optimizer has brought along give way to those of the command line.
    """
    while hasattr(optimizer, "optimizer"):  # out of the wrappers of accelerate and DeepSpeed
        optimizer = optimizer.optimizer
    for group in optimizer.param_groups:
        group.update(optimizer.defaults | group | _settings(args), initial_lr=args.learning_rate)
        group["fused"] = optimizer.defaults.get("fused")  # by the precision of now
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=total_steps,
        last_epoch=step - 1,
    )

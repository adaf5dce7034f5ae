"""Optimizer, loss scale, clipping and learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
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
            compiled=bool(args.memory.compile_blocks),
        )
    optimizer_class = torch.optim.AdamW if is_decoupled else torch.optim.Adam
    # With an offloaded optimizer, accelerate replaces this class with DeepSpeed's CPU Adam. The fused implementation is
    # one kernel; the default makes three temporary copies of all weights.
    optimizer = optimizer_class(parameters, **settings, fused=True)
    # By default, the fused kernel itself skips an update that overflows in fp16, and the loop cannot notice. With this
    # attribute False, GradScaler does not call `step` for such an update.
    optimizer._step_supports_amp_scaling = False
    return optimizer


class LossScale(torch.amp.GradScaler):
    """Torch's dynamic loss scale for fp16, extended to gradients that are fp16 themselves.

    fp16 gradients are only checked for overflow here; the optimizer unscales them in float32.

    Args:
        device: device type of the gradients.
    """

    def __init__(self, device: str, **options: Any) -> None:
        super().__init__(device, **options)
        self._lazy_init_scale_growth_tracker(torch.device(device))  # the default is the device of the loss

    def _unscale_grads_(self, optimizer: Any, inv_scale: torch.Tensor, found_inf: Any, allow_fp16: bool) -> Any:
        if isinstance(optimizer, CPUOffloadAdam):  # its gradients are on the host, and their norm is on the GPU
            norm = optimizer.norm()
            return {norm.device: (~norm.isfinite()).float()}
        if isinstance(optimizer, LowBitAdam):
            inv_scale, allow_fp16 = torch.ones_like(inv_scale), True
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)


def clip(optimizer: torch.optim.Optimizer, max_norm: float, scale: float = 1.0) -> torch.Tensor:
    """Clips the gradients to a maximum norm, unless it is 0. Returns the norm before clipping.

    The norm includes gradients that the optimizer has already consumed in the backward pass.

    Args:
        scale: loss scale that the gradients still carry, for optimizers with a `clip` of their own.
    """
    if isinstance(optimizer, LowBitAdam | CPUOffloadAdam):
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
    """Returns the learning-rate schedule from update `step` on. It depends on the step alone.

    Step it once per update. Do not prepare it with accelerate, which steps it once per process. The command line
    overrides the settings that a resumed optimizer restored.

    Args:
        optimizer: as prepared by the strategy.
        step: updates done.
    """
    while hasattr(optimizer, "optimizer"):  # unwrap accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    for group in optimizer.param_groups:
        group.update(optimizer.defaults | group | _settings(args), initial_lr=args.learning_rate)
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=total_steps,
        last_epoch=step - 1,
    )

"""Optimizer and learning-rate schedule, both counted in optimizer updates whatever the number of processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.optimization import get_scheduler

from utils.args import Args, TrainingArgs
from utils.host_adam import HostAdam
from utils.quantized_adam import QuantizedAdam


def make_optimizer(parameters: list[torch.nn.Parameter], args: Args, is_zero: bool) -> torch.optim.Optimizer:
    training = args.training
    settings, is_decoupled = _settings(training), training.optimizer == "adamw"
    if args.memory.offload_optimizer:
        return HostAdam(parameters, **settings, decoupled_weight_decay=is_decoupled)
    if args.memory.quantize_optimizer != "none":
        return QuantizedAdam(
            parameters,
            **settings,
            mean_bits={"8bit": 8, "4bit": 4}[args.memory.quantize_optimizer],
            decoupled_weight_decay=is_decoupled,
            seed=training.seed,
            release=args.memory.release_gradients,
        )
    kind = torch.optim.AdamW if is_decoupled else torch.optim.Adam  # accelerate gives DeepSpeed's of the same class
    return kind(parameters, **settings, fused=_is_fused(training, is_zero))


def clip_gradients(
    accelerator: Accelerator, optimizer: AcceleratedOptimizer, parameters: list[torch.nn.Parameter], max_norm: float
) -> torch.Tensor:
    """Clips the gradients to a norm, or not with 0; returns the norm they had, those that are gone already too."""
    inner = optimizer.optimizer
    if isinstance(inner, QuantizedAdam) and inner.release:
        return inner.released_norm()
    return accelerator.clip_grad_norm_(parameters, max_norm or math.inf)


def _is_fused(args: TrainingArgs, is_zero: bool) -> bool:
    """One kernel, without the three temporary copies of all weights that the default makes.

    Not with torch's loss scale: it leaves the skipping of an update to a fused optimizer, and nobody learns of it.
    """
    return is_zero or args.mixed_precision != "fp16"


def _settings(args: TrainingArgs) -> dict[str, Any]:
    return {
        "lr": args.learning_rate,
        "betas": (args.beta1, args.beta2),
        "eps": args.epsilon,
        "weight_decay": args.weight_decay,
    }


def make_lr_scheduler(
    optimizer: Any, args: TrainingArgs, is_zero: bool, total_steps: int, step: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule from update `step` on; it is a function of the step alone. Takes the prepared optimizer.

    Is to be stepped once an update and not to be given to accelerate, which would step it once a process. Settings that
    a resumed optimizer has brought along give way to those of the command line.
    """
    while hasattr(optimizer, "optimizer"):  # out of the wrappers of accelerate and DeepSpeed
        optimizer = optimizer.optimizer
    for group in optimizer.param_groups:
        group.update(optimizer.defaults | group | _settings(args), initial_lr=args.learning_rate)
        group["fused"] = bool(group.get("fused")) and _is_fused(args, is_zero)
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=total_steps,
        last_epoch=step - 1,
    )

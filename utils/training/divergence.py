"""Stops a run whose losses or gradients are no longer finite, before they reach a weight."""

from __future__ import annotations

import math
from typing import Any

import torch

from utils.common.errors import UserError

# A loss scale of 2^16 reaches 1 after this many halvings.
MAX_SKIPPED_UPDATES = 16
ADVICE = (
    "The last checkpoint is intact: resume from it with a lower --learning_rate, --max_grad_norm 1 or "
    "--mixed_precision bf16, or inspect the sample."
)


def check_losses(losses: torch.Tensor, timesteps: torch.Tensor, samples: list[Any], step: int) -> None:
    """Raises UserError with sample and timestep if a loss is not finite.

    Args:
        losses, timesteps: [B].
        samples: names of the samples, for the message.
        step: number of updates done.
    """
    for loss, timestep, sample in zip(losses.tolist(), timesteps.tolist(), samples, strict=True):
        if not math.isfinite(loss):
            raise UserError(
                f"The loss is {loss} at step {step + 1}, sample {sample}, timestep {timestep}. {ADVICE}",
                on_every_rank=False,
            )


def check_gradients(is_finite: bool, mixed_precision: str | None, step: int) -> None:
    """Raises UserError if the gradients are not finite, except in fp16, where such an update is skipped."""
    if not is_finite and mixed_precision != "fp16":
        raise UserError(f"The gradients are not finite at step {step + 1}. {ADVICE}")


def gradient_overflow_error(step: int) -> UserError:
    return UserError(
        f"The gradients of step {step + 1} overflow in fp16 at every loss scale; use --mixed_precision bf16."
    )

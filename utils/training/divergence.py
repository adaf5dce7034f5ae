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


def check_gradients(grad_norm: float, mixed_precision: str | None, step: int) -> None:
    """Raises UserError where gradients are not finite; fp16 skips such an update instead."""
    if not math.isfinite(grad_norm) and mixed_precision != "fp16":
        raise nonfinite_gradient_error(step)


class OverflowGuard:
    """Watches updates that are skipped because gradients overflow. fp16 does so while it lowers its loss scale.

    Args:
        mixed_precision: only fp16 may skip updates.
    """

    def __init__(self, mixed_precision: str | None) -> None:
        self.mixed_precision, self.num_skipped = mixed_precision, 0

    def skips(self, was_skipped: bool, step: int) -> bool:
        """Returns whether the update was skipped, so that it does not count.

        Raises:
            UserError: the precision is not fp16, or too many updates in a row were skipped.
        """
        if was_skipped and self.mixed_precision != "fp16":
            raise nonfinite_gradient_error(step)
        self.num_skipped = self.num_skipped + 1 if was_skipped else 0
        if self.num_skipped > MAX_SKIPPED_UPDATES:
            raise gradient_overflow_error(step)
        return was_skipped


def nonfinite_gradient_error(step: int) -> UserError:
    return UserError(f"The gradients are not finite at step {step + 1}. {ADVICE}")


def gradient_overflow_error(step: int) -> UserError:
    return UserError(
        f"The gradients of step {step + 1} overflow in fp16 at every loss scale; use --mixed_precision bf16."
    )

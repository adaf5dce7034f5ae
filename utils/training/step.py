"""One training step: draw the inputs, predict the velocity, compute the loss.

The training loop, the held-out loss, the memory estimate and the benchmarks all call this objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dataset.condition_frames import FIRST, ConditionFrames
from utils.common.seeds import CONDITION_FRAMES, seed_for
from utils.model.conditioning import predict_velocity
from utils.model.spec import ModelSpec
from utils.training.loss import sample_inputs, velocity_loss


@dataclass(frozen=True)
class DenoisingObjective:
    """Maps a transformer and a batch of cache entries to losses.

    Attributes:
        alphas_cumprod: cumulative signal power of every timestep, float32 [T]; its device is that of the computation.
        dtype: dtype of the transformer's inputs.
        image_dropout: share of samples whose image latents are zeroed (i2v).
        condition_frames: each sample draws one of them (i2v).
    """

    spec: ModelSpec
    alphas_cumprod: torch.Tensor
    dtype: torch.dtype
    image_dropout: float = 0.0
    condition_frames: tuple[ConditionFrames, ...] = (FIRST,)

    def __call__(
        self,
        transformer: Callable[..., Any],
        batch: dict[str, Any],
        seeds: list[int],
        timesteps: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the loss of each sample.

        Args:
            batch: `video` moments [B, 2C, F, H, W], `prompt` embeddings [B, S, D] and, for i2v, `image` moments
                [B, K, 2C, 1, H, W] and those of further condition frames [B, K, 2C, F', H, W] by name, on any device.
            seeds: one per sample, for the posterior sample, the noise and the timestep.
            timesteps: fixed timesteps int64 [B]; drawn uniformly by default.

        Returns:
            Losses float32 [B] and timesteps int64 [B].
        """
        is_image = batch["video"].shape[2] == 1
        drawn = [None if is_image else self._draw_addition(seed) for seed in seeds]  # one frame has no further ones
        on_device = {
            name: batch[name].to(self.alphas_cumprod.device, non_blocking=True)
            for name in ("video", "image", "prompt", *dict.fromkeys(filter(None, drawn)))
            if name in batch
        }
        inputs = sample_inputs(
            self.spec,
            on_device["video"],
            on_device.get("image"),
            seeds,
            len(self.alphas_cumprod),
            self.image_dropout,
            timesteps,
            [None if name is None else (name, on_device[name][row]) for row, name in enumerate(drawn)],
        )
        predict = partial(
            predict_velocity,
            transformer,
            self.spec,
            prompt_embeds=on_device["prompt"],
            image_latents=inputs.image_latents,
            dtype=self.dtype,
        )
        losses = velocity_loss(predict, self.alphas_cumprod, inputs.latents, inputs.timesteps, inputs.noise)
        return losses, inputs.timesteps

    def _draw_addition(self, seed: int) -> str | None:
        """Returns the name of the condition frames that a sample is given besides the image."""
        number = seed_for(CONDITION_FRAMES, seed, 0) % len(self.condition_frames)
        return self.condition_frames[number].addition

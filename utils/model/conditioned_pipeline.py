"""Image-to-video sampling with more condition frames than the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import CogVideoXImageToVideoPipeline

from utils.model.conditioning import add_condition
from utils.model.spec import ModelSpec


@dataclass(frozen=True)
class Condition:
    """Condition frames that a generation is given besides its image.

    Attributes:
        addition: as in `ConditionFrames`.
        frames: float32 [B, F, H, W, 3] in [-1, 1], at the size of the video; of one video or of each in the batch.
    """

    spec: ModelSpec
    addition: str
    frames: torch.Tensor


class ConditionedImageToVideoPipeline(CogVideoXImageToVideoPipeline):
    """The pipeline of diffusers; `condition` changes nothing but the zeros in its image latents.

    The frames are encoded without noise, as the pipeline encodes the image.
    """

    condition: Condition | None = None

    def prepare_latents(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns initial noise and image latents, each [B, F, C, H, W]. Arguments are those of the pipeline."""
        latents, image_latents = super().prepare_latents(*args)
        if self.condition is None:
            return latents, image_latents
        dtype, device, generator = args[6:9]
        frames = self.condition.frames.permute(0, 4, 1, 2, 3)  # [B, F, H, W, 3] -> [B, 3, F, H, W]
        clips = frames.expand(len(latents), -1, -1, -1, -1).to(device, dtype)
        generators = generator if isinstance(generator, list) else [generator] * len(clips)
        samples = [
            self.vae.encode(clip[None].contiguous()).latent_dist.sample(clip_generator)
            for clip, clip_generator in zip(clips, generators, strict=True)
        ]
        sample = torch.cat(samples).to(dtype)
        return latents, add_condition(image_latents, sample, self.condition.spec, self.condition.addition)

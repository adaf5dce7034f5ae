"""Builds the inputs of the transformer from VAE moments, and calls it.

Training, held-out loss and parity tests share this module. It reproduces the inputs of the diffusers pipelines;
docstrings name the pipeline method they follow.

Shapes: B batch, F latent frames, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from dataset.condition_frames import LAST
from utils.model.spec import ModelSpec


def sample_moments(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Samples the VAE posterior: moments [B, 2C, F, H, W], noise [B, C, F, H, W] -> float32 [B, C, F, H, W].

    Follows `DiagonalGaussianDistribution.sample`, including its clamp of the log-variance.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise


def to_video_latents(sample: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """Scales and pads a VAE sample: [B, C, F, H, W] -> [B, F', C, H, W].

    In CogVideoX1.5 a token spans `patch_size_t` latent frames, so F is padded at the front to a multiple F'. The
    pipelines initialize the padding frames with noise, denoise them with the others and drop them after sampling. Here
    they are copies of the first frame that are noised and included in the loss like any other frame. The model thus
    learns to denoise them, and for i2v the condition image is concatenated to a frame with the same content.
    """
    latents = sample.transpose(1, 2) * spec.scaling_factor  # [B, C, F, H, W] -> [B, F, C, H, W]
    first = latents[:, :1].expand(-1, spec.frames_to_pad(latents.shape[1]), -1, -1, -1)
    return torch.cat([first, latents], dim=1)


def to_image_latents(sample: torch.Tensor, spec: ModelSpec, latent_frames: int) -> torch.Tensor:
    """Scales and pads a VAE sample of the condition image: [B, C, 1, H, W] -> [B, F, C, H, W].

    The image takes frame 0, which is a padding frame where there is padding; all later frames are zero. Follows
    `CogVideoXImageToVideoPipeline.prepare_latents`, which divides by the scaling factor if the VAE config sets
    `invert_scale_latents` (CogVideoX1.5-I2V).

    Args:
        latent_frames: F, including padding.
    """
    image = _scale_image_sample(sample, spec)
    later = image.new_zeros(image.shape[0], latent_frames - 1, *image.shape[2:])
    return torch.cat([image, later], dim=1)


def add_condition(image_latents: torch.Tensor, sample: torch.Tensor, spec: ModelSpec, addition: str) -> torch.Tensor:
    """Puts further condition frames in place of zeros in image latents [B, F, C, H, W].

    The last frame takes the last latent frame. A prefix takes the first ones, including the condition image's; where
    there is padding, copies of its first latent frame precede it, as in the latents of a clip.

    Args:
        sample: VAE sample of the frames [B, C, F', H, W].
    """
    frames = _scale_image_sample(sample, spec)
    if addition == LAST:
        return torch.cat([image_latents[:, :-1], frames], dim=1)
    # a clip has 8N+1 frames and an odd number of latent frames
    padding = frames[:, :1].expand(-1, spec.frames_to_pad(1), -1, -1, -1)
    prefix = torch.cat([padding, frames], dim=1)
    return torch.cat([prefix, image_latents[:, prefix.shape[1] :]], dim=1)


def _scale_image_sample(sample: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """Scales a VAE sample of condition frames: [B, C, F, H, W] -> [B, F, C, H, W]."""
    return sample.transpose(1, 2) * (1 / spec.scaling_factor if spec.inverts_image_latents else spec.scaling_factor)


@lru_cache(maxsize=16)
def rotary_table(
    head_dim: int, grid: tuple[int, int, int], base: tuple[int, int], slices: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosines and sines, each float32 [tokens, head_dim].

    Follows `_prepare_rotary_positional_embeddings` of the pipelines.

    Args:
        grid: number of tokens along time, height and width.
        base: number of tokens along height and width at the sample size in the config.
        slices: CogVideoX1.5 slices the table of the base grid; 1.0 scales the grid to a crop of the base grid.
    """
    frames, height, width = grid
    if slices:
        geometry = {"crops_coords": None, "grid_type": "slice", "max_size": base}
    else:
        geometry = {"crops_coords": get_resize_crop_region_for_grid((height, width), base[1], base[0])}
    return get_3d_rotary_pos_embed(
        embed_dim=head_dim, grid_size=(height, width), temporal_size=frames, device=device, **geometry
    )


def rotary_for(spec: ModelSpec, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns the rotary table for latents [B, F, C, H, W], or None for 2b, whose transformer adds sincos positions."""
    if not spec.has_rotary_positions:
        return None
    _, frames, _, height, width = latents.shape
    config, patch = spec.transformer, spec.patch_size
    return rotary_table(
        config["attention_head_dim"],
        (frames // (spec.patch_size_t or 1), height // patch, width // patch),
        (config["sample_height"] // patch, config["sample_width"] // patch),
        spec.is_v1_5,
        latents.device,
    )


def predict_velocity(
    transformer: Callable[..., Any],
    spec: ModelSpec,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_embeds: torch.Tensor,
    image_latents: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Calls the transformer as the pipelines do.

    Args:
        noisy: latents with the noise of `timesteps`, [B, F, C, H, W].
        timesteps: int64 [B].
        prompt_embeds: text embeddings [B, S, D].
        image_latents: [B, F, C, H, W] for i2v, None for t2v.
        dtype: dtype of the transformer's inputs.

    Returns:
        the predicted velocity [B, F, C, H, W].
    """
    hidden = noisy if image_latents is None else torch.cat([noisy, image_latents], dim=2)
    hidden = hidden.to(dtype)
    return transformer(
        hidden_states=hidden,
        encoder_hidden_states=prompt_embeds.to(dtype),
        timestep=timesteps,
        ofs=hidden.new_full((1,), 2.0) if spec.has_ofs else None,
        image_rotary_emb=rotary_for(spec, noisy),
        return_dict=False,
    )[0]

"""From moments to what the transformer is called with: shared by training, held-out loss and the parity tests.

Everything here mirrors what the diffusers pipelines feed the transformer; where one of them is quoted, its method is
named. Legend: B batch, F latent frames, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from utils.model.spec import ModelSpec


def sample_moments(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draws from the VAE's posterior: [B, 2C, F, H, W] and noise [B, C, F, H, W] -> float32 [B, C, F, H, W].

    As `DiagonalGaussianDistribution.sample`, whose clamp of the log-variance it repeats.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise


def to_video_latents(sample: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """VAE sample [B, C, F, H, W] -> scaled, padded latents [B, F', C, H, W].

    1.5 denoises `patch_size_t` latent frames a token, so their number is made a multiple by padding in FRONT. The
    pipelines draw the padding frames as noise, denoise them along with the rest and drop them from the front. Here they
    are copies of the first frame, noised and scored like every other frame: the model shall know what to make of them
    while sampling, and i2v finds its condition image beside its own picture.
    """
    latents = sample.transpose(1, 2) * spec.scaling_factor  # [B, C, F, H, W] -> [B, F, C, H, W]
    first = latents[:, :1].expand(-1, spec.frames_to_pad(latents.shape[1]), -1, -1, -1)
    return torch.cat([first, latents], dim=1)


def to_image_latents(sample: torch.Tensor, spec: ModelSpec, latent_frames: int) -> torch.Tensor:
    """VAE sample of the condition image [B, C, 1, H, W] -> [B, F, C, H, W], zero after the first frame.

    As `CogVideoXImageToVideoPipeline.prepare_latents`: 1.5-I2V was trained with the factor forgotten on this side, and
    its VAE config says so (`invert_scale_latents`). The image stands in the first of the padded frames.

    Args:
        latent_frames: F, padding included.
    """
    factor = 1 / spec.scaling_factor if spec.inverts_image_latents else spec.scaling_factor
    image = sample.transpose(1, 2) * factor  # [B, C, 1, H, W] -> [B, 1, C, H, W]
    later = image.new_zeros(image.shape[0], latent_frames - 1, *image.shape[2:])
    return torch.cat([image, later], dim=1)


@lru_cache(maxsize=16)
def rotary_table(
    head_dim: int, grid: tuple[int, int, int], base: tuple[int, int], slices: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each float32 [tokens, head_dim], as `_prepare_rotary_positional_embeddings`.

    Args:
        grid: tokens along time, height and width.
        base: tokens along height and width of the config's sample size.
        slices: 1.5 cuts the table of the base grid; 1.0 scales the grid into a crop of the base.
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
    """The rotary table for latents [B, F, C, H, W]; None for 2b, which adds sincos positions by itself."""
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
    transformer: torch.nn.Module,
    spec: ModelSpec,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_embeds: torch.Tensor,
    image_latents: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Calls the transformer as the pipelines do.

    Args:
        noisy: latents at `timesteps` [B, F, C, H, W].
        timesteps: int64 [B].
        prompt_embeds: [B, S, D].
        image_latents: [B, F, C, H, W] for i2v.
        dtype: of the transformer's inputs.

    Returns:
        the velocity [B, F, C, H, W].
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

"""The training objective. Pure: everything random comes from the generators that the caller passes.

Legend: B batch, K noise draws of the condition image, F latent frames, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from utils.model.conditioning import sample_moments, to_image_latents, to_video_latents
from utils.model.spec import ModelSpec


def velocity_loss(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    alphas_cumprod: torch.Tensor,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity v = sqrt(abar) eps - sqrt(1 - abar) x0 (arXiv:2202.00512, app. D).

    The usual way to write CogVideoX's objective is (1 / (1 - abar)) ||x0_hat - x0||^2. With x0_hat = sqrt(abar) x_t -
    sqrt(1 - abar) v_hat both differ from each other by nothing but rounding, and this one has no division by 1 - abar.

    Args:
        predict: (x_t, timesteps) -> v_hat, in any dtype.
        alphas_cumprod: abar of every timestep [T].
        latents: x0 [B, F, C, H, W]; its dtype is that of the computation.
        timesteps: int64 [B].
        noise: eps, like `latents`.

    Returns:
        one loss a sample [B].
    """
    signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
    signal, sigma = signal.sqrt().to(latents), (1 - signal).sqrt().to(latents)
    noisy = signal * latents + sigma * noise
    velocity = signal * noise - sigma * latents
    return (predict(noisy, timesteps).to(velocity.dtype) - velocity).square().flatten(1).mean(1)


@dataclass(frozen=True)
class StepInputs:
    """Everything of a training step that is decided by chance, and the latents it gives.

    Attributes:
        latents, noise: float32 [B, F, C, H, W].
        image_latents: the same for i2v; None for t2v.
        timesteps: int64 [B].
    """

    latents: torch.Tensor
    image_latents: torch.Tensor | None
    noise: torch.Tensor
    timesteps: torch.Tensor


def sample_inputs(
    spec: ModelSpec,
    video: torch.Tensor,
    image: torch.Tensor | None,
    seeds: list[int],
    num_timesteps: int,
    image_dropout: float = 0.0,
    timesteps: torch.Tensor | None = None,
) -> StepInputs:
    """Samples latents, noise and timesteps, each sample from a generator of its own.

    Args:
        video: moments of the clips [B, 2C, F, H, W].
        image: moments of the condition images [B, K, 2C, 1, H, W].
        seeds: one a sample.
        num_timesteps: T; timesteps are uniform over 0 .. T - 1.
        image_dropout: share of samples whose image latents are set to zero.
        timesteps: fixed timesteps [B] in place of drawn ones.
    """
    rows = []
    for number, seed in enumerate(seeds):
        generator = torch.Generator(video.device).manual_seed(seed)

        def randn_like(moments: torch.Tensor, generator: torch.Generator = generator) -> torch.Tensor:
            shape = (1, moments.shape[1] // 2, *moments.shape[2:])
            return torch.randn(shape, generator=generator, device=moments.device)

        one = video[number : number + 1]
        timestep = torch.randint(num_timesteps, (1,), generator=generator, device=video.device)
        latents = to_video_latents(sample_moments(one, randn_like(one)), spec)
        noise = torch.randn(latents.shape, generator=generator, device=video.device)
        image_latents = None
        if image is not None:
            level = torch.randint(image.shape[1], (1,), generator=generator, device=video.device)
            picture = image[number, level]
            image_latents = to_image_latents(sample_moments(picture, randn_like(picture)), spec, latents.shape[1])
            kept = torch.rand((1,), generator=generator, device=video.device) >= image_dropout
            image_latents = image_latents * kept
        rows.append((latents, image_latents, noise, timestep))
    all_latents, all_image_latents, all_noise, all_timesteps = zip(*rows, strict=True)
    return StepInputs(
        torch.cat(all_latents),
        None if image is None else torch.cat(all_image_latents),
        torch.cat(all_noise),
        torch.cat(all_timesteps) if timesteps is None else timesteps,
    )

"""The training objective as pure functions. All randomness comes from seeds that the caller passes.

Legend: B batch, K noise draws of the condition image, F latent frames, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from utils.model.conditioning import add_condition, sample_moments, to_image_latents, to_video_latents
from utils.model.spec import ModelSpec


def velocity_loss(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    alphas_cumprod: torch.Tensor,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity v = sqrt(abar) eps - sqrt(1 - abar) x0 (arXiv:2202.00512, app. D).

    CogVideoX's objective is usually written as (1 / (1 - abar)) ||x0_hat - x0||^2. With x0_hat = sqrt(abar) x_t -
    sqrt(1 - abar) v_hat, the two are equal up to rounding. This form avoids the division by 1 - abar.

    Args:
        predict: (x_t, timesteps) -> v_hat, in any dtype.
        alphas_cumprod: abar of every timestep [T].
        latents: x0 [B, F, C, H, W]; its dtype is that of the computation.
        timesteps: int64 [B].
        noise: eps, same shape and dtype as `latents`.

    Returns:
        One loss per sample [B].
    """
    signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
    signal, sigma = signal.sqrt().to(latents), (1 - signal).sqrt().to(latents)
    noisy = signal * latents + sigma * noise
    velocity = signal * noise - sigma * latents
    return (predict(noisy, timesteps).to(velocity.dtype) - velocity).square().flatten(1).mean(1)


def weighted_mean(losses: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Returns the mean of losses [B] times their weights.

    It is not divided by the sum of the weights, so an update has the same gradient however it is divided among ranks
    and micro-batches.
    """
    return (losses * losses.new_tensor(weights)).mean()


@dataclass(frozen=True)
class StepInputs:
    """Random inputs of one training step.

    Attributes:
        latents, noise: float32 [B, F, C, H, W].
        image_latents: float32 [B, F, C, H, W] for i2v; None for t2v.
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
    additions: Sequence[tuple[str, torch.Tensor] | None] | None = None,
) -> StepInputs:
    """Samples latents, noise and timesteps. Each sample has its own generator, so it is independent of its batch.

    Args:
        video: moments of the clips [B, 2C, F, H, W].
        image: moments of the condition images [B, K, 2C, 1, H, W].
        seeds: one per sample.
        num_timesteps: T; timesteps are uniform over 0 .. T - 1.
        image_dropout: share of samples whose image latents are set to zero.
        timesteps: fixed timesteps [B]; drawn by default.
        additions: for each sample, name and moments [K, 2C, F', H, W] of further condition frames; None for none.
    """
    samples = [
        _sample_one(
            spec,
            video[row : row + 1],
            None if image is None else image[row],
            torch.Generator(video.device).manual_seed(seed),
            num_timesteps,
            image_dropout,
            None if additions is None else additions[row],
        )
        for row, seed in enumerate(seeds)
    ]
    image_latents = [sample.image_latents for sample in samples if sample.image_latents is not None]
    return StepInputs(
        torch.cat([sample.latents for sample in samples]),
        torch.cat(image_latents) if image_latents else None,
        torch.cat([sample.noise for sample in samples]),
        torch.cat([sample.timesteps for sample in samples]) if timesteps is None else timesteps,
    )


def _sample_one(
    spec: ModelSpec,
    video: torch.Tensor,
    image: torch.Tensor | None,
    generator: torch.Generator,
    num_timesteps: int,
    image_dropout: float,
    addition: tuple[str, torch.Tensor] | None,
) -> StepInputs:
    """Samples a batch of one. The order of the draws is fixed: resumed runs repeat it.

    Args:
        video: [1, 2C, F, H, W].
        image: [K, 2C, 1, H, W].
        addition: as in `sample_inputs`; drawn last.
    """

    def posterior_sample(moments: torch.Tensor) -> torch.Tensor:
        shape = (1, moments.shape[1] // 2, *moments.shape[2:])
        return sample_moments(moments, torch.randn(shape, generator=generator, device=moments.device))

    timestep = torch.randint(num_timesteps, (1,), generator=generator, device=video.device)
    latents = to_video_latents(posterior_sample(video), spec)
    noise = torch.randn(latents.shape, generator=generator, device=video.device)
    if image is None:
        return StepInputs(latents, None, noise, timestep)
    noise_draw = torch.randint(len(image), (1,), generator=generator, device=video.device)
    image_latents = to_image_latents(posterior_sample(image[noise_draw]), spec, latents.shape[1])
    is_kept = torch.rand((1,), generator=generator, device=video.device) >= image_dropout
    if addition is not None:
        name, moments = addition
        noise_draw = torch.randint(len(moments), (1,), generator=generator, device=video.device)
        image_latents = add_condition(image_latents, posterior_sample(moments[noise_draw]), spec, name)
    return StepInputs(latents, image_latents * is_kept, noise, timestep)

"""Encodes pixels to VAE moments and prompts to text embeddings.

The moments are mean and log-variance of the VAE posterior, concatenated on the channel dimension. Each encoder is
loaded when its context is entered and released on exit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKLCogVideoX
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from dataset.precompute import PixelEncoders
from utils.model import loading

# Each condition image is encoded under several draws of noise, log sigma ~ N(mean, std). A training step picks one.
IMAGE_NOISE_DRAWS, LOG_SIGMA_MEAN, LOG_SIGMA_STD = 4, -3.0, 0.5
# Part of the cache key of a condition image; changing the text invalidates existing caches.
IMAGE_NOISE = f"{IMAGE_NOISE_DRAWS} draws of log sigma ~ N({LOG_SIGMA_MEAN}, {LOG_SIGMA_STD})"


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """Maps uint8 0..255 to float32 [-1, 1], as the pipelines' `VideoProcessor` does."""
    return pixels.float() / 127.5 - 1.0


@torch.no_grad()
def encode_video(vae: AutoencoderKLCogVideoX, pixels: torch.Tensor) -> torch.Tensor:
    """Encodes pixels uint8 [F, H, W, 3] to moments [2C, F', H', W'] on the CPU, in the VAE's dtype."""
    return _moments(vae, to_model_range(pixels.to(vae.device)))


def _moments(vae: AutoencoderKLCogVideoX, frames: torch.Tensor) -> torch.Tensor:
    """Encodes frames float32 [F, H, W, 3] in [-1, 1] to moments [2C, F', H', W'] on the CPU."""
    clip = frames.to(vae.device, vae.dtype).movedim(-1, 0).contiguous()[None]  # [F, H, W, 3] -> [1, 3, F, H, W]
    return vae.encode(clip).latent_dist.parameters[0].cpu()


@torch.no_grad()
def encode_image(vae: AutoencoderKLCogVideoX, pixels: torch.Tensor, seed: int) -> torch.Tensor:
    """Encodes a condition image under several draws of pixel noise.

    The noise, log sigma ~ N(-3, 0.5), keeps the model from copying the image into every frame (CogVideoX,
    arXiv:2408.06072, section 2.2; following Stable Video Diffusion).

    Args:
        pixels: uint8 [H, W, 3].
        seed: seed of the noise.

    Returns:
        moments [IMAGE_NOISE_DRAWS, 2C, 1, H', W'] on the CPU, in the VAE's dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    image, moments = to_model_range(pixels), []
    for _ in range(IMAGE_NOISE_DRAWS):
        sigma = torch.exp(torch.randn((), generator=generator) * LOG_SIGMA_STD + LOG_SIGMA_MEAN)
        noisy = image + sigma * torch.randn(image.shape, generator=generator)
        moments.append(_moments(vae, noisy[None]))
    return torch.stack(moments)


@torch.no_grad()
def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text_encoder: T5EncoderModel, max_length: int, prompt: str
) -> torch.Tensor:
    """Encodes a prompt to an embedding [S, D] on the CPU, in the text encoder's dtype.

    The prompt is padded or truncated to S = `max_length` tokens, as in the pipelines' `_get_t5_prompt_embeds`.
    """
    tokens = tokenizer(prompt, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    device = text_encoder.device  # "meta" if offloaded; accelerate's hooks then move the inputs
    return text_encoder(tokens.input_ids.to("cpu" if device.type == "meta" else device))[0][0].cpu()


@contextmanager
def prompt_encoder(
    model_dir: Path, device: torch.device, max_length: int, offload: bool
) -> Iterator[Callable[[str], torch.Tensor]]:
    """Yields a function that encodes a prompt with a checkpoint's text encoder, as `encode_prompt` does.

    Args:
        max_length: number of tokens per prompt.
        offload: keep the weights in host memory and copy each layer to the device while it runs.
    """
    cpu = torch.device("cpu")
    text_encoder = loading.load_text_encoder(model_dir, cpu if offload else device)
    if offload:  # `device` is "cpu:0" in accelerate's processes; its hooks treat that as different from "cpu"
        cpu_offload(text_encoder, cpu if device.type == "cpu" else device)
    with loading.released(text_encoder):
        yield partial(encode_prompt, loading.load_tokenizer(model_dir), text_encoder, max_length)


@contextmanager
def pixel_encoders(model_dir: Path, device: torch.device, slicing: bool, tiling: bool) -> Iterator[PixelEncoders]:
    """Yields functions that encode clips and condition images with a checkpoint's VAE."""
    vae = loading.load_vae(model_dir, device, slicing, tiling)
    with loading.released(vae):
        yield PixelEncoders(partial(encode_video, vae), partial(encode_image, vae))

"""Pixels to VAE moments, prompts to embeddings. Each encoder is read, used and released within its own block."""

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

# Draws of noise kept of each condition image, log sigma ~ N(mean, std); a training step picks one of them.
IMAGE_NOISE_DRAWS, LOG_SIGMA_MEAN, LOG_SIGMA_STD = 4, -3.0, 0.5
IMAGE_NOISE = f"{IMAGE_NOISE_DRAWS} draws of log sigma ~ N({LOG_SIGMA_MEAN}, {LOG_SIGMA_STD})"


@torch.no_grad()
def encode_video(vae: AutoencoderKLCogVideoX, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [F, H, W, C] -> moments (mean and log-variance on channels) [2C, F, H, W] in the VAE's dtype."""
    return _moments(vae, to_model_range(pixels.to(vae.device)))


def _moments(vae: AutoencoderKLCogVideoX, frames: torch.Tensor) -> torch.Tensor:
    """float32 [F, H, W, C] in [-1, 1] -> moments [2C, F, H, W]."""
    clip = frames.to(vae.device, vae.dtype).movedim(-1, 0).contiguous()[None]  # [F, H, W, C] -> [1, C, F, H, W]
    return vae.encode(clip).latent_dist.parameters[0].cpu()


@torch.no_grad()
def encode_image(vae: AutoencoderKLCogVideoX, pixels: torch.Tensor, seed: int) -> torch.Tensor:
    """Encodes a condition image under several draws of pixel noise.

    The noise, log sigma ~ N(-3, 0.5), keeps the model from copying the image into every frame (CogVideoX,
    arXiv:2408.06072, section 2.2; after Stable Video Diffusion).

    Args:
        pixels: uint8 [H, W, C].

    Returns:
        moments [IMAGE_NOISE_DRAWS, 2C, 1, H, W] in the VAE's dtype.
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
    """Prompt -> [S, D] in the text encoder's dtype; padded or cut to S tokens, as `_get_t5_prompt_embeds` does."""
    tokens = tokenizer(prompt, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    device = text_encoder.device  # "meta" where it is offloaded, and its hooks move what it is given
    return text_encoder(tokens.input_ids.to("cpu" if device.type == "meta" else device))[0][0].cpu()


@contextmanager
def prompt_encoder(
    model_dir: Path, device: torch.device, max_length: int, offload: bool
) -> Iterator[Callable[[str], torch.Tensor]]:
    """Gives `encode_prompt` of a checkpoint's text encoder on a device.

    Args:
        offload: the weights stay in host memory; each layer is copied to the device when its turn comes.
    """
    cpu = torch.device("cpu")
    text_encoder = loading.load_text_encoder(model_dir, cpu if offload else device)
    if offload:  # accelerate's hooks take "cpu:0", which its processes have, for another device than "cpu"
        cpu_offload(text_encoder, cpu if device.type == "cpu" else device)
    with loading.released(text_encoder):
        yield partial(encode_prompt, loading.load_tokenizer(model_dir), text_encoder, max_length)


@contextmanager
def pixel_encoders(model_dir: Path, device: torch.device, slicing: bool, tiling: bool) -> Iterator[PixelEncoders]:
    vae = loading.load_vae(model_dir, device, slicing, tiling)
    with loading.released(vae):
        yield PixelEncoders(partial(encode_video, vae), partial(encode_image, vae))


# --- from dataset/video.py


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 [-1, 1], as the pipelines' `VideoProcessor` does."""
    return pixels.float() / 127.5 - 1.0

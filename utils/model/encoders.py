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
from diffusers import AutoencoderKLCogVideoX
from torch.func import functional_call
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from dataset.precompute import EncodePrompts, PixelEncoders
from utils.memory.layer_streaming import stream_weights
from utils.model import loading

# Number of prompts that pass the layers of an offloaded text encoder together. Each takes 2 to 4 MiB of GPU memory.
PROMPTS_PER_PASS = 128
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
    """Encodes the frames of a condition, usually one, under several draws of pixel noise.

    The noise, log sigma ~ N(-3, 0.5), keeps the model from copying the image into every frame (CogVideoX,
    arXiv:2408.06072, section 2.2; following Stable Video Diffusion).

    Args:
        pixels: uint8 [F, H, W, 3]; all frames of a draw have noise of the same strength.
        seed: seed of the noise.

    Returns:
        moments [IMAGE_NOISE_DRAWS, 2C, F', H', W'] on the CPU, in the VAE's dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    frames, moments = to_model_range(pixels), []
    for _ in range(IMAGE_NOISE_DRAWS):
        sigma = torch.exp(torch.randn((), generator=generator) * LOG_SIGMA_STD + LOG_SIGMA_MEAN)
        moments.append(_moments(vae, frames + sigma * torch.randn(frames.shape, generator=generator)))
    return torch.stack(moments)


def tokenize(tokenizer: PreTrainedTokenizerBase, max_length: int, prompt: str) -> torch.Tensor:
    """Returns token ids [1, S]. The prompt is padded or truncated to S = `max_length` tokens."""
    return tokenizer(
        prompt, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text_encoder: T5EncoderModel, max_length: int, prompt: str
) -> torch.Tensor:
    """Encodes a prompt to an embedding [S, D] on the CPU, in the text encoder's dtype.

    Padding counts as text, as in the pipelines' `_get_t5_prompt_embeds`.
    """
    return text_encoder(tokenize(tokenizer, max_length, prompt).to(text_encoder.device))[0][0].cpu()


@torch.no_grad()
def encode_by_layers(
    text_encoder: T5EncoderModel, token_ids: list[torch.Tensor], device: torch.device, beat: Callable[[], None]
) -> list[torch.Tensor]:
    """Encodes prompts with a text encoder in host memory: all of them by one layer, then by the next one.

    Each layer is copied to the device once. Each prompt passes a layer by itself, which gives the bits of
    `encode_prompt`.

    Args:
        token_ids: [1, S] per prompt, in host memory.
        beat: sends a heartbeat; called for every prompt in every layer.

    Returns:
        an embedding [1, S, D] per prompt, on the device.
    """
    stack = text_encoder.encoder
    # looking the tokens up in host memory keeps the largest matrix off the device
    hidden = [stack.embed_tokens(ids).to(device) for ids in token_ids]  # [1, S, D] per prompt
    position_bias = None  # computed by the first layer and shared by the others
    for layer, weights in zip(stack.block, stream_weights(stack.block, device), strict=True):
        for prompt, inputs in enumerate(hidden):
            outputs = functional_call(layer, weights, inputs, {"position_bias": position_bias})
            hidden[prompt], position_bias, _ = outputs
            beat()
    for weights in stream_weights([stack.final_layer_norm], device):
        hidden = [functional_call(stack.final_layer_norm, weights, inputs) for inputs in hidden]
    return hidden


@contextmanager
def prompt_encoder(
    model_dir: Path, device: torch.device, max_length: int, offload: bool, variant: str | None = None
) -> Iterator[EncodePrompts]:
    """Yields a function that encodes prompts with a checkpoint's text encoder, as `encode_prompt` does.

    Args:
        max_length: number of tokens per prompt.
        offload: keep the weights in host memory and copy one layer at a time to the device.
        variant: as in `weight_files`.
    """
    text_encoder = loading.load_text_encoder(model_dir, torch.device("cpu") if offload else device, variant=variant)
    tokenizer = loading.load_tokenizer(model_dir)

    def encode(prompts: list[str], beat: Callable[[], None]) -> Iterator[torch.Tensor]:
        if not offload:
            for prompt in prompts:
                yield encode_prompt(tokenizer, text_encoder, max_length, prompt)
        for start in range(0, len(prompts) if offload else 0, PROMPTS_PER_PASS):
            token_ids = [tokenize(tokenizer, max_length, text) for text in prompts[start : start + PROMPTS_PER_PASS]]
            for embedding in encode_by_layers(text_encoder, token_ids, device, beat):
                yield embedding[0].cpu()

    with loading.released(text_encoder):
        yield encode


@contextmanager
def pixel_encoders(
    model_dir: Path, device: torch.device, slicing: bool, tiling: bool, variant: str | None = None
) -> Iterator[PixelEncoders]:
    """Yields functions that encode clips and condition images with a checkpoint's VAE."""
    vae = loading.load_vae(model_dir, device, slicing, tiling, variant=variant)
    with loading.released(vae):
        yield PixelEncoders(partial(encode_video, vae), partial(encode_image, vae))

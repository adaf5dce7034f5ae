"""Encodes pixels to VAE moments and prompts to text embeddings.

The moments are mean and log-variance of the VAE posterior, concatenated on the channel dimension. Each encoder is
loaded when its context is entered and released on exit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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

# Number of prompts that are tokenized together. All at once would take more memory than the dataset.
TOKENIZER_BATCH = 100
# Number of short ASCII prompts that are checked; 100,000 would take ten seconds.
MAX_PLAIN_PROMPTS = 2000
# Largest share of a prompt's characters that may be unknown to the tokenizer without a note.
MAX_UNKNOWN_SHARE = 0.2
# Number of prompts that pass the layers of an offloaded text encoder together. Each takes 2 to 4 MiB of GPU memory.
PROMPTS_PER_PASS = 128
# Number of prompts that a text encoder on a GPU encodes together, which takes 0.2 GiB more than one prompt. On a CPU it
# encodes them one by one, so that the bytes of an entry do not depend on other prompts.
PROMPTS_PER_BATCH = 8
# Each condition image is encoded under several draws of noise, log sigma ~ N(mean, std). A training step picks one.
IMAGE_NOISE_DRAWS, LOG_SIGMA_MEAN, LOG_SIGMA_STD = 4, -3.0, 0.5
# Part of the cache key of a condition image; changing the text invalidates existing caches.
IMAGE_NOISE = f"{IMAGE_NOISE_DRAWS} draws of log sigma ~ N({LOG_SIGMA_MEAN}, {LOG_SIGMA_STD})"


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """Maps uint8 0..255 to float32 [-1, 1], as the pipelines' `VideoProcessor` does."""
    return pixels.float() / 127.5 - 1.0


def to_device(values: torch.Tensor, device: torch.device, stream: torch.cuda.Stream | None) -> torch.Tensor:
    """Copies a host tensor to the device. On a stream of its own, the copy does not wait for the VAE to finish."""
    if stream is None:
        return values.to(device)
    with torch.cuda.stream(stream):
        copied = values.pin_memory().to(device, non_blocking=True)
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    copied.record_stream(current)
    return copied


def to_host(moments: torch.Tensor, stream: torch.cuda.Stream | None) -> torch.Tensor:
    """Copies moments to host memory. With a stream, the host must wait before it reads them."""
    if stream is None:
        return moments.cpu()
    return torch.empty_like(moments, device="cpu", pin_memory=True).copy_(moments, non_blocking=True)


@torch.no_grad()
def encode_video(
    vae: AutoencoderKLCogVideoX, pixels: torch.Tensor, stream: torch.cuda.Stream | None = None
) -> torch.Tensor:
    """Encodes pixels uint8 [F, H, W, 3] to moments [2C, F', H', W'] on the CPU, in the VAE's dtype."""
    return to_host(_moments(vae, to_model_range(to_device(pixels, vae.device, stream))), stream)


def _moments(vae: AutoencoderKLCogVideoX, frames: torch.Tensor) -> torch.Tensor:
    """Encodes frames float32 [F, H, W, 3] in [-1, 1] to moments [2C, F', H', W'], both on the VAE's device."""
    clip = frames.to(vae.dtype).movedim(-1, 0).contiguous()[None]  # [F, H, W, 3] -> [1, 3, F, H, W]
    return vae.encode(clip).latent_dist.parameters[0]


@torch.no_grad()
def encode_image(
    vae: AutoencoderKLCogVideoX, pixels: torch.Tensor, seed: int, stream: torch.cuda.Stream | None = None
) -> torch.Tensor:
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
        noisy = frames + sigma * torch.randn(frames.shape, generator=generator)
        moments.append(_moments(vae, to_device(noisy, vae.device, stream)))
    return to_host(torch.stack(moments), stream)


def tokenize(tokenizer: PreTrainedTokenizerBase, max_length: int, prompt: str) -> torch.Tensor:
    """Returns token ids [1, S]. The prompt is padded or truncated to S = `max_length` tokens."""
    return tokenizer(
        prompt, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, text_encoder: T5EncoderModel, max_length: int, prompts: list[str]
) -> torch.Tensor:
    """Encodes prompts to embeddings [B, S, D] on the CPU, in the text encoder's dtype.

    Padding counts as text, as in the pipelines' `_get_t5_prompt_embeds`. All prompts therefore have the same length,
    and the batch size changes the embeddings by rounding only.
    """
    token_ids = torch.cat([tokenize(tokenizer, max_length, prompt) for prompt in prompts])
    return text_encoder(token_ids.to(text_encoder.device))[0].cpu()


@torch.no_grad()
def encode_by_layers(
    text_encoder: T5EncoderModel, token_ids: list[torch.Tensor], device: torch.device, beat: Callable[[], None]
) -> list[torch.Tensor]:
    """Encodes prompts with a text encoder in host memory: all of them by one layer, then by the next one.

    Each layer is copied to the device once. Each prompt passes a layer by itself, which gives the bits of
    `encode_prompts` with one prompt.

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
    """Yields a function that encodes prompts with a checkpoint's text encoder, as `encode_prompts` does.

    Args:
        max_length: number of tokens per prompt.
        offload: keep the weights in host memory and copy one layer at a time to the device.
        variant: as in `weight_files`.
    """
    text_encoder = loading.load_text_encoder(model_dir, torch.device("cpu") if offload else device, variant=variant)
    tokenizer = loading.load_tokenizer(model_dir)

    def encode(prompts: list[str], beat: Callable[[], None]) -> Iterator[torch.Tensor]:
        batch_size = PROMPTS_PER_BATCH if device.type == "cuda" else 1
        for start in range(0, 0 if offload else len(prompts), batch_size):
            yield from encode_prompts(tokenizer, text_encoder, max_length, prompts[start : start + batch_size])
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
    """Yields functions that encode clips and condition images with a checkpoint's VAE.

    On a GPU they return moments that are still being computed, so that the host can prepare the next clip.
    """
    vae = loading.load_vae(model_dir, device, slicing, tiling, variant=variant)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with loading.released(vae):
        yield PixelEncoders(
            partial(encode_video, vae, stream=stream),
            partial(encode_image, vae, stream=stream),
            # the current stream computes the moments and copies them to the host
            None if stream is None else lambda: torch.cuda.current_stream(device).record_event().synchronize,
        )


def prompt_notes(model_dir: Path, prompts: Iterable[str], max_length: int) -> list[str]:
    """Returns notes about prompts of which the text encoder sees only a part.

    They are truncated, consist largely of characters that the tokenizer does not know, or cannot be told from another
    prompt. Of short ASCII prompts, which hardly ever are, only some are read.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    tokenizer = loading.load_tokenizer(model_dir)
    distinct = sorted(set(prompts))
    # a token takes at least one byte, so shorter prompts always fit
    suspects = [prompt for prompt in distinct if len(prompt.encode()) >= max_length or not prompt.isascii()]
    candidates = suspects + sorted(set(distinct) - set(suspects))[:MAX_PLAIN_PROMPTS]
    truncated, unknown, equal = [], [], []
    seen: dict[tuple[int, ...], str] = {}
    for start in range(0, len(candidates), TOKENIZER_BATCH):
        batch = candidates[start : start + TOKENIZER_BATCH]
        encoded = tokenizer(batch, return_offsets_mapping=True)
        for prompt, ids, spans in zip(batch, encoded.input_ids, encoded.offset_mapping, strict=True):
            lost = [end - begin for id, (begin, end) in zip(ids, spans, strict=True) if id == tokenizer.unk_token_id]
            if len(ids) > max_length:
                truncated.append(prompt)
            if sum(lost) > MAX_UNKNOWN_SHARE * len(prompt):
                unknown.append(prompt)
            if lost or len(ids) > max_length:  # other prompts differ in their spaces at most
                first = seen.setdefault(tuple(ids[:max_length]), prompt)
                equal += [(first, prompt)] if first != prompt else []
    notes = []
    if truncated:
        notes.append(
            f"{len(truncated)} distinct prompts exceed {max_length} tokens and are truncated: {truncated[0][:60]!r}..."
        )
    if unknown:
        notes.append(
            f"{len(unknown)} distinct prompts consist largely of characters that the tokenizer does not know, such as "
            f"{unknown[0][:60]!r}. CogVideoX was trained on English prompts; translate them."
        )
    if equal:
        notes.append(
            f"{len(equal)} prompts become the same tokens as another prompt, so the model cannot tell them apart, such "
            f"as {equal[0][0][:60]!r} and {equal[0][1][:60]!r}."
        )
    return notes

"""The parts of a run that take memory, on fake tensors: updates, a validation video, the encoders.

Each is made as the run itself makes it, and goes through the same loss, optimizer and models.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from dataset.video import Resolution
from utils.config.args import Args
from utils.estimate.memory_tracker import flop_counter, give_fake_weights, simulate, storage_size, take_weights
from utils.model.conditioning import predict_velocity, rotary_table
from utils.model.spec import ModelSpec
from utils.training.loss import velocity_loss
from utils.training.optimizer import clip, make_optimizer
from utils.training.trainable import compute_dtype, make_trainable, trained_parameters, uses_autocast, weight_dtype


@dataclass(frozen=True)
class Updates:
    """What updates on fake tensors showed of one process; sizes in bytes.

    Attributes:
        terms: what the peak is made of.
        weights, trained: numbers of weights.
        flop: of one forward and backward pass.
        host: what waits in host memory.
    """

    terms: dict[str, int]
    weights: int
    trained: int
    flop: int
    host: int


def run_updates(
    args: Args, spec: ModelSpec, resolution: Resolution, uses_deepspeed: bool, num_processes: int
) -> Updates:
    """Two updates, of which the second finds an optimizer that has its states.

    Under ZeRO without gradients and optimizer, which DeepSpeed divides among the processes in its own way.
    """
    transformer = empty_transformer(args, spec, uses_deepspeed)
    with simulate() as live:
        give_fake_weights(transformer)
        parameters = trained_parameters(transformer)
        terms = {"weights": live.now}
        if args.model.training_type == "lora":
            adapters = sum(storage_size(parameter) for parameter in parameters)
            terms = {"weights": live.now - adapters, "adapters": adapters}
        optimizer = None if uses_deepspeed else make_optimizer(parameters, args, uses_deepspeed)
        if uses_deepspeed:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(drop_gradient)
        batch = fake_batch(args, spec, resolution, args.training.batch_size)
        held = kept = 0
        counter = flop_counter()
        # The first makes the optimizer's states and counts the work; the counter itself keeps tensors alive.
        for watch in (counter, nullcontext()):
            if watch is not counter:
                live.watch_peak(parameters)
            held = live.now
            with watch:
                loss = loss_of(transformer, args, spec, batch, uses_deepspeed)
                kept = live.now - held
                loss.backward()
            if optimizer is not None:
                clip(optimizer, args.training.max_grad_norm)
                if not args.memory.offload_optimizer:  # else it is the host's
                    optimizer.step()
                # DDP keeps them, in its buckets; and between the passes of an update they are there too
                optimizer.zero_grad(set_to_none=num_processes == args.training.gradient_accumulation_steps == 1)
            del loss
        if optimizer is not None:
            slots = [slot for state in optimizer.state.values() for slot in state.values()]
            terms["optimizer"] = sum(storage_size(slot) for slot in slots if isinstance(slot, torch.Tensor))
            terms["gradients"] = live.gradients
        rest = live.peak - sum(terms.values())
        terms["kept activations"] = min(kept, rest)  # of those there may be less when the peak is reached
        terms["working set"] = rest - terms["kept activations"]
    weights, trained = (sum(map(torch.Tensor.numel, some)) for some in (transformer.parameters(), parameters))
    host = live.host + (8 * trained if args.memory.offload_optimizer else 0)  # Adam's states
    return Updates(terms, weights, trained, counter.get_total_flops(), host)


def peak_of_generating(args: Args, spec: ModelSpec, resolution: Resolution, uses_deepspeed: bool) -> int:
    """NonTrainingPeaks the weights that are trained: guidance doubles the batch, then the VAE decodes."""
    transformer = empty_transformer(args, spec, uses_deepspeed)
    with simulate() as live, torch.no_grad():
        give_fake_weights(transformer)
        held = live.now
        live.watch_peak()
        loss_of(transformer, args, spec, fake_batch(args, spec, resolution, batch_size=2), uses_deepspeed)
        denoising = live.peak - held
    vae = empty_vae(args, spec)
    with simulate() as live, torch.no_grad():
        give_fake_weights(vae)
        weights = live.now
        live.watch_peak()
        frames, height, width = spec.latent_size(resolution)
        vae.decode(torch.empty(1, spec.latent_channels, frames, height, width, dtype=vae.dtype))
        return max(weights + denoising, live.peak)


def peak_of_encoding_clips(args: Args, spec: ModelSpec, resolution: Resolution) -> int:
    vae = empty_vae(args, spec)
    with simulate() as live, torch.no_grad():
        give_fake_weights(vae)
        live.watch_peak()
        vae.encode(torch.empty(1, 3, resolution.frames, resolution.height, resolution.width, dtype=vae.dtype))
        return live.peak


def peak_of_encoding_prompts(spec: ModelSpec, config: dict[str, Any], offload: bool) -> int:
    with init_empty_weights(include_buffers=True):
        encoder = T5EncoderModel(T5Config(**config)).to(torch.bfloat16).eval()
    with simulate() as live, torch.no_grad():
        if offload:
            for part in encoder.modules():
                part.register_forward_pre_hook(lambda part, inputs: give_fake_weights(part, recurse=False))
                part.register_forward_hook(lambda part, inputs, output: take_weights(part))
        else:
            give_fake_weights(encoder)
        live.watch_peak()
        encoder(torch.zeros(1, spec.max_text_seq_length, dtype=torch.int64))
        return live.peak


def empty_transformer(args: Args, spec: ModelSpec, uses_deepspeed: bool) -> CogVideoXTransformer3DModel:
    """As `train` makes it, without weights; not compiled, since fake tensors cannot tell what that takes."""
    with init_empty_weights(include_buffers=True):
        transformer = CogVideoXTransformer3DModel.from_config(spec.transformer)
    torch.nn.Module.to(transformer, weight_dtype(args, uses_deepspeed))
    make_trainable(transformer, replace(args, memory=replace(args.memory, compile_blocks=False)))
    return transformer


def empty_vae(args: Args, spec: ModelSpec) -> AutoencoderKLCogVideoX:
    """As `components.load_vae` makes it on a GPU, from half-precision files."""
    with init_empty_weights(include_buffers=True):
        vae = AutoencoderKLCogVideoX.from_config(spec.vae).eval()
    torch.nn.Module.to(vae, torch.bfloat16)
    if args.system.enable_slicing:
        vae.enable_slicing()
    if args.system.enable_tiling:
        vae.enable_tiling()
    return vae


def fake_batch(args: Args, spec: ModelSpec, resolution: Resolution, batch_size: int) -> dict[str, torch.Tensor | None]:
    """Latents, condition and prompts as `train` gives them to the loss."""
    frames, height, width = spec.latent_size(resolution)
    latents = torch.empty(batch_size, frames + spec.frames_to_pad(frames), spec.latent_channels, height, width)
    prompts = torch.empty(batch_size, spec.max_text_seq_length, spec.transformer["text_embed_dim"])
    return {
        "latents": latents,
        "image_latents": torch.empty_like(latents) if spec.task == "i2v" else None,
        "prompt_embeds": prompts.to(compute_dtype(args)),
    }


def loss_of(
    transformer: CogVideoXTransformer3DModel, args: Args, spec: ModelSpec, batch: dict[str, Any], uses_deepspeed: bool
) -> torch.Tensor:
    """The loss of `train`, under autocast as accelerate switches it on."""
    dtype, latents = compute_dtype(args), batch["latents"]

    def predict_under_autocast(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        with torch.autocast(latents.device.type, dtype, enabled=uses_autocast(args, uses_deepspeed)):
            return predict_velocity(
                transformer, spec, noisy, timesteps, batch["prompt_embeds"], batch["image_latents"], dtype
            ).float()

    timesteps = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
    alphas_cumprod = torch.full((1000,), 0.5, device=latents.device)
    try:
        return velocity_loss(
            predict_under_autocast, alphas_cumprod, latents, timesteps, torch.zeros_like(latents)
        ).mean()
    finally:
        rotary_table.cache_clear()  # the next one who asks shall not get a fake one


def drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None

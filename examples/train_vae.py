"""Trains the tiny model's VAE on clips of its world, drawn on the fly; run it again and it goes on where it stopped.

    python -m examples.train_vae outputs/tiny_vae

First on crops, which is quick, then on whole clips, since the group norms see a whole picture when the VAE is used; at
last the decoder alone, which leaves latents as they are: a base can be trained on them meanwhile.
Writes the VAE in float16 to `<output>/vae` and what it measured to `<output>/log.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX

from examples.world import random_clip
from utils.model.encoders import to_model_range

SCALING_FACTOR = 0.7
FRAMES, LONGEST, SIZE, CROP = 9, 17, 64, 32
LOG_STEPS = 250
WHOLE_SHARE = 0.25  # of the steps with the encoder
LEARNING_RATE, WARMUP_STEPS, KL_WEIGHT = 1.5e-3, 50, 1e-4
DECODER_SEED = 1_000_000
HELD_OUT_SEED = 10_000_000  # training never comes this far
LEVELS, LATENT_CHANNELS = 3, 4


def build() -> AutoencoderKLCogVideoX:
    """The published VAE with one level less (4x in space, 4x in time), tiny widths and a quarter of the channels."""
    return AutoencoderKLCogVideoX(
        block_out_channels=(16, 32, 32),
        down_block_types=("CogVideoXDownBlock3D",) * LEVELS,
        up_block_types=("CogVideoXUpBlock3D",) * LEVELS,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=LATENT_CHANNELS,
        scaling_factor=SCALING_FACTOR,
    )


def draw_batch(first_seed: int, count: int, frames: int, size: int) -> torch.Tensor:
    """Clips cut to a random place of size x size: float32 [B, C, F, H, W] in [-1, 1]."""
    clips = []
    for seed in range(first_seed, first_seed + count):
        top, left = np.random.default_rng([seed, 2]).integers(SIZE - size + 1, size=2)
        clips.append(random_clip(seed, frames, SIZE)[1][:, top : top + size, left : left + size])
    return to_model_range(torch.from_numpy(np.stack(clips))).movedim(-1, 1)  # [B, F, H, W, C] -> [B, C, F, H, W]


@torch.no_grad()
def psnr(vae: AutoencoderKLCogVideoX, count: int, frames: int = FRAMES) -> float:
    """Mean PSNR in dB over whole held-out clips, each through `encode` and `decode` as the pipelines call them."""
    values = []
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + count):
        clip = draw_batch(seed, 1, frames, SIZE)
        decoded = vae.decode(vae.encode(clip).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * math.log10(((decoded - clip) / 2).square().mean().item()))
    return sum(values) / count


@torch.no_grad()
def standardise(vae: AutoencoderKLCogVideoX) -> None:
    """Shifts and scales latent channels in place: latents times the scaling factor have mean 0 and variance 1.

    Every convolution of the decoder that reads latents (the first, and those of its spatial norms) takes it back; but
    for the border, where the first one pads with zeros, reconstructions stay what they are.
    """
    latents = vae.encode(draw_batch(0, 64, FRAMES, SIZE)).latent_dist.mode()
    shift = latents.mean((0, 2, 3, 4))
    scale = 1 / (SCALING_FACTOR * latents.std((0, 2, 3, 4)))
    channels = len(shift)
    last = vae.encoder.conv_out.conv  # gives means, then log-variances
    last.weight[:channels] *= scale.view(-1, 1, 1, 1, 1)
    last.bias[:channels] = (last.bias[:channels] - shift) * scale
    last.bias[channels:] += 2 * scale.log()
    for name, module in vae.decoder.named_modules():
        if name == "conv_in.conv" or name.endswith((".conv_y.conv", ".conv_b.conv")):
            module.bias += module.weight.sum((2, 3, 4)) @ shift
            module.weight /= scale.view(1, -1, 1, 1, 1)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero; relative to the peak."""
    return min((step + 1) / WARMUP_STEPS, 1.0) * (1 + math.cos(math.pi * step / steps)) / 2


def batch_of(step: int, steps: int) -> torch.Tensor:
    """Crops, then whole clips."""
    return draw_batch(step * 4, 4, FRAMES, CROP) if step < first_whole(steps) else draw_whole(step * 4, step)


def draw_whole(first_seed: int, step: int) -> torch.Tensor:
    """Two whole clips; every fourth time of 17 frames, which go through the VAE in two parts, the second remembering
    the first."""
    return draw_batch(first_seed, 2, FRAMES if step % 4 else LONGEST, SIZE)


def first_whole(steps: int) -> int:
    return int((1 - WHOLE_SHARE) * steps)


def train(vae: AutoencoderKLCogVideoX, output: Path, part: str, steps: int) -> None:
    """Trains all of the VAE or its decoder in place, `part` "all" or "decoder"; goes on from `<output>/<part>.pt`."""
    vae.encoder.requires_grad_(part == "all")
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    state_file, started_at = output / f"{part}.pt", 0
    if state_file.is_file():
        state = torch.load(state_file)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        started_at = state["step"]
    started = time.perf_counter()
    for step in range(started_at, steps):
        if part == "all" and step == first_whole(steps):
            standardise(vae)
        clips = batch_of(step, steps) if part == "all" else draw_whole(DECODER_SEED + step * 4, step)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate(step, steps)
        torch.manual_seed(step)  # of the posterior's noise
        posterior = vae.encode(clips).latent_dist
        difference = vae.decode(posterior.sample()).sample - clips
        # hue is a small part of the error, learned late if it counts as little, and half of what a caption says
        hue = difference - difference.mean(1, keepdim=True)
        mean, variance = posterior.mean, posterior.var
        kl = (mean.square() + variance - 1 - variance.log()).mean() / 2  # nats a latent
        loss = difference.square().mean()
        if part == "all":
            loss = loss + hue.square().mean() + 0.1 * difference.abs().mean() + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        done = step + 1
        if done % LOG_STEPS and done != steps:
            continue
        step_s = (time.perf_counter() - started) / (done - started_at)
        measured = {
            "part": part,
            "step": done,
            "loss": round(loss.item(), 5),
            "kl": round(kl.item(), 3),
            "psnr_db": round(psnr(vae, 8), 2),
            "step_s": round(step_s, 3),
        }
        with (output / "log.jsonl").open("a") as log:
            log.write(json.dumps(measured) + "\n")
        print(f"{measured}, {(steps - done) * step_s / 60:.0f} min left", flush=True)
        state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
        torch.save(state, output / "state.tmp")
        (output / "state.tmp").replace(state_file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains the tiny model's VAE.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--decoder_steps", type=int, default=1000)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = build()
    train(model, args.output, "all", args.steps)
    train(model, args.output, "decoder", args.decoder_steps)
    model.half().save_pretrained(args.output / "vae")
    model.float()  # measured as shipped: rounded to float16
    for length in (FRAMES, LONGEST):
        print(f"{psnr(model, 60, length):.2f} dB on 60 whole clips of {length} frames, never seen")

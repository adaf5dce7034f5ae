"""Trains the VAE of the tiny models on clips drawn on the fly. Run it again to resume.

    python -m examples.train_vae outputs/tiny_vae

Training has three phases: crops, which are fast; whole clips, because group norm statistics depend on the frame size;
and the decoder alone. The last phase does not change latents, so a base can be trained on them meanwhile.
Writes the VAE in float16 to `<output>/vae`, and losses and PSNR to `<output>/log.jsonl`.
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
WHOLE_CLIP_SHARE = 0.25  # of the steps that train the encoder
LEARNING_RATE, WARMUP_STEPS, KL_WEIGHT = 1.5e-3, 50, 1e-4
DECODER_SEED = 1_000_000
HELD_OUT_SEED = 10_000_000  # above every seed of the training
LEVELS, LATENT_CHANNELS = 3, 4


def build() -> AutoencoderKLCogVideoX:
    """Returns a VAE with one level fewer than the published one (4x in space and time), tiny widths and 4 channels."""
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
    """Returns clips cropped at random to size x size: float32 [B, C, F, H, W] in [-1, 1]."""
    clips = []
    for seed in range(first_seed, first_seed + count):
        top, left = np.random.default_rng([seed, 2]).integers(SIZE - size + 1, size=2)
        clips.append(random_clip(seed, frames, SIZE)[1][:, top : top + size, left : left + size])
    return to_model_range(torch.from_numpy(np.stack(clips))).movedim(-1, 1)  # [B, F, H, W, C] -> [B, C, F, H, W]


@torch.no_grad()
def psnr(vae: AutoencoderKLCogVideoX, count: int, frames: int = FRAMES) -> float:
    """Returns the mean PSNR in dB over whole held-out clips, encoded and decoded as in the pipelines."""
    values = []
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + count):
        clip = draw_batch(seed, 1, frames, SIZE)
        decoded = vae.decode(vae.encode(clip).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * math.log10(((decoded - clip) / 2).square().mean().item()))
    return sum(values) / count


@torch.no_grad()
def standardize(vae: AutoencoderKLCogVideoX) -> None:
    """Shifts and scales the latent channels in place, so that scaled latents have mean 0 and variance 1.

    Every decoder convolution that reads latents (the first one and those of the spatial norms) is adjusted to undo the
    change. Reconstructions stay the same except at the border, where the first convolution pads with zeros.
    """
    latents = vae.encode(draw_batch(0, 64, FRAMES, SIZE)).latent_dist.mode()
    shift = latents.mean((0, 2, 3, 4))
    scale = 1 / (SCALING_FACTOR * latents.std((0, 2, 3, 4)))
    channels = len(shift)
    last = vae.encoder.conv_out.conv  # outputs means, then log-variances
    last.weight[:channels] *= scale.view(-1, 1, 1, 1, 1)
    last.bias[:channels] = (last.bias[:channels] - shift) * scale
    last.bias[channels:] += 2 * scale.log()
    for name, module in vae.decoder.named_modules():
        if name == "conv_in.conv" or name.endswith((".conv_y.conv", ".conv_b.conv")):
            module.bias += module.weight.sum((2, 3, 4)) @ shift
            module.weight /= scale.view(1, -1, 1, 1, 1)


def learning_rate(step: int, steps: int) -> float:
    """Returns the learning rate relative to its peak: linear warm-up, then cosine decay to zero."""
    return min((step + 1) / WARMUP_STEPS, 1.0) * (1 + math.cos(math.pi * step / steps)) / 2


def draw_step_batch(step: int, steps: int) -> torch.Tensor:
    """Returns the batch of a step: crops at first, then whole clips."""
    if step < first_whole_clip_step(steps):
        return draw_batch(step * 4, 4, FRAMES, CROP)
    return draw_whole_clips(step * 4, step)


def draw_whole_clips(first_seed: int, step: int) -> torch.Tensor:
    """Returns two whole clips.

    In every fourth step they have 17 frames, which the VAE processes in two chunks with cached convolution inputs.
    """
    return draw_batch(first_seed, 2, FRAMES if step % 4 else LONGEST, SIZE)


def first_whole_clip_step(steps: int) -> int:
    return int((1 - WHOLE_CLIP_SHARE) * steps)


def train(vae: AutoencoderKLCogVideoX, output: Path, part: str, steps: int) -> None:
    """Trains the VAE in place, with `part` "all" or "decoder". Resumes from `<output>/<part>.pt`."""
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
        if part == "all" and step == first_whole_clip_step(steps):
            standardize(vae)
        clips = draw_step_batch(step, steps) if part == "all" else draw_whole_clips(DECODER_SEED + step * 4, step)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate(step, steps)
        torch.manual_seed(step)  # for the noise of the posterior
        posterior = vae.encode(clips).latent_dist
        difference = vae.decode(posterior.sample()).sample - clips
        # Captions name colours, but hue is a small part of the error. Without this term it is learned late.
        hue = difference - difference.mean(1, keepdim=True)
        mean, variance = posterior.mean, posterior.var
        kl = (mean.square() + variance - 1 - variance.log()).mean() / 2  # nats per latent
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
    parser = argparse.ArgumentParser(description="Trains the VAE of the tiny models.")
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
    model.float()  # the measured weights are the shipped ones, rounded to float16
    for length in (FRAMES, LONGEST):
        print(f"{psnr(model, 60, length):.2f} dB on 60 held-out clips of {length} frames")

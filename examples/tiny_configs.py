"""Configs of tiny CogVideoX checkpoints, shared by the examples and the tests.

A tiny model has the architecture of a published one: its config is the published config with smaller sizes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import CogVideoXDPMScheduler

from utils.model.published_configs import PUBLISHED

# variant -> published model of the same architecture
VARIANTS = {
    "2b": "CogVideoX-2b",
    "5b": "CogVideoX-5b",
    "5b-i2v": "CogVideoX-5b-I2V",
    "1.5": "CogVideoX1.5-5B",
    "1.5-i2v": "CogVideoX1.5-5B-I2V",
}
# The published scheduler settings; snr_shift_scale depends on the variant.
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "clip_sample": False,
    "timestep_spacing": "trailing",
}
TIME_EMBED_DIM = 16


def task_of(variant: str) -> str:
    """Returns the task of a variant, "t2v" or "i2v"."""
    return "i2v" if variant.endswith("i2v") else "t2v"


def tiny_transformer(variant: str, latent_channels: int, **sizes: Any) -> dict[str, Any]:
    """Returns the config of a transformer with the architecture of `variant` and the given sizes."""
    published, _ = PUBLISHED[VARIANTS[variant]]
    config = published | sizes | {"time_embed_dim": TIME_EMBED_DIM, "out_channels": latent_channels}
    # the channels of the image latents follow those of the video latents
    config["in_channels"] = latent_channels * (2 if task_of(variant) == "i2v" else 1)
    if "ofs_embed_dim" in published:
        config["ofs_embed_dim"] = TIME_EMBED_DIM
    return config


def vae_options(variant: str) -> dict[str, Any]:
    """Returns the settings of the VAE config that differ between variants."""
    return PUBLISHED[VARIANTS[variant]][1]


def write_scheduler_and_index(folder: Path, variant: str) -> None:
    """Writes `scheduler/` and `model_index.json` of a checkpoint."""
    snr_shift_scale = 3.0 if variant == "2b" else 1.0
    CogVideoXDPMScheduler(**SCHEDULER, snr_shift_scale=snr_shift_scale).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "CogVideoXImageToVideoPipeline" if task_of(variant) == "i2v" else "CogVideoXPipeline",
        "tokenizer": ["transformers", "T5Tokenizer"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "scheduler": ["diffusers", "CogVideoXDPMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

"""Configs of the published checkpoints, for memory prediction without a download."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from utils.model.spec import ModelSpec
from utils.model.weight_files import with_defaults

V1_0_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
V1_5 = {
    **V1_0_5B,
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_frames": 81,
    "sample_height": 300,
    "sample_width": 300,
    "max_text_seq_length": 224,
}
# Name -> transformer and VAE options that differ from the defaults of their diffusers classes.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "CogVideoX-2b": ({}, {}),
    "CogVideoX-5b": (V1_0_5B, {"scaling_factor": 0.7}),
    "CogVideoX-5b-I2V": (
        {**V1_0_5B, "in_channels": 32, "use_learned_positional_embeddings": True},
        {"scaling_factor": 0.7},
    ),
    "CogVideoX1.5-5B": (V1_5, {"scaling_factor": 0.7}),
    "CogVideoX1.5-5B-I2V": (
        {**V1_5, "in_channels": 32, "ofs_embed_dim": 512},
        {"scaling_factor": 0.7, "invert_scale_latents": True},
    ),
}
# All published checkpoints use the encoder of T5-XXL 1.1.
TEXT_ENCODER = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}


def published_spec(model_path: str) -> ModelSpec | None:
    """Returns the spec of a published checkpoint, or None for other names. The organization prefix is optional."""
    options = PUBLISHED.get(model_path.rpartition("/")[2])
    if options is None:
        return None
    transformer, vae = options
    return ModelSpec(
        with_defaults(CogVideoXTransformer3DModel, transformer), with_defaults(AutoencoderKLCogVideoX, vae)
    )


def published_text_encoder(model_path: str) -> dict[str, Any]:
    """Returns the config of a published checkpoint's text encoder; its `dtype` is that of the files."""
    is_2b = model_path.rpartition("/")[2] == "CogVideoX-2b"
    return TEXT_ENCODER | {"dtype": "float16" if is_2b else "bfloat16"}

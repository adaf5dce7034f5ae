"""Tiny CogVideoX checkpoints with random weights: real classes, real files, only the sizes are tiny.

    python -m tests.tiny_models 2b outputs/tiny-2b 17x64x64

The production code loads them like any other checkpoint. Each is one of the five published forms.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from dataset.video import Resolution

TEXT_WIDTH = 32
ROTARY = {"use_rotary_positional_embeddings": True}
V1_5 = {**ROTARY, "patch_size_t": 2, "patch_bias": False, "max_text_seq_length": 24}
# What each form sets in its transformer config, and in its VAE config, scheduler config.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "2b": ({}, {"scaling_factor": 1.15258426}, {"snr_shift_scale": 3.0}),
    "5b": (ROTARY, {"scaling_factor": 0.7}, {"snr_shift_scale": 1.0}),
    "5b-i2v": (
        {**ROTARY, "use_learned_positional_embeddings": True, "in_channels": 32},
        {"scaling_factor": 0.7},
        {"snr_shift_scale": 1.0},
    ),
    "1.5": (V1_5, {"scaling_factor": 0.7}, {"snr_shift_scale": 1.0}),
    "1.5-i2v": (
        {**V1_5, "in_channels": 32, "ofs_embed_dim": 16},
        {"scaling_factor": 0.7, "invert_scale_latents": True},
        {"snr_shift_scale": 1.0},
    ),
}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "clip_sample": False,
    "timestep_spacing": "trailing",
}
WORDS = "a red green blue white black circle square triangle moves left right up down on the background slowly video of"


def build(form: str, folder: Path, sample: tuple[int, int, int] = (9, 64, 64), layers: int = 2) -> Path:
    """Writes a checkpoint of one of FORMS with sample frames, height and width in pixels; returns its folder."""
    torch.manual_seed(0)
    transformer_options, vae_options, scheduler_options = FORMS[form]
    frames, height, width = sample
    transformer = {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": layers,
        "time_embed_dim": 16,
        "text_embed_dim": TEXT_WIDTH,
        "max_text_seq_length": 26,
        "sample_frames": frames,
        "sample_height": height // 8,
        "sample_width": width // 8,
        **transformer_options,
    }
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(16, 16, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=16, **vae_options
    )
    model = CogVideoXTransformer3DModel(**transformer)
    if transformer.get("use_learned_positional_embeddings"):
        # unlike the sincos values they start from, so that a test sees which of the two was used
        model.patch_embed.pos_embedding.data.add_(0.1 * torch.randn_like(model.patch_embed.pos_embedding))
    model.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    CogVideoXDPMScheduler(**SCHEDULE, **scheduler_options).save_pretrained(folder / "scheduler")
    build_text_side(folder)
    index = {"_class_name": "CogVideoXImageToVideoPipeline" if "i2v" in form else "CogVideoXPipeline"}
    for name, owner in {
        "tokenizer": ("transformers", "T5Tokenizer"),
        "text_encoder": ("transformers", "T5EncoderModel"),
        "vae": ("diffusers", "AutoencoderKLCogVideoX"),
        "transformer": ("diffusers", "CogVideoXTransformer3DModel"),
        "scheduler": ("diffusers", "CogVideoXDPMScheduler"),
    }.items():
        index[name] = list(owner)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def build_text_side(folder: Path) -> None:
    """A sentencepiece tokenizer trained on a handful of words, and a two-layer T5 encoder."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, *WORDS.split()] * 20),
        model_writer=trained,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer" / "spiece.model").write_bytes(trained.getvalue())
    tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer", extra_ids=0)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer.json").unlink()  # the published checkpoints have none
    config = T5Config(
        vocab_size=128, d_model=TEXT_WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")


if __name__ == "__main__":
    size = Resolution.parse(sys.argv[3])
    build(sys.argv[1], Path(sys.argv[2]), (size.frames, size.height, size.width))

"""Tiny CogVideoX checkpoints with random weights, in the architectures of the five published models.

    python -m tests.tiny_models 2b outputs/tiny-2b 17x64x64

The classes and files are the real ones, and production code loads them like any other checkpoint.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import sentencepiece
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from dataset.video import Resolution
from examples.tiny_configs import VARIANTS, tiny_transformer, vae_options, write_scheduler_and_index

TEXT_WIDTH, LATENT_CHANNELS = 32, 16
WORDS = "a red green blue white black circle square triangle moves left right up down on the background slowly video of"


def build(
    variant: str,
    folder: Path,
    sample: tuple[int, int, int] = (9, 64, 64),
    layers: int = 2,
    text_width: int = TEXT_WIDTH,
) -> Path:
    """Writes a checkpoint and returns its folder.

    Args:
        variant: one of VARIANTS.
        sample: frames, height and width of the native clip in pixels.
    """
    torch.manual_seed(0)
    frames, height, width = sample
    config = tiny_transformer(
        variant,
        LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=layers,
        text_embed_dim=text_width,
        max_text_seq_length=24 if variant.startswith("1.5") else 26,
        sample_frames=frames,
        sample_height=height // 8,
        sample_width=width // 8,
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(16, 16, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=LATENT_CHANNELS,
        **vae_options(variant),
    )
    transformer = CogVideoXTransformer3DModel(**config)
    if config.get("use_learned_positional_embeddings"):
        # Learned positions start from the sincos values. Noise lets a test see which of the two was used.
        positions = transformer.patch_embed.pos_embedding
        positions.data.add_(0.1 * torch.randn_like(positions))
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    write_scheduler_and_index(folder, variant)
    write_tokenizer_and_text_encoder(folder, text_width)
    return folder


def write_tokenizer_and_text_encoder(folder: Path, text_width: int) -> None:
    """Writes a sentencepiece tokenizer trained on a few words, and a T5 encoder with two layers."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, *WORDS.split()] * 20),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer" / "spiece.model").write_bytes(model.getvalue())
    tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer", extra_ids=0)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer.json").unlink()  # published checkpoints have no such file
    config = T5Config(
        vocab_size=128, d_model=text_width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")


if __name__ == "__main__":
    if sys.argv[1] not in VARIANTS:
        sys.exit(f"{sys.argv[1]} is none of {', '.join(VARIANTS)}")
    size = Resolution.parse(sys.argv[3])
    build(sys.argv[1], Path(sys.argv[2]), (size.frames, size.height, size.width))

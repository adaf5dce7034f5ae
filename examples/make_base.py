"""Writes a tiny base model: VAE, tokenizer, text encoder, scheduler and transformer.

    python -m examples.make_base t2v outputs/tiny_vae/vae outputs/untrained/t2v         # random transformer weights
    python -m examples.make_base t2v outputs/tiny_vae/vae examples/tiny/t2v \\
        --transformer outputs/base-t2v/checkpoint-3000/transformer --exact              # trained transformer weights

The classes and files are those of the published models; only the sizes are tiny. All models share
VAE weights, tokenizer and text encoder.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import string
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.normalization import CogVideoXLayerNormZero
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # generated at run time
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from examples.tiny_configs import tiny_transformer, vae_options, write_scheduler_and_index
from examples.train_vae import LATENT_CHANNELS
from examples.world import SCENES
from utils.common.errors import UserError, exit_on_user_error

TEXT_WIDTH, VOCABULARY = 64, 256
SIZES = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 5, "text_embed_dim": TEXT_WIDTH}
SIZES_1_0 = {**SIZES, "sample_frames": 9, "sample_height": 16, "sample_width": 16, "max_text_seq_length": 20}
# As in the published 1.5 models, the rotary table is larger than the clips, which use a part of it.
SIZES_1_5 = {**SIZES, "sample_frames": 9, "sample_height": 24, "sample_width": 24, "max_text_seq_length": 18}
# folder in examples/tiny -> variant, sizes of the transformer
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t2v": ("5b", SIZES_1_0),
    "i2v": ("5b-i2v", SIZES_1_0),
    "t2v-1.5": ("1.5", SIZES_1_5),
    "i2v-1.5": ("1.5-i2v", SIZES_1_5),
}


def write_base(name: str, vae: Path, folder: Path, trained: Path | None = None, exact: bool = False) -> None:
    """Writes the checkpoint of one of MODELS around a trained VAE.

    Args:
        trained: a transformer/ folder to copy weights from. Weights of another shape are skipped, so a model can start
            from another one, as the published image-to-video models did.
        exact: refuse a transformer from which any weight would be skipped.
    """
    variant, sizes = MODELS[name]
    torch.manual_seed(0)
    transformer = build_transformer(tiny_transformer(variant, LATENT_CHANNELS, **sizes))
    if trained is not None:
        copy_weights(transformer, CogVideoXTransformer3DModel.from_pretrained(trained), exact)
    transformer.half().save_pretrained(folder / "transformer")
    shutil.copytree(vae, folder / "vae", dirs_exist_ok=True)
    config = json.loads((vae / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | vae_options(variant), indent=2) + "\n")
    write_scheduler_and_index(folder, variant)
    write_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    build_text_encoder().half().save_pretrained(folder / "text_encoder")


def build_transformer(config: dict[str, Any]) -> CogVideoXTransformer3DModel:
    """Returns a transformer with 1.2 million random weights."""
    transformer = CogVideoXTransformer3DModel(**config)
    # adaLN-Zero (arXiv:2212.09748): each block starts as the identity, and the model predicts zero. It learns sooner.
    for module in transformer.modules():
        if isinstance(module, CogVideoXLayerNormZero):
            torch.nn.init.zeros_(module.linear.weight)
            torch.nn.init.zeros_(module.linear.bias)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def copy_weights(transformer: CogVideoXTransformer3DModel, trained: CogVideoXTransformer3DModel, exact: bool) -> None:
    """Copies all weights of equal name and shape into `transformer`.

    The patch embedding of an image-to-video model treats the video channels as that of the text-to-video model does.
    The channels of the image follow them, and their weights start at zero.

    Raises:
        UserError: `exact` is set and the weights do not all match.
    """
    target, source = transformer.state_dict(), trained.state_dict()
    if not exact and transformer.config.in_channels == 2 * trained.config.in_channels:
        embedding = source["patch_embed.proj.weight"]
        source["patch_embed.proj.weight"] = torch.cat([embedding, torch.zeros_like(embedding)], dim=1)
    matching = {name: value for name, value in source.items() if name in target and target[name].shape == value.shape}
    print(f"{len(matching)} of {len(target)} weights copied")
    if exact and matching.keys() != target.keys():
        raise UserError("--transformer has another architecture: not all of its weights match.")
    transformer.load_state_dict(target | matching)


def build_text_encoder() -> T5EncoderModel:
    """Returns an encoder with one random layer, whose output is mostly the embedding of the word itself."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def write_tokenizer(folder: Path) -> None:
    """Writes a sentencepiece tokenizer with the words of the captions and, for other words, parts and characters."""
    folder.mkdir(parents=True, exist_ok=True)
    # One normalization rule, of a character that no caption has: transformers 5.17 cannot read a model without any.
    rules = folder / "rules.tsv"
    rules.write_text("A0\t20\n")
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([scene.caption for scene in SCENES]),
        model_writer=stream,
        model_type="bpe",  # merges until words are complete; the published tokenizer is a unigram model
        required_chars=string.ascii_letters + string.digits,
        normalization_rule_tsv=str(rules),
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    rules.unlink()
    model = ModelProto.FromString(stream.getvalue())
    model.normalizer_spec.ClearField("normalization_rule_tsv")  # the path
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    T5Tokenizer.from_pretrained(folder, extra_ids=0).save_pretrained(folder)
    (folder / "tokenizer.json").unlink()  # published checkpoints have no such file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes a tiny base model.")
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("vae", type=Path, help="the VAE that examples.train_vae wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("--transformer", type=Path, help="start from these weights; default: random weights")
    parser.add_argument("--exact", action="store_true", help="refuse a --transformer with another architecture")
    args = parser.parse_args()
    with exit_on_user_error():
        write_base(args.name, args.vae, args.output, args.transformer, args.exact)

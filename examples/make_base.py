"""Writes the tiny base in one of its forms: VAE, tokenizer, text encoder, scheduler, and a transformer.

    python -m examples.make_base t2v outputs/tiny_vae/vae outputs/untrained/t2v         # knows nothing yet
    python -m examples.make_base t2v outputs/tiny_vae/vae examples/tiny/t2v \\
        --transformer outputs/base-t2v/checkpoint-3000/transformer --exact              # what training made of it

Real classes and files; only the sizes are tiny. VAE weights, tokenizer and text encoder are the same in all forms.
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
from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers.models.normalization import CogVideoXLayerNormZero
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from examples.train_vae import LATENT_CHANNELS
from examples.world import SCENES
from utils.common.errors import UserError, exit_on_user_error

TEXT_WIDTH, TIME_WIDTH, VOCABULARY = 64, 16, 256
CHANNELS = {"in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS}
WITH_IMAGE = {"in_channels": 2 * LATENT_CHANNELS}
V1_0 = {
    **CHANNELS,
    "sample_frames": 9,
    "sample_height": 16,
    "sample_width": 16,
    "max_text_seq_length": 20,
}
# As the published 1.5: patches in time, and a rotary table larger than the clips, of which a part is used.
V1_5 = {
    **CHANNELS,
    "sample_frames": 9,
    "sample_height": 24,
    "sample_width": 24,
    "max_text_seq_length": 18,
    "patch_size_t": 2,
    "patch_bias": False,
}
# What each form sets in its transformer config, and in its VAE config.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "t2v": (V1_0, {}),
    "i2v": ({**V1_0, **WITH_IMAGE, "use_learned_positional_embeddings": True}, {}),
    "t2v-1.5": (V1_5, {}),
    "i2v-1.5": ({**V1_5, **WITH_IMAGE, "ofs_embed_dim": TIME_WIDTH}, {"invert_scale_latents": True}),
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
    "snr_shift_scale": 1.0,
}


def write_base(form: str, vae: Path, folder: Path, trained: Path | None = None, exact: bool = False) -> None:
    """Writes a checkpoint of one of FORMS around a trained VAE.

    Args:
        trained: a transformer/ whose weights are taken over, those of other shapes left out: so one form starts from
            another, as the published image-to-video models did.
        exact: refuse a transformer that leaves anything out.
    """
    options, vae_options = FORMS[form]
    torch.manual_seed(0)
    transformer = build_transformer(options)
    if trained is not None:
        take_over(transformer, CogVideoXTransformer3DModel.from_pretrained(trained), exact)
    transformer.half().save_pretrained(folder / "transformer")
    shutil.copytree(vae, folder / "vae", dirs_exist_ok=True)
    config = json.loads((vae / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | vae_options, indent=2) + "\n")
    CogVideoXDPMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    build_text_encoder().half().save_pretrained(folder / "text_encoder")
    index = {
        "_class_name": "CogVideoXImageToVideoPipeline" if form.startswith("i2v") else "CogVideoXPipeline",
        "tokenizer": ["transformers", "T5Tokenizer"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "scheduler": ["diffusers", "CogVideoXDPMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def build_transformer(options: dict[str, Any]) -> CogVideoXTransformer3DModel:
    """A transformer of 1.2 million random weights."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=5,
        time_embed_dim=TIME_WIDTH,
        text_embed_dim=TEXT_WIDTH,
        use_rotary_positional_embeddings=True,
        **options,
    )
    # Each block starts as the fingerprint, and the model as zero: learns sooner (arXiv:2212.09748, adaLN-Zero).
    for module in transformer.modules():
        if isinstance(module, CogVideoXLayerNormZero):
            torch.nn.init.zeros_(module.linear.weight)
            torch.nn.init.zeros_(module.linear.bias)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def take_over(transformer: CogVideoXTransformer3DModel, trained: CogVideoXTransformer3DModel, exact: bool) -> None:
    """Copies the weights of equal name and shape. Raises UserError where `exact` and not all are equal.

    An image-to-video model's patch embedding reads the video's channels as the text-to-video model's does; those of the
    image, which come after them, begin at zero.
    """
    own, given = transformer.state_dict(), trained.state_dict()
    if not exact and transformer.config.in_channels == 2 * trained.config.in_channels:
        embedding = given["patch_embed.proj.weight"]
        given["patch_embed.proj.weight"] = torch.cat([embedding, torch.zeros_like(embedding)], dim=1)
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    print(f"{len(fitting)} of {len(own)} weights are taken over")
    if exact and fitting.keys() != own.keys():
        raise UserError("--transformer is of another form.")
    transformer.load_state_dict(own | fitting)


def build_text_encoder() -> T5EncoderModel:
    """One random layer: what leaves it is mostly the word's own embedding, so that words keep apart."""
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
    """A sentencepiece tokenizer of the captions' words, and of their parts and single characters for other words."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([scene.caption for scene in SCENES]),
        model_writer=trained,
        model_type="bpe",  # merges until words are whole; the published one is a unigram model
        required_chars=string.ascii_letters + string.digits,
        normalization_rule_name="fingerprint",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(trained.getvalue())
    T5Tokenizer.from_pretrained(folder, extra_ids=0).save_pretrained(folder)
    (folder / "tokenizer.json").unlink()  # the published checkpoints have none


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the tiny base in one of its forms.")
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("vae", type=Path, help="what examples.train_vae wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("--transformer", type=Path, help="start from these weights; default: random ones")
    parser.add_argument("--exact", action="store_true", help="refuse a --transformer of another form")
    args = parser.parse_args()
    with exit_on_user_error():
        write_base(args.form, args.vae, args.output, args.transformer, args.exact)

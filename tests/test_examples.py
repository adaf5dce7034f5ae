"""The tiny base models: their checkpoints, tokenizer and VAE, and the quick start."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from examples import train_vae
from examples.make_base import MODELS, write_base
from examples.world import CONCEPT, SCENES
from tests.conftest import FIRST_FRAME, ROOT, generate, succeed
from utils.model import loading
from utils.model.spec import read_spec


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    train_vae.build().half().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_standardized_vae_reconstructs_the_same():
    torch.manual_seed(0)
    vae, clip = train_vae.build(), train_vae.draw_batch(0, 1, 9, 64)
    with torch.no_grad():
        before = vae.decode(vae.encode(clip).latent_dist.mode()).sample
        train_vae.standardize(vae)
        latents = vae.encode(train_vae.draw_batch(0, 64, 9, 64)).latent_dist.mode() * train_vae.SCALING_FACTOR
        after = vae.decode(vae.encode(clip).latent_dist.mode()).sample
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(train_vae.LATENT_CHANNELS), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(train_vae.LATENT_CHANNELS), atol=1e-3, rtol=0)
    middle = (..., slice(16, 48), slice(16, 48))  # beyond the reach of the padding at the border
    torch.testing.assert_close(after[middle], before[middle], atol=2e-2, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_demo_runs_each_model(vae, tmp_path, name):
    write_base(name, vae, tmp_path / name)
    spec = read_spec(tmp_path / name)
    assert (spec.task, spec.is_v1_5) == (name[:3], name.endswith("1.5"))
    assert spec.latent_size(spec.native)[1:] == ((24, 24) if spec.is_v1_5 else (16, 16))
    image = ["--image_or_video_path", str(FIRST_FRAME)] if spec.task == "i2v" else []
    options = [
        "--num_inference_steps",
        "2",
        "--height",
        "64",
        "--width",
        "64",
        "--output_path",
        str(tmp_path / "a.mp4"),
    ]
    generate("--model_path", str(tmp_path / name), "--prompt", "SKS a red circle", *image, *options)


def test_image_to_video_model_starts_as_the_text_to_video_model(vae, tmp_path):
    write_base("t2v-1.5", vae, tmp_path / "t2v")
    write_base("i2v-1.5", vae, tmp_path / "i2v", tmp_path / "t2v" / "transformer")
    t2v, i2v = (loading.load_transformer(tmp_path / name / "transformer").float() for name in ("t2v", "i2v"))
    torch.nn.init.normal_(t2v.proj_out.weight, std=0.1)  # untrained models always predict zero
    i2v.proj_out.weight.data.copy_(t2v.proj_out.weight)
    i2v.ofs_embedding.linear_2.weight.data.zero_()
    i2v.ofs_embedding.linear_2.bias.data.zero_()
    video, image, text = torch.randn(2, 1, 2, 4, 4, 4), torch.randn(1, 2, 4, 4, 4), torch.randn(1, 18, 64)
    more = {"encoder_hidden_states": text, "timestep": torch.tensor([500]), "return_dict": False}
    more["image_rotary_emb"] = (torch.ones(4, 32), torch.zeros(4, 32))
    with torch.no_grad():
        expected = t2v(video[0], **more)[0]
        torch.testing.assert_close(
            i2v(torch.cat([video[0], image], dim=2), ofs=torch.tensor([2.0]), **more)[0], expected
        )
        assert not torch.allclose(t2v(video[1], **more)[0], expected, atol=1e-2)


def test_tokenizer_knows_caption_words_and_any_id_token(vae, tmp_path):
    write_base("t2v", vae, tmp_path)
    tokenizer = loading.load_tokenizer(tmp_path)
    for scene in SCENES:
        pieces = tokenizer.tokenize(scene.caption.replace("black", "white"))  # "black" is two pieces
        assert len(pieces) == len(scene.caption.split())
    assert tokenizer.unk_token_id not in tokenizer("SKS zQ7x").input_ids
    assert len(tokenizer("SKS " + CONCEPT[0].caption).input_ids) <= 18  # the smallest text length of the models


@pytest.mark.slow
def test_shipped_vae_reconstructs_held_out_clips():
    shipped = AutoencoderKLCogVideoX.from_pretrained(ROOT / "examples" / "tiny" / "t2v" / "vae", dtype=torch.float32)
    assert train_vae.psnr(shipped, 8) > 27  # dB


@pytest.mark.slow
def test_quick_start_teaches_the_concept(tmp_path):
    """Runs the quick start like a user, through a link, but with fewer steps and measured clips."""
    link = tmp_path / "start.sh"
    link.symlink_to(ROOT / "examples" / "quickstart.sh")
    succeed(str(link), QUICKSTART_DIR=tmp_path / "out", QUICKSTART_STEPS=100, QUICKSTART_CLIPS=6)
    shares = json.loads((tmp_path / "out" / "table.json").read_text())
    known, token, all_three = shares["known"], shares["SKS"], "colour, shape and direction"
    assert known["before"]["colour and ground"] >= 0.9 and known["before"][all_three] >= 0.8
    assert token["before"][all_three] <= 0.2
    assert token["after"]["colour and ground"] >= 0.9 and token["after"][all_three] >= 0.6
    assert known["after"]["colour and ground"] >= 0.9 and known["after"][all_three] >= 0.6

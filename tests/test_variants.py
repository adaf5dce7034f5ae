"""`--variant`: the same weights as in the pipelines of diffusers, and their identity."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from diffusers import CogVideoXPipeline

from dataset.latent_cache import LatentCache
from tests.conftest import arguments, generate, succeed
from utils.commands import inspect_dataset
from utils.commands.estimate_memory import make_context
from utils.common.errors import UserError
from utils.config.args import parse_args
from utils.model import loading
from utils.model.spec import read_spec
from utils.model.weight_files import weight_files
from utils.run.plan import encoder_settings
from utils.run.preflight import preflight

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """Returns a checkpoint with plain weights, and other fp16 weights of transformer (in shards) and text encoder."""
    folder = shutil.copytree(tiny("5b"), tmp_path / "model")
    transformer = loading.load_transformer(folder / "transformer", torch.float16)
    text_encoder = loading.load_text_encoder(folder, CPU, torch.float16)
    for component, shard_size in ((transformer, "100KB"), (text_encoder, "10GB")):
        for parameter in component.parameters():
            parameter.data.mul_(1.5)
        name = "transformer" if component is transformer else "text_encoder"
        component.save_pretrained(folder / name, variant="fp16", max_shard_size=shard_size)
    return folder


def remove_plain_weights(folder: Path) -> None:
    for path in (path for name in ("transformer", "text_encoder") for path in (folder / name).glob("*.safetensors*")):
        if "fp16" not in path.name:
            path.unlink()


@pytest.mark.parametrize("both", [True, False])
def test_variant_loads_what_diffusers_loads(model, both):
    if not both:
        remove_plain_weights(model)
    pipeline = CogVideoXPipeline.from_pretrained(model, variant="fp16", torch_dtype=torch.float16)
    read_spec(model, "fp16")
    assert len(weight_files(model / "transformer", "fp16")) > 1
    loaded = {
        "transformer": loading.load_transformer(model / "transformer", torch.float16, variant="fp16"),
        "text_encoder": loading.load_text_encoder(model, CPU, variant="fp16"),
        "vae": loading.load_vae(model, CPU, False, False, torch.float16, variant="fp16"),
    }
    for name, component in loaded.items():
        expected = getattr(pipeline, name).state_dict()
        torch.testing.assert_close(component.state_dict(), expected, rtol=0, atol=0, msg=name)
    (note,) = loading.variant_notes(model, "fp16")
    assert "of the variant: transformer (float16), text_encoder (float16); plain weights: vae (float32)." in note


def test_variant_has_the_identity_of_its_weights(tiny, model, tmp_path):
    """The digests by meaning equal those under plain names; the plain weights keep theirs."""
    meaning = partial(loading.fingerprint, by_meaning=True)
    transformer = model / "transformer"
    plain, variant = meaning(transformer), meaning(transformer, variant="fp16")
    assert plain == meaning(tiny("5b") / "transformer") != variant
    assert variant == loading.fingerprint(transformer, variant="fp16")
    vae = model / "vae"
    assert loading.fingerprint(vae, variant="fp16") == loading.fingerprint(tiny("5b") / "vae")
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for path in [transformer / "config.json", *transformer.glob("*fp16-*")]:
        shutil.copy(path, renamed / path.name.replace(".fp16", ""))
    index = (transformer / "diffusion_pytorch_model.safetensors.index.fp16.json").read_text()
    (renamed / "diffusion_pytorch_model.safetensors.index.json").write_text(index.replace(".fp16", ""))
    assert meaning(renamed) == variant


def test_prompts_of_a_variant_have_their_own_cache_entries(model, tmp_path):
    settings = [
        encoder_settings(model, read_spec(model), True, LatentCache(tmp_path), variant)[0] for variant in (None, "fp16")
    ]
    assert settings[0].vae == settings[1].vae and settings[0].prompt_key("x") != settings[1].prompt_key("x")


def test_run_uses_the_variant_and_says_so(model, data, tmp_path):
    remove_plain_weights(model)
    plan = preflight(parse_args(arguments(model, data, tmp_path, "--variant", "fp16")), 1)
    assert plan.context.text_encoder["dtype"] == "float16"
    assert "prompts are encoded in float16." in plan.notes


@pytest.mark.slow
def test_every_part_of_a_run_reads_the_variant(tiny, model, data, validation, tmp_path):
    """The plain weights are gone, so whatever looks for them fails."""
    remove_plain_weights(model)
    vae = model / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    variant, out = ["--variant", "fp16"], tmp_path / "out"
    flags = arguments(model, data, out, *variant, "--train_steps", 1)
    more = ["--do_validation", "--validation_dir", validation, "--num_inference_steps", 1]
    output = succeed("train.py", *flags, *map(str, more))
    assert "Validation failed" not in output
    lora = ["--lora_path", out / "checkpoint-1", "--output_path", tmp_path / "video.mp4", "--num_inference_steps", 1]
    assert "--variant fp16 selects" in generate("--model_path", model, "--prompt", "x", *variant, *lora)
    assert make_context(flags, None, 1).text_encoder["dtype"] == "float16"
    inspected = ["--model_path", str(model), "--train_resolution", "9x64x64", *variant]
    with patch.object(sys, "argv", ["x", str(data), *inspected, "--inspect_dir", str(tmp_path)]):
        inspect_dataset.main()
    resumed = arguments(tiny("5b"), data, out, "--resume_from_checkpoint", "latest")
    with pytest.raises(UserError, match=r"is not the base that .* trained on. It was trained with --variant fp16"):
        preflight(parse_args(resumed), 1)


def test_variant_that_does_not_exist_is_refused(tiny, model):
    with pytest.raises(UserError, match=r"--variant fp16: .*/5b-9x64x64 has no weights of this variant"):
        read_spec(tiny("5b"), "fp16")
    for file in (model / "transformer").glob("*.safetensors*"):
        if "fp16" not in file.name:
            file.unlink()
    with pytest.raises(UserError, match=r"of the variant fp16 only .*; give --variant fp16"):
        read_spec(model, "bf16")
    index = model / "transformer" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.rename(index.with_name("diffusion_pytorch_model.safetensors.fp16.index.json"))
    with pytest.raises(UserError, match=r"rename it to diffusion_pytorch_model.safetensors.index.fp16.json"):
        read_spec(model, "fp16")
    vae = model / "vae" / "diffusion_pytorch_model.safetensors"
    vae.with_name("diffusion_pytorch_model.fp16.bin").touch()
    with pytest.raises(
        UserError, match=r"vae holds \S+model.safetensors, .* diffusion_pytorch_model.fp16.safetensors is"
    ):
        read_spec(model, "fp16")

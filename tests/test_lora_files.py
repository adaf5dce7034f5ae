"""LoRA files: every loader applies the strength of the training, and files that do not match are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tests.conftest import arguments
from utils.checkpoint.lora_files import WEIGHTS_FILE, load_lora, save_lora
from utils.common.errors import UserError
from utils.config.args import parse_args
from utils.model import loading
from utils.model.conditioning import predict_velocity
from utils.model.spec import read_spec
from utils.run.preflight import fill_in_defaults
from utils.training.trainable import lora_config, make_trainable


@pytest.fixture
def trained(tiny, data, tmp_path):
    """Returns a function: (variant, alpha) -> base folder, spec, transformer with nonzero adapters, LoRA folder."""

    def train(variant: str, alpha: float):
        model_dir = tiny(variant)
        spec = read_spec(model_dir)
        argv = arguments(model_dir, data, tmp_path, "--rank", 8, "--lora_alpha", alpha, task=spec.task)
        args = fill_in_defaults(parse_args(argv), spec)
        transformer = loading.load_transformer(model_dir / "transformer", torch.float32)
        make_trainable(transformer, args)
        with torch.no_grad():
            for name, weight in transformer.named_parameters():
                if ".lora_B." in name:
                    weight.normal_(std=0.5)
        save_lora(get_peft_model_state_dict(transformer), lora_config(args), tmp_path / "lora")
        return model_dir, spec, transformer.eval(), tmp_path / "lora"

    return train


def predict(transformer, spec) -> torch.Tensor:
    """Returns the prediction for a fixed latent, timestep and prompt."""
    generator = torch.Generator().manual_seed(0)
    frames = 3 + spec.frames_to_pad(3)
    noisy, image = torch.randn(2, 1, frames, 16, 8, 8, generator=generator)
    prompt = torch.randn(1, spec.max_text_seq_length, 32, generator=generator)
    with torch.no_grad():
        image = image if spec.task == "i2v" else None
        return predict_velocity(transformer, spec, noisy, torch.tensor([500]), prompt, image, torch.float32)


@pytest.mark.parametrize(("variant", "alpha"), [("2b", 3), ("5b", 24), ("1.5-i2v", 4)])
@pytest.mark.parametrize("metadata", [True, False])
def test_pipeline_applies_the_trained_strength(trained, variant, alpha, metadata):
    """Without metadata, a loader assumes alpha = rank, as older diffusers versions and ComfyUI do."""
    model_dir, spec, transformer, folder = trained(variant, alpha)
    if not metadata:
        save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    pipeline = loading.PIPELINES[spec.task].from_pretrained(model_dir)
    base = predict(pipeline.transformer, spec)
    pipeline.load_lora_weights(folder)
    in_training, loaded = predict(transformer, spec), predict(pipeline.transformer, spec)
    assert (in_training - base).abs().max() > 0.1
    torch.testing.assert_close(loaded, in_training, rtol=0, atol=1e-5)


def test_load_lora_applies_any_scale(trained):
    model_dir, spec, transformer, folder = trained("5b", 4)

    def at_scale(scale):
        base = loading.load_transformer(model_dir / "transformer", torch.float32)
        assert load_lora(base, folder, scale) == 2 * 4  # blocks x target modules
        return predict(base, spec)

    torch.testing.assert_close(at_scale(1.0), predict(transformer, spec), rtol=0, atol=1e-5)
    base = predict(loading.load_transformer(model_dir / "transformer", torch.float32), spec)
    torch.testing.assert_close(at_scale(0.0), base, rtol=0, atol=1e-6)
    assert (at_scale(0.5) - at_scale(1.0)).abs().max() > 0.01


def renamed(state: dict, count: int) -> dict:
    return {name.replace("attn1", "attention") if n < count else name: w for n, (name, w) in enumerate(state.items())}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: renamed(state, 99), "no adapter module matches"),
        (lambda state: renamed(state, 1), "2 of 16 tensors do not belong"),
        (lambda state: {name: weight[:, :3] for name, weight in state.items()}, "do not belong|no adapter module"),
        (lambda state: {"text_encoder.x.lora_A.weight": torch.ones(2, 2)}, "no adapter module matches"),
        (lambda state: {}, "nothing at all"),
        (
            lambda state: {f"diffusion_model.{name}": weight for name, weight in state.items()},
            "is in the format of ComfyUI",
        ),
        (lambda state: {name: weight for name, weight in state.items() if "lora_A" in name}, "no adapter module"),
        (lambda state: {name: weight * torch.nan for name, weight in state.items()}, "not finite"),
    ],
)
def test_mismatched_files_are_refused(trained, change, message):
    model_dir, _, _, folder = trained("5b", 4)
    changed = change(load_file(folder / WEIGHTS_FILE))
    save_file({name: weight.contiguous() for name, weight in changed.items()}, folder / WEIGHTS_FILE)
    base = loading.load_transformer(model_dir / "transformer", torch.float32)
    with pytest.raises(UserError, match=message):
        load_lora(base, folder, 1.0)


def test_error_for_a_missing_file_lists_the_checkpoints(trained, tmp_path: Path):
    model_dir, _, _, folder = trained("5b", 4)
    folder.rename(tmp_path / "checkpoint-40")
    base = loading.load_transformer(model_dir / "transformer", torch.float32)
    with pytest.raises(UserError, match="it has checkpoint-40"):
        load_lora(base, tmp_path, 1.0)


def test_adapters_are_float32_on_a_half_precision_base(tiny, data, tmp_path):
    args = arguments(tiny("5b"), data, tmp_path, "--mixed_precision", "bf16")
    transformer = loading.load_transformer(tiny("5b") / "transformer", torch.bfloat16)
    make_trainable(transformer, parse_args(args))
    kinds = {(".lora_" in name, p.requires_grad, p.dtype) for name, p in transformer.named_parameters()}
    assert kinds == {(True, True, torch.float32), (False, False, torch.bfloat16)}

"""LoRA files: every loader applies the strength of the training, and files that do not match are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tests.conftest import LFS_POINTER, arguments
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
        (lambda state: {"unknown.x.lora_A.weight": torch.ones(2, 2)}, "no adapter module matches"),
        (lambda state: {}, "nothing at all"),
        (
            lambda state: state | {"text_encoder.x.lora_A.weight": torch.ones(2, 2)},
            "adapters of a text encoder .text_encoder.x",
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.diffusion_model.transformer.layers.0.attention.query_key_value.matrix_A.0", "CogVideo's SAT code"),
        ("transformer_blocks.0.attn1.to_q.weight", "a whole transformer"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "Flux or HunyuanVideo"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux or HunyuanVideo"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "Wan"),
        ("lora_unet_blocks_0_cross_attn_k.lora_down.weight", "Wan"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "Wan"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.lora_A.weight", "Stable Diffusion"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight", "Stable Diffusion"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "SD3"),
        ("transformer.transformer_blocks.0.attn2.to_q.lora_A.weight", "LTX-Video"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "a text encoder"),
        ("lycoris_transformer_blocks_0_attn1_to_q.lokr_w1", "LyCORIS"),
        ("lora_unet_transformer_blocks_0_attn1_to_q.hada_w1_a", "LyCORIS"),
        ("lycoris_transformer_blocks_0_attn1_to_q.oft_blocks", "LyCORIS"),
        ("lora_unet_transformer_blocks_0_attn1_to_q.diff", "LyCORIS"),
        ("transformer.transformer_blocks.0.attn1.to_q.lora_magnitude_vector", "DoRA"),
        ("lora_unet_transformer_blocks_0_attn1_to_q.dora_scale", "DoRA"),
        ("transformer.transformer_blocks.0.attn1.processor.to_q_lora.down.weight", "old diffusers"),
        ("transformer.transformer_blocks.0.attn1.to_q.lora.down.weight", "old diffusers"),
        ("lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight", "kohya"),
        ("lora_transformer_transformer_blocks_0_attn1_to_q.alpha", "kohya"),
        ("diffusion_model.blocks.0.q.lora_A.weight", "ComfyUI"),
        ("base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight", "peft"),
        ("transformer.transformer_blocks.0.attn1.to_q.lora_B.default.weight", "peft"),
        ("transformer_blocks.0.attn1.to_q.lora_A.weight", "peft"),
        ("transformer.transformer_blocks.0.attn1.to_q.alpha", "alpha tensors"),
    ],
)
def test_files_of_other_tools_are_named(tiny, tmp_path, name, content):
    """Given with a tensor that fits, so that the name alone decides. As a pickle, it is named too."""
    base = loading.load_transformer(tiny("5b") / "transformer", torch.float32)
    state = {"transformer.transformer_blocks.0.attn1.to_k.lora_A.weight": torch.ones(4, 64), name: torch.ones(2, 2)}
    save_file(state, tmp_path / "x.safetensors")
    torch.save({"module": state, "epoch": 1}, tmp_path / "x.pt")
    for file, message in (("x.safetensors", "holds"), ("x.pt", "is a file of torch.save, which is not read; it holds")):
        with pytest.raises(UserError, match=rf"--lora_path \S+/{file} {message} .*{content}.* \({name}\)"):
            load_lora(base, tmp_path / file, 1.0)


@pytest.mark.parametrize(
    ("config", "content"),
    [
        (LoraConfig(target_modules=["to_q"]), "peft"),
        (LoraConfig(target_modules=["to_q"], use_dora=True), "DoRA"),
        (LoHaConfig(target_modules=["to_q"]), "LoHa"),
        (LoKrConfig(target_modules=["to_q"]), "LoKr"),
        (OFTConfig(target_modules=["to_q"], oft_block_size=4), "OFT"),
    ],
)
def test_files_of_peft_are_named(tiny, tmp_path, config, content):
    base = loading.load_transformer(tiny("5b") / "transformer", torch.float32)
    get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"{content}.* \(base_model.model.transformer_blocks.0"):
        load_lora(loading.load_transformer(tiny("5b") / "transformer"), tmp_path / "adapter_model.safetensors", 1.0)


def test_files_that_are_no_safetensors_are_named(tiny, tmp_path):
    base = loading.load_transformer(tiny("5b") / "transformer", torch.float32)
    (tmp_path / "old.bin").write_bytes(b"\x80\x02")
    (tmp_path / "pytorch_lora_weights.safetensors").write_text(LFS_POINTER)
    (tmp_path / "x.safetensors").write_text("<html>")
    for file, message in (
        ("old.bin", "is not a safetensors file; files of torch.save are not read"),
        ("", "is a Git LFS pointer, not the file; run `git lfs pull`"),
        ("x.safetensors", "cannot be read as safetensors"),
        ("none", "there is no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_lora(base, tmp_path / file, 1.0)


def test_error_for_a_missing_file_lists_the_checkpoints(trained, tmp_path: Path):
    model_dir, _, _, folder = trained("5b", 4)
    folder.rename(tmp_path / "checkpoint-40")
    base = loading.load_transformer(model_dir / "transformer", torch.float32)
    with pytest.raises(UserError, match="it has checkpoint-40"):
        load_lora(base, tmp_path, 1.0)
    (tmp_path / "step").mkdir()
    (tmp_path / "checkpoint-40").rename(tmp_path / "step" / "40")
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(UserError, match=r"it has step/40, other.safetensors. Give one of these"):
        load_lora(base, tmp_path, 1.0)


def test_adapters_are_float32_on_a_half_precision_base(tiny, data, tmp_path):
    args = arguments(tiny("5b"), data, tmp_path, "--mixed_precision", "bf16")
    transformer = loading.load_transformer(tiny("5b") / "transformer", torch.bfloat16)
    make_trainable(transformer, parse_args(args))
    kinds = {(".lora_" in name, p.requires_grad, p.dtype) for name, p in transformer.named_parameters()}
    assert kinds == {(True, True, torch.float32), (False, False, torch.bfloat16)}

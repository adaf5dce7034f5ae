"""LoRA files: loaders apply the strength of the training, and files that do not match are refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save, save_file

from examples.tiny_configs import VARIANTS
from tests import comfyui_reader
from tests.conftest import LFS_POINTER, arguments, generate
from tests.loras import load_base, load_lora, predict
from utils.checkpoint.lora_reader import TRAINED_ON, WEIGHTS_FILE, Lora, kind_of, read_lora
from utils.common.errors import UserError
from utils.config.args import parse_args
from utils.model import loading
from utils.model.spec import read_spec
from utils.training.trainable import make_trainable

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# With these, every linear layer has adapters: feed-forward, modulation, time and ofs embeddings, text, output.
ALL_LINEAR = [*ATTENTION, "net.0.proj", "net.2", "linear", "linear_1", "linear_2", "text_proj", "proj_out"]


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


@pytest.mark.parametrize(
    ("variant", "targets"),
    [("2b", ATTENTION), ("5b-i2v", ALL_LINEAR), ("1.5-i2v", [*ALL_LINEAR, "proj"])],
)
def test_comfyui_file_gives_the_trained_output(trained, variant, targets):
    options = ["--target_modules", *targets, "--lora_format", "both"]
    model_dir, spec, transformer, folder = trained(variant, 4, *options)
    expected = predict(transformer, spec)
    comfyui = folder / "run-checkpoint-1-comfyui.safetensors"
    base = load_base(model_dir)
    num_linear = sum(isinstance(module, torch.nn.Linear) for module in base.modules())
    assert comfyui_reader.apply_lora(base, comfyui) == (num_linear if targets != ATTENTION else 8)
    torch.testing.assert_close(predict(base, spec), expected, rtol=1e-4, atol=1e-4)
    for path in (folder, comfyui):  # our demo reads both, without a note on the strength
        base = load_base(model_dir)
        assert not load_lora(base, path)
        torch.testing.assert_close(predict(base, spec), expected, rtol=1e-4, atol=1e-4)


def test_scales_of_several_loras_add_up(trained):
    model_dir, spec, transformer, folder = trained("5b", 4)

    def at_scales(*scales):
        base = load_base(model_dir)
        load_lora(base, folder, *scales)
        return predict(base, spec)

    torch.testing.assert_close(at_scales(1.0), predict(transformer, spec), rtol=0, atol=1e-5)
    torch.testing.assert_close(at_scales(0.0), predict(load_base(model_dir), spec), rtol=0, atol=1e-6)
    torch.testing.assert_close(at_scales(0.75, -0.25), at_scales(0.5), rtol=0, atol=1e-5)
    assert (at_scales(0.5) - at_scales(1.0)).abs().max() > 0.01


def renamed(state: dict, count: int) -> dict:
    return {name.replace("attn1", "attention") if n < count else name: w for n, (name, w) in enumerate(state.items())}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: renamed(state, 99), "16 of 16 tensors fit no layer of CogVideoX: .* and others"),
        (
            lambda state: renamed(state, 1),
            r"1 of 16 tensors fit no layer of CogVideoX: \S+attention.to_k.lora_A.weight",
        ),
        (lambda state: {name: weight[:, :3] for name, weight in state.items()}, "have no common rank"),
        (
            lambda state: {name: w[:, :9] if "A." in name else w for name, w in state.items()},
            "8 of 8 adapters do not fit",
        ),
        (lambda state: {"unknown.x.lora_A.weight": torch.ones(2, 2)}, "fit no layer of CogVideoX: unknown.x"),
        (lambda state: {}, "holds no tensors"),
        (
            lambda state: state | {"text_encoder.x.lora_A.weight": torch.ones(2, 2)},
            "adapters of a text encoder .text_encoder.x",
        ),
        (lambda state: {name: weight for name, weight in state.items() if "lora_A" in name}, "lacks the B of"),
        (lambda state: {name: weight * torch.nan for name, weight in state.items()}, "not finite"),
        (lambda state: state | {"diffusion_model.blocks.0.q.lora_A.weight": torch.ones(2, 2)}, "to_q twice"),
        (lambda state: state | {f"{next(iter(state))[:-14]}.alpha": torch.tensor(torch.nan)}, "not a finite number"),
    ],
)
def test_mismatched_files_are_refused(trained, change, message):
    model_dir, _, _, folder = trained("5b", 4)
    changed = change(load_file(folder / WEIGHTS_FILE))
    save_file({name: weight.contiguous() for name, weight in changed.items()}, folder / WEIGHTS_FILE)
    base = load_base(model_dir)
    with pytest.raises(UserError, match=message):
        load_lora(base, folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("transformer_blocks.0.attn1.to_q.weight", "a whole transformer"),
        ("blocks.0.q.weight", "a whole transformer"),
        ("model.diffusion_model.transformer.layers.0.attention.query_key_value.weight", "a whole transformer"),
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
    ],
)
def test_files_of_other_models_are_named(tiny, tmp_path, name, content):
    """Given with a tensor that fits, so that the name alone decides. In a file of torch.save, it is named too."""
    base = load_base(tiny("5b"))
    state = {"transformer.transformer_blocks.0.attn1.to_k.lora_A.weight": torch.ones(4, 64), name: torch.ones(2, 2)}
    save_file(state, tmp_path / "x.safetensors")
    torch.save({"module": state, "epoch": 1}, tmp_path / "x.pt")
    for file in ("x.safetensors", "x.pt"):
        with pytest.raises(UserError, match=rf"--lora_path \S+/{file} holds .*{content}.* \({name}\)"):
            load_lora(base, tmp_path / file)


@pytest.mark.parametrize(
    ("config", "content"),
    [
        (LoraConfig(target_modules=["to_q"], use_dora=True), "DoRA"),
        (LoHaConfig(target_modules=["to_q"]), "LoHa"),
        (LoKrConfig(target_modules=["to_q"]), "LoKr"),
        (OFTConfig(target_modules=["to_q"], oft_block_size=4), "OFT"),
    ],
)
def test_other_adapters_of_peft_are_named(tiny, tmp_path, config, content):
    base = load_base(tiny("5b"))
    get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"{content}.* \(base_model.model.transformer_blocks.0"):
        load_lora(loading.load_transformer(tiny("5b") / "transformer"), tmp_path)


def test_files_that_are_no_safetensors_are_named(tiny, tmp_path):
    base = load_base(tiny("5b"))
    (tmp_path / "old.bin").write_bytes(b"\x80\x02")
    (tmp_path / "pytorch_lora_weights.safetensors").write_text(LFS_POINTER)
    (tmp_path / "x.safetensors").write_text("<html>")
    for file, message in (
        ("old.bin", "cannot be read as weights"),
        ("", "is a Git LFS pointer, not the file; run `git lfs pull`"),
        ("x.safetensors", "cannot be read as safetensors"),
        ("none", "there is no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_lora(base, tmp_path / file)


def test_contents_of_files_are_named_truthfully(tiny, tmp_path):
    adapter = {f"transformer_blocks.0.attn1.to_q.lora_{name}.weight": torch.ones(4, 4) for name in "AB"}
    convolution = {name: weight[..., None, None] for name, weight in adapter.items()}
    for content, message in (
        ({1: torch.ones(2)}, r"holds no adapters, but other weights \(1\)"),
        ({"decoder.up_blocks.0.weight": torch.ones(2)}, "holds no adapters"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2)}, "of a language model"),
        ({"lora_te1_text_model_encoder_layers_0_self_attn_k_proj.alpha": torch.ones(1)}, "of a text encoder"),
        (adapter | {f"diffusion_model.{name}": weight for name, weight in adapter.items()}, "to_q twice"),
        (convolution, "no matrices of a linear layer"),
        ([adapter], "holds an object of type list; a dictionary of tensors is expected.$"),
        (adapter | {"run": Path("x")}, "holds objects of Python beside tensors"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=message):
            read_lora(tmp_path / "x.pt", "--lora_path")
    torch.save(adapter, tmp_path / "old.bin", _use_new_zipfile_serialization=False)  # as torch before 1.6
    assert len(read_lora(tmp_path / "old.bin", "--lora_path").adapters) == 1
    torch.save(adapter, tmp_path / "old.bin", _use_new_zipfile_serialization=False, pickle_protocol=4)
    with pytest.raises(UserError, match="is incomplete, or holds objects of Python"):
        read_lora(tmp_path / "old.bin", "--lora_path")
    saved = save(adapter)
    header = saved[8 : 8 + int.from_bytes(saved[:8], "little")]
    begins_like_a_pickle = (0x280).to_bytes(8, "little") + header.ljust(0x280) + saved[8 + len(header) :]
    (tmp_path / "x.bin").write_bytes(begins_like_a_pickle)
    assert len(read_lora(tmp_path / "x.bin", "--lora_path").adapters) == 1


@pytest.mark.parametrize(("variant", "base"), [("5b", "CogVideoX-5b-I2V"), ("1.5", "CogVideoX1.5-5B-I2V")])
def test_lora_for_image_to_video_names_the_base_that_it_needs(trained, tiny, variant, base):
    """By the positions in the metadata, which 5b-I2V alone has, or by the input channels, which 1.5 can adapt."""
    *_, folder = trained(f"{variant}-i2v", 4, "--target_modules", *ALL_LINEAR, *(["proj"] if variant == "1.5" else []))
    if variant == "5b":
        save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE, {"learned_positions": "keep"})
    flags = ["--model_path", tiny(variant), "--prompt", "x", "--lora_path", folder]
    with pytest.raises(UserError, match=r"was trained for image to video, with 32 input channels; .* has 16") as caught:
        generate(*flags)
    assert len(caught.value.errors) == 1 and caught.value.errors[0].endswith(f"such as THUDM/{base}.")


def test_lora_states_the_kind_of_its_base(tiny, tmp_path):
    """The layers of all kinds may have the same shapes."""
    configs = {variant: read_spec(tiny(variant)).transformer for variant in VARIANTS}
    for variant, (base, config) in product(VARIANTS, configs.items()):
        lora = Lora(tmp_path, "--lora_path", {}, {TRAINED_ON: kind_of(configs[variant])}, [])
        if kind_of(configs[variant]) == kind_of(config):
            lora.check_fits(config)
            assert not lora.notes
        elif base == f"{variant}-i2v" or (variant, base) == ("2b", "5b-i2v"):
            lora.check_fits(config)
            assert "was trained on CogVideoX" in lora.notes[0] and "text to video, and" in lora.notes[0]
        else:
            with pytest.raises(UserError, match=r"was trained on CogVideoX.* Give its base as --model_path, such as"):
                lora.check_fits(config)


def test_strength_of_merged_files_of_kohya_is_that_of_the_layers(tmp_path):
    layer = "lora_unet_transformer_blocks_0_attn1_to_q"
    state = {f"{layer}.lora_{name}.weight": torch.ones(4, 4) for name in ("down", "up")}
    state[f"{layer}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "x.safetensors", {"ss_network_alpha": "Dynamic"})
    (adapter,) = read_lora(tmp_path / "x.safetensors", "--lora_path").adapters.values()
    assert adapter.strength == 0.5


def test_error_for_a_missing_file_lists_the_checkpoints(trained, tmp_path: Path):
    model_dir, _, _, folder = trained("5b", 4)
    folder.rename(tmp_path / "checkpoint-40")
    base = load_base(model_dir)
    with pytest.raises(UserError, match="it has checkpoint-40"):
        load_lora(base, tmp_path)
    (tmp_path / "step").mkdir()
    (tmp_path / "checkpoint-40").rename(tmp_path / "step" / "40")
    (tmp_path / "other.safetensors").touch()
    (tmp_path / "1000").mkdir()
    (tmp_path / "1000" / "mp_rank_00_model_states.pt").touch()  # of SAT
    states = "1000/mp_rank_00_model_states.pt"
    with pytest.raises(UserError, match=rf"it has step/40, other.safetensors, {states}. Give one of these"):
        load_lora(base, tmp_path)


def test_adapters_are_float32_on_a_half_precision_base(tiny, data, tmp_path):
    args = arguments(tiny("5b"), data, tmp_path, "--mixed_precision", "bf16")
    transformer = loading.load_transformer(tiny("5b") / "transformer", torch.bfloat16)
    make_trainable(transformer, parse_args(args))
    kinds = {(".lora_" in name, p.requires_grad, p.dtype) for name, p in transformer.named_parameters()}
    assert kinds == {(True, True, torch.float32), (False, False, torch.bfloat16)}

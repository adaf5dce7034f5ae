"""LoRAs of other tools are applied at the strength that they state."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from tests.loras import convert, load_base, load_lora, predict
from utils.model import loading
from utils.model.spec import read_spec

# suffixes of A and B
KOHYA = (".lora_down.weight", ".lora_up.weight")
OLD = (".lora.down.weight", ".lora.up.weight")
OLDER = ("_lora.down.weight", "_lora.up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
PEFT_DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")


def in_format(state: dict, layer: str, suffixes: tuple[str, str], alpha: float | None) -> dict:
    """Renames adapters.

    Args:
        layer: a name with {} for the layer; {_} for the layer with underscores, {old} for old diffusers' name.
        suffixes: of A and B.
        alpha: value of the alpha tensor of each layer; None for no such tensors.
    """
    renamed = {}
    for name, weight in state.items():
        module, _, matrix = name.partition(".lora_")
        old = module.replace("attn1.", "attn1.processor.").replace("to_out.0", "to_out")
        prefix = layer.replace("{_}", module.replace(".", "_")).replace("{old}", old).replace("{}", module)
        renamed[prefix + suffixes["AB".index(matrix[0])]] = weight.contiguous()
        if alpha is not None:
            renamed[f"{prefix}.alpha"] = torch.tensor(alpha)
    return renamed


@pytest.mark.parametrize(
    ("layer", "suffixes", "alpha"),
    [
        ("transformer.{}", PEFT, None),
        ("transformer.{}", PEFT, 4.0),
        ("transformer.{}", OLD, 4.0),
        ("{old}", OLDER, None),
        ("transformer.{old}", OLDER, None),
        ("lora_unet_{_}", KOHYA, 4.0),
        ("lora_unet__{_}", KOHYA, 16.0),
        ("lora_transformer_{_}", KOHYA, 4.0),
        ("transformer.{}", KOHYA, None),
        ("base_model.model.{}", PEFT, None),
        ("base_model.model.{}", PEFT_DEFAULT, None),
        ("{}", PEFT, None),
        ("diffusion_model.{}", PEFT, None),
    ],
)
def test_files_of_other_tools_have_their_strength(trained, tmp_path, layer, suffixes, alpha):
    """The expected output is that of W + alpha / rank B A, computed here; without alpha, of W + B A."""
    model_dir, spec, transformer, _ = trained("5b", 8)
    state = get_peft_model_state_dict(transformer)
    save_file(in_format(state, layer, suffixes, alpha), tmp_path / "x.safetensors")
    expected, actual = load_base(model_dir), load_base(model_dir)
    for name in {name.partition(".lora_")[0] for name in state}:
        change = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        expected.get_submodule(name).weight.data.add_(change * (1 if alpha is None else alpha / 8))
    notes = load_lora(actual, tmp_path / "x.safetensors")
    torch.testing.assert_close(predict(actual, spec), predict(expected, spec), rtol=1e-4, atol=1e-4)
    assert ["scale 1, as if alpha were the rank, 8" in note for note in notes] == [True] * (alpha is None)


def test_files_of_sat_have_their_strength(trained, tmp_path):
    """SAT fuses q, k and v, and scales by alpha / rank with alpha = 1. Its checkpoints hold the frozen base too."""
    model_dir, spec, transformer, _ = trained("5b", 8)
    state, module = get_peft_model_state_dict(transformer), {}
    parts = {"to_q": ("query_key_value", 0), "to_k": ("query_key_value", 1), "to_v": ("query_key_value", 2)}
    parts["to_out.0"] = ("dense", 0)
    expected, actual = load_base(model_dir), load_base(model_dir)
    for block in range(2):
        prefix = f"model.diffusion_model.transformer.layers.{block}.attention."
        module[f"{prefix}query_key_value.original.weight"] = torch.ones(192, 64)
        for target, (fused, part) in parts.items():
            name = f"transformer_blocks.{block}.attn1.{target}"
            a, b = (state[f"{name}.lora_{matrix}.weight"] for matrix in "AB")
            module |= {f"{prefix}{fused}.matrix_A.{part}": a, f"{prefix}{fused}.matrix_B.{part}": b}
            expected.get_submodule(name).weight.data.add_(b @ a / 8)
    random_state = ("MT19937", torch.zeros(2).numpy().astype("uint32"), 1)
    torch.save(
        {"module": module, "np_rng_state": random_state, "iteration": 1}, tmp_path / "mp_rank_00_model_states.pt"
    )
    rename_in_zip(tmp_path / "mp_rank_00_model_states.pt", b"numpy._core.multiarray", b"numpy.core.multiarray")
    notes = load_lora(actual, tmp_path / "mp_rank_00_model_states.pt")
    torch.testing.assert_close(predict(actual, spec), predict(expected, spec), rtol=1e-4, atol=1e-4)
    assert "alpha = 1, is used: scale 1/8" in notes[0]


def rename_in_zip(path: Path, old: bytes, new: bytes) -> None:
    """Replaces text in the files of a zip archive, as if an old version had written it."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert any(old in content for content in contents.values())
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content.replace(old, new))


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_of_peft_may_differ_by_layer(tiny, tmp_path, rslora):
    spec = read_spec(tiny("5b"))
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_k", "ff.net.2", "proj_out"],
        rank_pattern={"to_k": 2, "ff.net.2": 8},
        alpha_pattern={"to_k": 16, "0.attn1.to_q": 1},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    model = get_peft_model(load_base(tiny("5b")), config)
    model.save_pretrained(tmp_path)
    actual = load_base(tiny("5b"))
    assert not load_lora(actual, tmp_path)  # the folder of peft
    torch.testing.assert_close(predict(actual, spec), predict(model, spec), rtol=1e-4, atol=1e-4)

    convert(tmp_path / "adapter_model.safetensors", "--output_path", tmp_path / "d.safetensors")
    pipeline = loading.PIPELINES["t2v"].from_pretrained(tiny("5b"))
    pipeline.load_lora_weights(tmp_path, weight_name="d.safetensors")
    torch.testing.assert_close(predict(pipeline.transformer, spec), predict(model, spec), rtol=1e-4, atol=1e-4)

"""The export command: merged LoRAs, ComfyUI files of transformers, refused command lines."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import comfyui_reader
from tests.conftest import arguments
from tests.loras import convert, load_base, load_lora, predict
from utils.checkpoint.finetuned import find_transformer, trained_positions
from utils.checkpoint.lora_reader import WEIGHTS_FILE
from utils.common.errors import UserError
from utils.config.args import parse_args
from utils.generation.args import parse_demo
from utils.generation.checks import check_transformer, with_positions
from utils.generation.pipeline import load_pipeline
from utils.model import loading
from utils.model.spec import read_spec
from utils.run.checks import check_init_lora
from utils.run.preflight import fill_in_defaults


@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-i2v"])
def test_merged_transformer_gives_the_output_of_the_adapters(trained, tmp_path, variant):
    """In both formats. ComfyUI needs the position table of 2b and must not see that of 5b-I2V."""
    model_dir, spec, _, folder = trained(variant, 4)
    expected = load_base(model_dir)
    load_lora(expected, folder, 0.5, 0.25)
    merge = ["--merge_lora", folder, folder, "--lora_scale", 0.5, 0.25, "--model_path", model_dir, "--dtype", "fp32"]
    convert(None, *merge, "--output_path", tmp_path / "merged" / "transformer")
    merged = loading.load_transformer(find_transformer(tmp_path / "merged"))
    torch.testing.assert_close(predict(merged, spec), predict(expected, spec), rtol=1e-4, atol=1e-4)

    convert(None, *merge, "--format", "comfyui", "--output_path", tmp_path / "x.safetensors")
    convert(tmp_path / "merged", "--format", "comfyui", "--dtype", "fp32")
    with pytest.raises(UserError, match="already exists"):
        convert(tmp_path / "merged", "--format", "comfyui", "--dtype", "fp32")
    [file] = (tmp_path / "merged").glob("*-merged-comfyui.safetensors")
    assert file.read_bytes() == (tmp_path / "x.safetensors").read_bytes()
    assert ("patch_embed.pos_embedding" in load_file(file)) == (variant == "2b")
    in_comfyui = comfyui_reader.load_transformer(file, dict(merged.config))
    if variant == "5b-i2v":
        in_comfyui.patch_embed.pos_embedding.copy_(merged.patch_embed.pos_embedding)
    assert torch.equal(predict(in_comfyui, spec), predict(merged, spec))
    args = parse_demo(["--model_path", str(model_dir), "--prompt", "x", "--transformer_path", str(file)])
    check_transformer(file, with_positions(args, spec))
    in_demo = load_pipeline(args, model_dir, spec).transformer
    assert all(torch.equal(weight, in_demo.state_dict()[name]) for name, weight in merged.state_dict().items())
    torch.testing.assert_close(predict(in_demo, spec), predict(merged, spec), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.ff_out.bias"), r"1 tensors differ, such as transformer_blocks.1.ff.net.2.b"),
        (lambda state: state.update(x=torch.ones(2)), "1 tensors differ, such as x, which is"),
        (lambda state: state.update({"blocks.0.q.lora_A.weight": torch.ones(2, 2)}), "holds a LoRA; give it as --lora"),
    ],
)
def test_wrong_comfyui_transformers_are_refused(tiny, tmp_path, change, message):
    convert(tiny("5b"), "--format", "comfyui", "--output_path", tmp_path / "x.safetensors")
    state = load_file(tmp_path / "x.safetensors")
    change(state)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"--transformer_path:? \S+x.safetensors .*{message}"):
        check_transformer(tmp_path / "x.safetensors", read_spec(tiny("5b")))


@pytest.mark.parametrize("choice", ["drop", "interpolate"])
def test_merged_transformer_keeps_the_positions_of_the_lora(trained, tmp_path, choice):
    model_dir, spec, _, folder = trained("5b-i2v", 4)
    shutil.copytree(folder, tmp_path / "other")
    for path in (folder / WEIGHTS_FILE, tmp_path / "other" / WEIGHTS_FILE):
        stated = choice if path.parent == folder else "keep"
        save_file(load_file(path), path, metadata={"learned_positions": stated})
    merge = ["--merge_lora", folder, "--model_path", model_dir, "--dtype", "fp32"]
    convert(None, *merge, "--output_path", tmp_path / "merged" / "transformer")
    stated, _ = trained_positions(tmp_path / "merged", [], spec)
    assert stated == choice and trained_positions(None, [folder], spec)[0] == choice
    merged = loading.load_transformer(tmp_path / "merged" / "transformer")
    assert ("patch_embed.pos_embedding" in merged.state_dict()) == (choice == "interpolate")
    merge.insert(2, tmp_path / "other")
    with pytest.raises(UserError, match="treat learned positions differently"):
        convert(None, *merge, "--output_path", tmp_path / "new")

    argv = arguments(model_dir, tmp_path, tmp_path, "--init_lora", folder, task="i2v")
    args = fill_in_defaults(parse_args(argv), spec)
    with pytest.raises(UserError, match=f"--learned_positions is keep, but .* was trained with {choice}; give"):
        check_init_lora(args, spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "Give either --checkpoint"),
        ("--checkpoint {lora} --merge_lora {lora}", "Give either --checkpoint"),
        ("{merge}", "--merge_lora needs --model_path, the base, and --output_path"),
        ("--checkpoint {lora} --lora_scale 2", "--lora_scale is for --merge_lora"),
        ("--checkpoint {lora} --dtype bf16", "--dtype is for transformers"),
        ("--checkpoint {lora}", "pytorch_lora_weights.safetensors already exists"),
        ("--checkpoint {lora} --output_path {lora}/new", "new: the name of a .safetensors file is expected"),
        ("--checkpoint /nowhere", "is not the folder checkpoint-N of a training run"),
        ("{merge} --output_path {lora}/x.safetensors", "x.safetensors: a folder is expected"),
        ("{merge} --output_path {lora}/x --format comfyui", "x: the name of a .safetensors file is expected"),
        ("{merge} --output_path {lora}/x --variant fp16", "--variant fp16: .* has no weights of this variant"),
        ("{merge} --output_path {lora}/x --lora_scale 1 2", "2 values for 1 files of --merge_lora"),
        ("{merge} --output_path /proc/x/y", "--output_path /proc/x cannot be written to"),
    ],
)
def test_wrong_exports_are_refused(trained, options, message):
    model_dir, _, _, folder = trained("5b", 4)
    options = options.format(lora=folder, merge=f"--merge_lora {folder} --model_path {model_dir}")
    with pytest.raises(UserError, match=message):
        convert(None, *options.split())

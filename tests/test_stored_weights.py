"""Reading the output of zero_to_fp32.py: one complete merge, or an error."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from utils.checkpoint.finetuned import load_without_config
from utils.common.errors import UserError
from utils.generation.checks import check_transformer
from utils.model.spec import read_spec


@pytest.fixture
def merged(tiny, tmp_path):
    """Returns a function: tensors -> folder with the tensors in two shards and an index, and the spec of the base."""
    base = tiny("5b")
    weights = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")

    def write(changes: dict[str, torch.Tensor]):
        folder, tensors = tmp_path / "merged", weights | changes
        folder.mkdir()
        names = sorted(tensors)
        shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, part in shards.items():
            save_file({name: tensors[name] for name in part}, folder / file)
        index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder, read_spec(base)

    return write


def test_sharded_merge_is_loaded(merged):
    folder, spec = merged({})
    check_transformer(folder, spec)
    transformer = load_without_config(folder, spec.transformer, torch.bfloat16)
    assert {weight.dtype for weight in transformer.parameters()} == {torch.bfloat16}


def test_files_of_another_merge_are_refused(merged):
    folder, spec = merged({})
    save_file({"proj_out.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors and model.safetensors.index.json, where one merge"):
        check_transformer(folder, spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stranger": torch.zeros(2)}, "such as stranger, which is .* and should be missing"),
        ({"proj_out.bias": torch.zeros(3)}, "such as proj_out.bias, which is \\[3\\] and should be"),
    ],
)
def test_unexpected_names_and_shapes_are_refused(merged, changes, message):
    folder, spec = merged(changes)
    with pytest.raises(UserError, match=message):
        check_transformer(folder, spec)


def test_missing_shards_and_nonfinite_values_are_refused(merged):
    folder, spec = merged({"norm_final.weight": torch.full((64,), torch.nan)})
    with pytest.raises(UserError, match=r"norm_final.weight holds values that are not finite"):
        load_without_config(folder, spec.transformer, torch.float32)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2.safetensors is missing\); merge the checkpoint again"):
        check_transformer(folder, spec)

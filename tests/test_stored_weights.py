"""What zero_to_fp32.py leaves in a folder is read as one merge, whole, or refused in a sentence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_demo import check_transformer
from utils.checkpoint.finetuned import load_merged
from utils.common.errors import UserError
from utils.model.spec import read_spec


@pytest.fixture
def merged(tiny, tmp_path):
    """(tensors) -> folder with two shards of them and an index, and the form of the base."""
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


def test_one_merge_is_read_whole(merged):
    folder, form = merged({})
    check_transformer(folder, form)
    transformer = load_merged(folder, form.transformer, torch.bfloat16)
    assert {weight.dtype for weight in transformer.parameters()} == {torch.bfloat16}


def test_what_is_left_of_another_merge_is_not_mixed_in(merged):
    folder, form = merged({})
    save_file({"proj_out.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors and model.safetensors.index.json, where one merge"):
        check_transformer(folder, form)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stranger": torch.zeros(2)}, "such as stranger, which is .* and should be missing"),
        ({"proj_out.bias": torch.zeros(3)}, "such as proj_out.bias, which is \\[3\\] and should be"),
    ],
)
def test_other_names_and_shapes_are_refused(merged, changes, message):
    folder, form = merged(changes)
    with pytest.raises(UserError, match=message):
        check_transformer(folder, form)


def test_shards_that_are_missing_or_not_finite_are_refused(merged):
    folder, form = merged({"norm_final.weight": torch.full((64,), torch.nan)})
    with pytest.raises(UserError, match=r"norm_final.weight holds values that are not finite"):
        load_merged(folder, form.transformer, torch.float32)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2.safetensors is missing\); merge the checkpoint again"):
        check_transformer(folder, form)

"""Runs that start from a LoRA."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import arguments, generate
from tests.loras import load_base, predict
from utils.checkpoint.adapters import start_from
from utils.checkpoint.average import mean_lora
from utils.checkpoint.lora_reader import WEIGHTS_FILE, read_lora
from utils.common.errors import CheckReport, UserError
from utils.config.args import parse_args
from utils.model import loading
from utils.model.spec import read_spec
from utils.run.checks import check_init_lora
from utils.run.preflight import BaseModel, check_initial_lora, fill_in_defaults
from utils.training.trainable import make_trainable


@pytest.mark.parametrize("alpha", [8, 2])
def test_run_starts_from_a_lora_at_its_stored_strength(trained, data, tmp_path, alpha):
    model_dir, spec, transformer, folder = trained("5b", 4)
    argv = arguments(model_dir, data, tmp_path, "--rank", 8, "--lora_alpha", alpha, "--init_lora", folder)
    args = fill_in_defaults(parse_args(argv), spec)
    assert "start from" in check_init_lora(args, spec)[-1]
    new = load_base(model_dir)
    make_trainable(new, args)
    start_from(new, read_lora(folder, "--init_lora"), args)
    torch.testing.assert_close(predict(new.eval(), spec), predict(transformer, spec), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", 4], r"--rank is 4, but --init_lora \S+ has rank 8; give --rank 8"),
        (
            ["--target_modules", "to_q", "to_k"],
            r"selects 4 layers, and --init_lora \S+ has adapters of 8; transformer_",
        ),
        (["--init_lora", "/nowhere"], "--init_lora /nowhere: there is no such file or folder"),
        (["--model_path", "{other}"], "--init_lora .*: 8 of 8 adapters do not fit this transformer"),
    ],
)
def test_lora_that_does_not_fit_the_run_is_refused(trained, tiny, data, tmp_path, monkeypatch, options, message):
    model_dir, spec, _, folder = trained("5b", 4)
    if "--model_path" in options:
        spec.transformer["num_attention_heads"] = 2
        options = []
    args = parse_args(arguments(model_dir, data, tmp_path, "--init_lora", folder, *options))
    with pytest.raises(UserError, match=message):
        check_init_lora(args, spec)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_values_that_are_not_finite_are_found_before_weights_are_read(trained, data, tmp_path, monkeypatch, value):
    """In the checks of a run, dry or not, in those of the demo, and in a mean."""
    model_dir, spec, _, folder = trained("5b", 4)
    state = load_file(folder / WEIGHTS_FILE)
    name = "transformer.transformer_blocks.1.attn1.to_v.lora_B.weight"
    state[name][3, 2] = value
    save_file(state, folder / WEIGHTS_FILE)
    message = rf"{WEIGHTS_FILE}: {name.removeprefix('transformer.')} holds values that are not finite"
    args = parse_args(arguments(model_dir, data, tmp_path, "--init_lora", folder))
    with pytest.raises(UserError, match=f"--init_lora .*{message}"):
        check_init_lora(args, spec)
    monkeypatch.setattr(loading, "load_transformer", None)
    monkeypatch.setattr(loading, "load_text_encoder", None)
    with pytest.raises(UserError, match=f"--lora_path .*{message}"):
        generate("--model_path", model_dir, "--prompt", "x", "--lora_path", folder)
    with pytest.raises(UserError, match=message):
        mean_lora([folder, folder], tmp_path / "mean")


def test_resumed_run_needs_no_lora(tiny, data, tmp_path):
    args = parse_args(arguments(tiny("5b"), data, tmp_path, "--init_lora", "/nowhere"))
    model, report = BaseModel(tiny("5b"), read_spec(tiny("5b")), {}), CheckReport()
    check_initial_lora(report, args, model, tmp_path / "checkpoint-1")
    assert not report.errors and report.notes[0].startswith("--init_lora /nowhere is not read; the run resumes from")
    check_initial_lora(report, args, model, None)
    assert report.errors

"""DeepSpeed templates must agree with the command line, which is checked before weights are loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.conftest import ROOT, arguments
from utils.checkpoint.manager import ARGS_FILE, PROGRESS_FILE, Progress
from utils.common.errors import UserError
from utils.config.args import parse_args
from utils.config.deepspeed_config import set_key
from utils.model.loading import fingerprint
from utils.run.preflight import preflight

TEMPLATES = sorted(path.stem for path in (ROOT / "configs").glob("*.json"))


@pytest.fixture
def plan_with(tiny, data, tmp_path, monkeypatch):
    """Returns a function: (changes to a template, flags) -> plan of a run with two processes."""

    def plan(changes: dict | str, *more: object, name: str = "zero2"):
        file = tmp_path / "mine.json"
        template = json.loads((ROOT / "configs" / f"{name}.json").read_text())
        if isinstance(changes, str):
            file.write_text(changes)
        else:
            for key, value in changes.items():
                set_key(template, key, value)
            file.write_text(json.dumps(template))
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        args = arguments(tiny("5b"), data, tmp_path / "out", "--training_type", "sft", *more)
        return preflight(parse_args(args), 2)

    return plan


def test_shipped_templates():
    assert TEMPLATES == ["zero2", "zero2_offload", "zero3", "zero3_offload"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_auto_takes_the_value_of_the_command_line(plan_with, name):
    flags = ["--batch_size", 3, "--gradient_accumulation_steps", 4, "--max_grad_norm", 0.5, "--mixed_precision", "bf16"]
    zero = plan_with({"zero_optimization.reduce_bucket_size": "auto", "amp": None}, *flags, name=name).zero
    assert zero["train_micro_batch_size_per_gpu"] == 3 and zero["gradient_accumulation_steps"] == 4
    assert zero["train_batch_size"] == 3 * 4 * 2 and zero["gradient_clipping"] == 0.5
    assert zero["bf16"]["enabled"] is True and zero["fp16"]["enabled"] is False
    assert zero["zero_optimization"]["reduce_bucket_size"] == 12 * 64 * 64
    assert "auto" not in json.dumps(zero)


def test_matching_values_are_accepted(plan_with):
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": "auto", "weight_decay": 1e-4}}
    stated = {"train_batch_size": 2, "gradient_clipping": 1, "bf16.enabled": False, "optimizer": optimizer}
    zero = plan_with(stated).zero
    assert zero["train_batch_size"] == 2 and "optimizer" not in zero


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4, but --batch_size is 1"),
        ({"gradient_accumulation_steps": 2}, "is 2, but --gradient_accumulation_steps is 1"),
        ({"train_batch_size": 8}, "train_batch_size is 8, but --batch_size 1 x .* 1 x 2 processes is 2"),
        ({"gradient_clipping": 0.3}, "gradient_clipping is 0.3, but --max_grad_norm is 1"),
        ({"bf16.enabled": True}, "bf16.enabled is true, but --mixed_precision is no"),
        ({"fp16.enabled": True}, "fp16.enabled is true, but --mixed_precision is no"),
        ({"optimizer.params.lr": 1e-5}, "optimizer.params.lr is 1e-05, but --learning_rate is 0.001"),
        ({"optimizer.type": "Adam"}, 'optimizer.type is "Adam", but --optimizer is adamw'),
        ({"optimizer.params.torch_adam": True}, "optimizer has torch_adam"),
        ({"scheduler.type": "WarmupLR"}, 'scheduler is "WarmupLR", but --lr_scheduler is constant_with_warmup'),
        ({"zero_optimization.stage": 0}, "zero_optimization.stage is 0; it must be 1, 2 or 3"),
        ({"zero_optimization.offload_param": {"device": "cpu"}}, "offload_param needs stage 3; stage is 2"),
        ({"zero_optimization.stage3_max_live_parameters": "auto"}, "which this key does not support"),
        ({"zero_optimization.overlap_comm": "perhaps"}, "zero_optimization.overlap_comm: .*perhaps"),
        ({"gradient_cliping": 0.3}, "gradient_cliping is not a DeepSpeed key; did you mean gradient_clipping"),
        ({"bf16": True}, "bf16 must be a section"),
        ({"zero_optimization.offload_optimizer": {"device": "nvme"}}, 'device is "nvme"; only "cpu" is supported'),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size is 2; only data parallelism"),
        ({"communication_data_type": "fp33"}, "DeepSpeed rejects it: .* Got: fp33"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_contradiction_names_file_key_and_both_values(plan_with, changes, message):
    with pytest.raises(UserError, match=f"mine.json.*{message}"):
        plan_with(changes)


def test_all_contradictions_are_reported_together(plan_with):
    with pytest.raises(UserError) as caught:
        plan_with({"train_batch_size": 8, "gradient_clipping": 0.3}, "--rank", 0)
    assert len(caught.value.errors) == 3


@pytest.mark.parametrize(
    ("saved", "precision", "message"),
    [
        ({"zero_stage": 2, "num_processes": 4}, "no", "divided among 4 processes, and this run has 2"),
        ({"zero_stage": 3, "num_processes": 2}, "no", "saved under ZeRO-3, and this run is under ZeRO-2"),
        ({"zero_stage": 0, "num_processes": 2}, "no", "saved under DDP, and this run is under ZeRO-2"),
        ({"zero_stage": 2, "num_processes": 2}, "bf16", "--mixed_precision is no, but .* was trained with bf16"),
        ({"zero_stage": 2, "num_processes": 2}, "no", "is damaged \\(latest, pytorch_model/\\)"),
    ],
)
def test_incompatible_checkpoint_is_refused(tiny, plan_with, tmp_path, saved, precision, message):
    checkpoint: Path = tmp_path / "out" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    args = plan_with({}, "--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "new").args.as_dict()
    args["training"]["mixed_precision"] = precision
    (checkpoint / ARGS_FILE).write_text(json.dumps(args))
    progress = Progress(base=fingerprint(tiny("5b") / "transformer"), step=2, **saved)
    (checkpoint / PROGRESS_FILE).write_text(json.dumps(asdict(progress)))
    with pytest.raises(UserError, match=message):
        plan_with({}, "--resume_from_checkpoint", "latest")

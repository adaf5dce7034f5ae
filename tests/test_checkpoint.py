"""Checkpoints are written atomically."""

from __future__ import annotations

import errno
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from torch.utils import serialization

from tests.conftest import arguments
from utils.checkpoint.manager import Checkpoints, Progress, checkpoint_bytes, find_checkpoints
from utils.common.errors import UserError
from utils.config.args import parse_args
from utils.model import loading
from utils.training.optimizer import make_optimizer
from utils.training.trainable import count_trained, make_trainable, trained_parameters, weight_dtype
from utils.training.weight_average import make_average


def test_interrupted_save_keeps_the_previous_checkpoint(tiny, data, tmp_path, monkeypatch):
    args = parse_args(arguments(tiny("5b"), data, tmp_path, "--checkpointing_limit", 2))
    accelerator = Accelerator(cpu=True)
    transformer = loading.load_transformer(tiny("5b") / "transformer", torch.float32)
    make_trainable(transformer, args)
    accelerator.prepare(transformer, make_optimizer(trained_parameters(transformer), args, uses_deepspeed=False))
    checkpoints = Checkpoints(accelerator, transformer, args)

    def names() -> list[str]:
        return [path.name for path in find_checkpoints(tmp_path)]

    for step in (1, 2):
        checkpoints.save(Progress("base", step), is_last=False)
    with monkeypatch.context() as patched:
        patched.setattr(accelerator, "save_state", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoints.save(Progress("base", 10), is_last=False)
        patched.setattr(accelerator, "save_state", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(UserError, match=r"no space is left to save step 10\. The last .* is checkpoint-2\."):
            checkpoints.save(Progress("base", 10), is_last=False)
    assert names() == ["checkpoint-1", "checkpoint-2"]
    checkpoints.save(Progress("base", 10), is_last=False)
    assert names() == ["checkpoint-2", "checkpoint-10"]  # ordered by number, not by name
    assert not list(tmp_path.glob(".checkpoint-*"))

    original, is_mapped = torch.load, []

    def load(*args, **kwargs):
        is_mapped.append(serialization.config.load.mmap)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    checkpoints.load(tmp_path / "checkpoint-10")
    assert is_mapped and all(is_mapped)  # without a copy in host memory


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--lora_format", "comfyui"],
        ["--lora_format", "both"],
        ["--lora_format", "both", "--ema_decay", 0.9],
        ["--training_type", "sft"],
        ["--training_type", "sft", "--ema_decay", 0.9],
        ["--training_type", "sft", "--mixed_precision", "bf16", "--quantize_optimizer", "8bit"],
        ["--training_type", "sft", "--mixed_precision", "bf16", "--quantize_optimizer", "4bit"],
        ["--training_type", "sft", "--mixed_precision", "bf16", "--offload_optimizer"],
    ],
)
def test_size_of_a_checkpoint_is_known_before(tiny, data, tmp_path, options):
    args = parse_args(arguments(tiny("5b"), data, tmp_path, "--rank", 64, *options))
    accelerator = Accelerator(cpu=True)
    transformer = loading.load_transformer(tiny("5b") / "transformer", weight_dtype(args, uses_deepspeed=False))
    make_trainable(transformer, args)
    parameters = trained_parameters(transformer)
    optimizer = make_optimizer(parameters, args, uses_deepspeed=False)
    model, _ = accelerator.prepare(transformer, optimizer)
    average = make_average(args, accelerator, transformer, model)
    torch.stack([parameter.float().sum() for parameter in parameters]).sum().backward()
    optimizer.step()
    Checkpoints(accelerator, transformer, args).save(Progress("base", 1), False, average)
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint-1").rglob("*") if path.is_file())
    num_trained = count_trained(dict(transformer.config), args)
    assert num_trained == sum(parameter.numel() for parameter in parameters)
    assert 0.75 * size < checkpoint_bytes(args, num_trained, uses_deepspeed=False) < 1.05 * size

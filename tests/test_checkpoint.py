"""Checkpoints are written atomically."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch.utils import serialization

from tests.conftest import arguments
from utils.checkpoint.manager import Checkpoints, Progress, find_checkpoints
from utils.config.args import parse_args
from utils.model import loading
from utils.training.optimizer import make_optimizer
from utils.training.trainable import make_trainable, trained_parameters


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

"""Averages the trained weights of several checkpoints of one run.

The mean of the last checkpoints often generalizes better than each of them (Izmailov et al. 2018, stochastic weight
averaging). The mean of LoRA matrices is taken for A and B separately, as for any other trained weight; the checkpoints
of a run are close enough to each other that B A of the means is close to the mean of B A.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils.checkpoint.export import TransformerWeights, export, open_checkpoint
from utils.checkpoint.lora_reader import WEIGHTS_FILE
from utils.checkpoint.manager import ARGS_FILE, PROGRESS_FILE
from utils.checkpoint.resume import FIXED_OPTIONS
from utils.checkpoint.stored_weights import StoredTensor, read_safetensors
from utils.common.errors import UserError
from utils.common.filesystem import apply_umask, unreadable_in

# Options that all checkpoints of a run share; the states of the optimizer are not averaged.
SHARED_OPTIONS = (*(option for option in FIXED_OPTIONS if option[0] != "memory"), ("training", "seed"))


@dataclass(frozen=True)
class RunRecord:
    """What a checkpoint says about its run.

    Attributes:
        step: number of updates.
        base: fingerprints of the base, by file and by meaning.
        options: (group, option) -> value of `SHARED_OPTIONS`.
    """

    step: int
    base: tuple[str, str]
    options: dict[tuple[str, str], Any]

    @property
    def is_lora(self) -> bool:
        return self.options["model", "training_type"] == "lora"


def read_record(checkpoint: Path) -> RunRecord:
    """Reads args.json and progress.json of a checkpoint. Raises UserError if one is missing or damaged."""
    try:
        args, progress = (json.loads((checkpoint / name).read_text()) for name in (ARGS_FILE, PROGRESS_FILE))
        options = {(group, name): args[group][name] for group, name in SHARED_OPTIONS}
        return RunRecord(progress["step"], (progress["base"], progress.get("base_by_meaning", "")), options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = unreadable_in(checkpoint) or f"it is not the folder checkpoint-N of a training run ({error})"
        raise UserError(f"{checkpoint}: {reason}.") from error


def check_same_run(checkpoints: list[Path]) -> list[RunRecord]:
    """Returns the records of checkpoints. Raises UserError if they are of different runs or one is given twice."""
    records = [read_record(checkpoint) for checkpoint in checkpoints]
    errors, first = [], records[0]
    for checkpoint, record in zip(checkpoints[1:], records[1:], strict=True):
        differences = [
            f"--{name} {record.options[group, name]} and not {value}"
            for (group, name), value in first.options.items()
            if record.options[group, name] != value
        ]
        if record.base[0] != first.base[0] and record.base[1] != first.base[1]:
            differences.append("another base")
        if differences:
            errors.append(f"{checkpoint} is of another run than {checkpoints[0]}: it has {', '.join(differences)}.")
    if len({checkpoint.resolve() for checkpoint in checkpoints}) < len(checkpoints):
        errors.append("A checkpoint is given twice.")
    if errors:
        raise UserError(errors)
    return records


def write_average(checkpoints: list[Path], folder: Path, is_lora: bool, dtype: torch.dtype) -> int:
    """Writes the mean of checkpoints to a new folder, in the format of a checkpoint without its training state.

    Full fine-tuning: one tensor of one checkpoint is in memory at a time, beside a shard of the mean.

    Args:
        folder: new folder; it gets pytorch_lora_weights.safetensors, or transformer/ in `dtype`, and args.json.

    Returns:
        the number of tensors.

    Raises:
        UserError: a checkpoint is damaged, holds values that are not finite, or differs in its tensors.
    """
    tmp_dir = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(tmp_dir, ignore_errors=True)
    try:
        tmp_dir.mkdir(parents=True)
        if is_lora:
            weights = mean([read_lora(checkpoint) for checkpoint in checkpoints], checkpoints)
            with safe_open(checkpoints[0] / WEIGHTS_FILE, framework="pt") as file:
                metadata = file.metadata()
            tensors = {name: tensor.read() for name, tensor in weights.items()}
            if damaged := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
                raise UserError(f"The mean of {damaged[0]} is not finite; one of the checkpoints is damaged.")
            save_file(tensors, tmp_dir / WEIGHTS_FILE, metadata)
            apply_umask(tmp_dir / WEIGHTS_FILE)
        else:
            opened = [open_checkpoint(checkpoint) for checkpoint in checkpoints]
            weights = mean([dict(weights.tensors) for weights in opened], checkpoints)
            export(TransformerWeights(weights, opened[0].config_file, "checkpoints"), tmp_dir / "transformer", dtype)
        shutil.copyfile(checkpoints[-1] / ARGS_FILE, tmp_dir / ARGS_FILE)
        tmp_dir.rename(folder)
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)
    return len(weights)


def read_lora(checkpoint: Path) -> dict[str, StoredTensor]:
    """Opens the adapters of a checkpoint. Raises UserError if they are missing or damaged."""
    file = checkpoint / WEIGHTS_FILE
    if not file.is_file():
        raise UserError(
            f"{file} is missing. If the run had --lora_format comfyui, write it with python -m utils.commands.export "
            f"--checkpoint {checkpoint}."
        )
    try:
        return read_safetensors([file])
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: {unreadable_in(checkpoint) or f'it is damaged ({error})'}.") from error


def mean(weights: list[dict[str, StoredTensor]], checkpoints: list[Path]) -> Mapping[str, StoredTensor]:
    """Returns name -> float32 mean, which is computed when it is read.

    Raises:
        UserError: a checkpoint has other names or shapes than the first one.
    """
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in weights]
    for checkpoint, other in zip(checkpoints, shapes, strict=True):
        if different := shapes[0].items() ^ other.items():
            raise UserError(f"{checkpoint} differs from {checkpoints[0]} in its tensors, such as {min(different)[0]}.")
    return {
        name: StoredTensor(shape, partial(_read_mean, [tensors[name] for tensors in weights]))
        for name, shape in shapes[0].items()
    }


def _read_mean(tensors: list[StoredTensor]) -> torch.Tensor:
    total = tensors[0].read().float()
    for tensor in tensors[1:]:
        total = total + tensor.read()
    return total / len(tensors)

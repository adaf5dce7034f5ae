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

from utils.checkpoint.export import TransformerWeights, export, open_checkpoint
from utils.checkpoint.lora_files import convert_lora, format_of, lora_paths
from utils.checkpoint.lora_reader import Adapter, Lora, read_lora
from utils.checkpoint.manager import ARGS_FILE, AVERAGE_OF, PROGRESS_FILE
from utils.checkpoint.resume import FIXED_OPTIONS
from utils.checkpoint.saved_weights import lora_name
from utils.checkpoint.stored_weights import StoredTensor
from utils.common.errors import UserError
from utils.common.filesystem import apply_umask, unreadable_in
from utils.training.metrics import METRICS_FILE

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
    """Reads args.json and progress.json of a checkpoint.

    Raises:
        UserError: one is missing or damaged, or the folder holds a mean.
    """
    try:
        args, progress = (json.loads((checkpoint / name).read_text()) for name in (ARGS_FILE, PROGRESS_FILE))
        if steps := progress.get(AVERAGE_OF):
            raise UserError(f"{checkpoint} is the mean of the checkpoints {', '.join(map(str, steps))}; give those.")
        options = {(group, name): args[group][name] for group, name in SHARED_OPTIONS}
        return RunRecord(progress["step"], (progress["base"], progress.get("base_by_meaning", "")), options)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
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


def write_average(checkpoints: list[Path], records: list[RunRecord], folder: Path, dtype: torch.dtype) -> int:
    """Writes the mean of checkpoints to a new folder, in the format of a checkpoint without its training state.

    One tensor of one checkpoint is in memory at a time, beside the mean, or a shard of it for full fine-tuning.

    Args:
        records: what the checkpoints say about their run.
        folder: new folder. It gets the LoRA in the formats of the newest checkpoint, or transformer/ in `dtype`, and
            args.json, progress.json and the metrics of the newest checkpoint.

    Returns:
        the number of tensors.

    Raises:
        UserError: a checkpoint is damaged, holds values that are not finite, or differs in its tensors.
    """
    newest, tmp_dir = checkpoints[_newest(records)], folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(tmp_dir, ignore_errors=True)
    try:
        tmp_dir.mkdir(parents=True)
        if records[0].is_lora:
            paths = lora_paths(tmp_dir, format_of(newest), lora_name(folder))
            lora = mean_lora(checkpoints, folder)
            convert_lora(lora, paths)
            apply_umask(*paths.values())
            count = 2 * len(lora.adapters)
        else:
            opened = [open_checkpoint(checkpoint) for checkpoint in checkpoints]
            weights = mean([dict(weights.tensors) for weights in opened], checkpoints)
            export(TransformerWeights(weights, opened[0].config_file, "The mean"), tmp_dir / "transformer", dtype)
            count = len(weights)
        shutil.copyfile(newest / ARGS_FILE, tmp_dir / ARGS_FILE)
        progress = json.loads((newest / PROGRESS_FILE).read_text())
        if (newest.parent / METRICS_FILE).is_file():  # the card of a published mean shows the curves of its run
            shutil.copyfile(newest.parent / METRICS_FILE, tmp_dir / METRICS_FILE)
        progress[AVERAGE_OF] = sorted(record.step for record in records)
        (tmp_dir / PROGRESS_FILE).write_text(json.dumps(progress) + "\n")
        tmp_dir.rename(folder)
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)
    return count


def _newest(records: list[RunRecord]) -> int:
    return max(range(len(records)), key=lambda number: records[number].step)


def mean_lora(checkpoints: list[Path], folder: Path) -> Lora:
    """Returns the mean of LoRAs in any of a run's formats. Its tensors are computed when they are read.

    Args:
        folder: of the mean, for messages.
    """
    loras = [read_lora(checkpoint, "The checkpoint") for checkpoint in checkpoints]
    for lora in loras:
        lora.check_finite()
    means = mean([_matrices(lora) for lora in loras], checkpoints)
    adapters = {layer: Adapter(means[f"{layer}.A"], means[f"{layer}.B"], 1.0) for layer in loras[0].adapters}
    return Lora(folder, "The mean", adapters, loras[0].metadata, [])


def _matrices(lora: Lora) -> dict[str, StoredTensor]:
    """Returns the A and B of each layer. The strength is folded into B."""
    matrices = {}
    for layer, adapter in lora.adapters.items():
        matrices[f"{layer}.A"] = adapter.a
        matrices[f"{layer}.B"] = StoredTensor(adapter.b.shape, partial(_strong, adapter))
    return matrices


def _strong(adapter: Adapter) -> torch.Tensor:
    return adapter.b.read().float() * adapter.strength


def mean(weights: list[dict[str, StoredTensor]], checkpoints: list[Path]) -> Mapping[str, StoredTensor]:
    """Returns name -> float32 mean, which is computed when it is read.

    Raises:
        UserError: a checkpoint has other names or shapes than the first one; when read, a value is not finite.
    """
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in weights]
    for checkpoint, other in zip(checkpoints, shapes, strict=True):
        if different := shapes[0].items() ^ other.items():
            raise UserError(f"{checkpoint} differs from {checkpoints[0]} in its tensors, such as {min(different)[0]}.")
    return {
        name: StoredTensor(
            shape,
            partial(
                _read_mean, name, {path: tensors[name] for path, tensors in zip(checkpoints, weights, strict=True)}
            ),
        )
        for name, shape in shapes[0].items()
    }


def _read_mean(name: str, tensors: dict[Path, StoredTensor]) -> torch.Tensor:
    total = torch.zeros(())
    for checkpoint, tensor in tensors.items():
        value = tensor.read().float()
        if not value.isfinite().all():
            raise UserError(f"{checkpoint}: {name} holds values that are not finite.")
        total = total + value
    return total / len(tensors)

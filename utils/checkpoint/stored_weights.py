"""Reads weights from disk one tensor at a time.

Supported formats: safetensors (diffusers, `zero_to_fp32.py --safe_serialization`), the .bin files that
`zero_to_fp32.py` writes by default, and unmerged checkpoints of DeepSpeed ZeRO-1, 2 and 3, whose float32 weights are
divided among the files of all ranks. LoRAs of other tools are single files, of safetensors or of `torch.save`.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from utils.common.errors import UserError
from utils.common.filesystem import unreadable

LATEST = "latest"
MERGED_NAMES = ("model.safetensors", "pytorch_model.bin")
# Entries of a .bin or .pt file that hold its tensors.
_NESTED = ("module", "state_dict", "model")
# The beginning of a file of torch.save: a zip archive, or a pickle of torch before 1.6. A safetensors file begins with
# 8 bytes that may be equal to these, the length of its JSON header.
_ZIP, _PICKLE, _HEADER = b"PK\x03\x04", b"\x80", b"{"
# DeepSpeed's files, which SAT writes, hold numpy's random state. numpy 2 has renamed the module of its function.
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_RANDOM_STATE: list[Any] = [
    *((_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *(np.ndarray, np.dtype, type(np.dtype("uint32"))),
]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: its shape, and a function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def read_safetensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Returns name -> tensor of safetensors files."""
    tensors = {}
    for file in files:
        weights = safe_open(file, framework="pt")  # memory-mapped; stays open while a StoredTensor refers to it
        for name in weights.keys():  # noqa: SIM118
            shape = tuple(weights.get_slice(name).get_shape())
            tensors[name] = StoredTensor(shape, partial(weights.get_tensor, name))
    return tensors


def open_weights(file: Path, flag: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Returns the tensors of a safetensors or torch.save file, and its metadata. Raises UserError if it is damaged."""
    if reason := unreadable(file):
        raise UserError(f"{flag} {file}: {reason}.")
    try:
        with file.open("rb") as content:
            start = content.read(9)
        if start.startswith((_ZIP, _PICKLE)) and not start.endswith(_HEADER):
            return _read_pickle(file, flag, start.startswith(_ZIP)), {}
        with safe_open(file, framework="pt") as weights:
            metadata = weights.metadata() or {}
        return read_safetensors([file]), metadata
    except UserError:
        raise
    except UnpicklingError as error:
        raise UserError(
            f"{flag} {file} is incomplete, or holds objects of Python beside tensors, which are not loaded since they "
            "may run code; save its tensors alone."
        ) from error
    except Exception as error:  # whatever the readers of pickle and safetensors files raise
        kind = "safetensors" if isinstance(error, SafetensorError | OSError) else "weights"
        reason = re.split(r"\.\s+(?=[A-Z])|\n", str(error))[0] or type(error).__name__  # torch adds advice
        raise UserError(f"{flag} {file} cannot be read as {kind} ({reason}); is it complete?") from error


def _read_pickle(file: Path, flag: str, is_zip: bool) -> dict[str, StoredTensor]:
    """Returns the tensors of a file of torch.save, memory-mapped if possible. Runs no code that the file may hold."""
    with torch.serialization.safe_globals(_RANDOM_STATE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other protocols and of TorchScript, which end in an error
        content = torch.load(file, map_location="cpu", mmap=is_zip, weights_only=True)
    if not isinstance(content, dict):
        found = type(content).__name__
        raise UserError(f"{flag} {file} holds an object of type {found}; a dictionary of tensors is expected.")
    for name in _NESTED:
        if isinstance(content.get(name), dict):
            content = content[name]
    return {
        str(name): StoredTensor(tuple(tensor.shape), tensor.detach)
        for name, tensor in content.items()
        if torch.is_tensor(tensor)
    }


def read_bins(files: list[Path]) -> dict[str, StoredTensor]:
    """Returns name -> tensor of .bin files, memory-mapped."""
    tensors = {}
    for file in files:
        for name, tensor in torch.load(file, map_location="cpu", mmap=True, weights_only=True).items():
            tensors[name] = StoredTensor(tuple(tensor.shape), tensor.detach)
    return tensors


def is_merged(folder: Path) -> bool:
    """Whether a folder holds weight files with the names that `zero_to_fp32.py` uses."""
    return any(file for pattern in ("model*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern))


def read_merged(folder: Path) -> dict[str, StoredTensor]:
    """Reads the output of `zero_to_fp32.py`: one file, or shards with an index, as safetensors or .bin.

    Raises:
        ValueError: a shard or the index is missing, or the folder holds the output of more than one merge.
    """
    names = [name for name in MERGED_NAMES for name in (name, f"{name}.index.json") if (folder / name).is_file()]
    if len(names) != 1:
        found = " and ".join(names) or "shards without an index"
        raise ValueError(f"it holds {found}, where one merge is expected")
    files = [folder / names[0]]
    if names[0].endswith(".json"):
        files = [folder / shard for shard in sorted(set(json.loads(files[0].read_text())["weight_map"].values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{', '.join(missing)} is missing")
    return (read_bins if files[0].suffix == ".bin" else read_safetensors)(files)


def zero_folder(path: Path) -> Path | None:
    """Returns the folder with DeepSpeed's files in a checkpoint, or None if `path` is not a ZeRO checkpoint."""
    candidates = [path]
    if (path / LATEST).is_file():
        candidates.append(path / (path / LATEST).read_text().strip())
    return next((folder for folder in candidates if any(folder.glob("*_optim_states.pt"))), None)


def rank_files(folder: Path, kind: str) -> list[Path]:
    """Returns the files `*_optim_states.pt` (`kind` "optim") or `*_model_states.pt` ("model"), sorted by rank."""
    return sorted(
        folder.glob(f"*_{kind}_states.pt"), key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.name)]
    )


def read_zero(path: Path) -> dict[str, StoredTensor]:
    """Reads the trained float32 weights and the buffers of a ZeRO checkpoint.

    Follows DeepSpeed's `zero_to_fp32.py`, but joins the pieces of a weight only when it is read. The script joins all
    weights of a ZeRO-1 or ZeRO-2 checkpoint in memory.

    Raises:
        ValueError: a rank's file is missing.
    """
    folder = zero_folder(path)
    assert folder is not None
    load = partial(torch.load, map_location="cpu", mmap=True, weights_only=False)  # contains DeepSpeed classes
    ranks = [load(file)["optimizer_state_dict"] for file in rank_files(folder, "optim")]
    model = load(rank_files(folder, "model")[0])
    world_size = ranks[0]["partition_count"]
    world_size = max(world_size) if isinstance(world_size, list) else world_size
    if world_size != len(ranks):
        raise ValueError(f"{folder} holds the states of {len(ranks)} of {world_size} processes")
    pieces = _zero3_pieces if ranks[0]["zero_stage"] == 3 else _zero2_pieces
    tensors = {name: _join(shape, parts) for name, shape, parts in pieces(ranks, model)}
    for name in model["buffer_names"]:
        if name in model["module"]:
            buffer = model["module"][name]
            tensors[name] = StoredTensor(tuple(buffer.shape), buffer.float)
    return tensors


Pieces = Iterator[tuple[str, torch.Size, list[torch.Tensor]]]


def _zero2_pieces(ranks: list[dict[str, Any]], model: dict[str, Any]) -> Pieces:
    """Yields the pieces of each weight. Each parameter group is one flat vector that is divided among the ranks."""
    paddings = ranks[0].get("param_alignment_paddings")
    for group, shapes in enumerate(model["param_shapes"]):
        partitions = [rank["single_partition_of_fp32_groups"][group] for rank in ranks]
        start = 0
        for number, (name, shape) in enumerate(shapes.items()):
            yield name, shape, _slice_joined(partitions, start, shape.numel())
            start += shape.numel() + (paddings[group][number] if paddings else 0)


def _zero3_pieces(ranks: list[dict[str, Any]], model: dict[str, Any]) -> Pieces:
    """Yields the pieces of each weight. Each weight is divided among the ranks; the last piece is padded."""
    groups_of_ranks = [rank["fp32_flat_groups"] for rank in ranks]
    start = 0
    for shapes in model["param_shapes"]:
        for name, shape in shapes.items():
            partition_size = math.ceil(shape.numel() / len(ranks))
            pieces = [piece for groups in groups_of_ranks for piece in _slice_joined(groups, start, partition_size)]
            yield name, shape, pieces
            start += partition_size


def _slice_joined(vectors: list[torch.Tensor], start: int, length: int) -> list[torch.Tensor]:
    """Returns views that cover elements `start` to `start + length` of the concatenated vectors, without a copy."""
    views = []
    for vector in vectors:
        view = vector[max(start, 0) : max(start + length, 0)]
        if len(view):
            views.append(view)
        start -= len(vector)
    return views


def _join(shape: torch.Size, pieces: list[torch.Tensor]) -> StoredTensor:
    """Returns a tensor that concatenates its pieces and drops the padding when it is read."""
    return StoredTensor(tuple(shape), lambda: torch.cat(pieces).detach()[: shape.numel()].view(shape))

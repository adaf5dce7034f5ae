"""Reads weights from disk one tensor at a time.

Supported formats: safetensors (diffusers, `zero_to_fp32.py --safe_serialization`), the .bin files that
`zero_to_fp32.py` writes by default, and unmerged checkpoints of DeepSpeed ZeRO-1, 2 and 3, whose float32 weights are
divided among the files of all ranks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

LATEST = "latest"
MERGED_NAMES = ("model.safetensors", "pytorch_model.bin")


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

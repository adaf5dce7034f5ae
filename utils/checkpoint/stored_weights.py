"""Weights where they lie on the disk, whoever wrote them, one tensor in memory at a time.

Read are safetensors (diffusers, `zero_to_fp32.py --safe_serialization`), the .bin files that `zero_to_fp32.py` writes
otherwise, and the checkpoints of DeepSpeed ZeRO-1, 2 and 3 themselves, whose float32 weights lie in pieces in the files
of all ranks.
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
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def read_safetensors(files: list[Path]) -> dict[str, StoredTensor]:
    tensors = {}
    for file in files:
        weights = safe_open(file, framework="pt")  # memory-mapped, and open for as long as a tensor refers to it
        for name in weights.keys():  # noqa: SIM118
            shape = tuple(weights.get_slice(name).get_shape())
            tensors[name] = StoredTensor(shape, partial(weights.get_tensor, name))
    return tensors


def read_bins(files: list[Path]) -> dict[str, StoredTensor]:
    tensors = {}
    for file in files:
        for name, tensor in torch.load(file, map_location="cpu", mmap=True, weights_only=True).items():
            tensors[name] = StoredTensor(tuple(tensor.shape), tensor.detach)
    return tensors


def is_merged(folder: Path) -> bool:
    """Whether a folder holds weights under the names that `zero_to_fp32.py` gives them."""
    return any(file for pattern in ("model*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern))


def read_merged(folder: Path) -> dict[str, StoredTensor]:
    """The output of `zero_to_fp32.py`: one file, or shards and their index, as safetensors or .bin.

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
    """The folder with the files of DeepSpeed's ranks in a checkpoint; None where `path` is no ZeRO checkpoint."""
    candidates = [path]
    if (path / LATEST).is_file():
        candidates.append(path / (path / LATEST).read_text().strip())
    return next((folder for folder in candidates if any(folder.glob("*_optim_states.pt"))), None)


def rank_files(folder: Path, kind: str) -> list[Path]:
    """`*_optim_states.pt` or `*_model_states.pt`, in the order of the ranks."""
    return sorted(
        folder.glob(f"*_{kind}_states.pt"), key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.name)]
    )


def read_zero(path: Path) -> dict[str, StoredTensor]:
    """The trained float32 weights and the buffers of a ZeRO checkpoint, as DeepSpeed's `zero_to_fp32.py` finds them.

    That script joins all weights of a ZeRO-1 or ZeRO-2 checkpoint in memory; here each is joined when it is read.

    Raises:
        ValueError: the file of a rank is missing.
    """
    folder = zero_folder(path)
    assert folder is not None
    load = partial(torch.load, map_location="cpu", mmap=True, weights_only=False)  # holds classes of DeepSpeed's
    ranks = [load(file)["optimizer_state_dict"] for file in rank_files(folder, "optim")]
    model = load(rank_files(folder, "model")[0])
    world_size = ranks[0]["partition_count"]
    world_size = max(world_size) if isinstance(world_size, list) else world_size
    if world_size != len(ranks):
        raise ValueError(f"{folder} holds the states of {len(ranks)} of {world_size} processes")
    pieces = _pieces_of_stage_3 if ranks[0]["zero_stage"] == 3 else _pieces_of_stage_2
    tensors = {name: _stored(shape, cut) for name, shape, cut in pieces(ranks, model)}
    for name in model["buffer_names"]:
        if name in model["module"]:
            buffer = model["module"][name]
            tensors[name] = StoredTensor(tuple(buffer.shape), buffer.float)
    return tensors


Pieces = Iterator[tuple[str, torch.Size, list[torch.Tensor]]]


def _pieces_of_stage_2(ranks: list[dict[str, Any]], model: dict[str, Any]) -> Pieces:
    """Each group of parameters is one long vector, cut into as many pieces as there are ranks."""
    paddings = ranks[0].get("param_alignment_paddings")
    for group, shapes in enumerate(model["param_shapes"]):
        vector = [rank["single_partition_of_fp32_groups"][group] for rank in ranks]
        start = 0
        for number, (name, shape) in enumerate(shapes.items()):
            yield name, shape, _cut(vector, start, shape.numel())
            start += shape.numel() + (paddings[group][number] if paddings else 0)


def _pieces_of_stage_3(ranks: list[dict[str, Any]], model: dict[str, Any]) -> Pieces:
    """Each parameter is cut into as many pieces as there are ranks, the last one padded."""
    start = 0
    for shapes in model["param_shapes"]:
        for name, shape in shapes.items():
            share = math.ceil(shape.numel() / len(ranks))
            yield name, shape, [piece for rank in ranks for piece in _cut(rank["fp32_flat_groups"], start, share)]
            start += share


def _cut(vectors: list[torch.Tensor], start: int, length: int) -> list[torch.Tensor]:
    """Views of the elements `start` to `start + length` of vectors that are thought of as one."""
    views = []
    for vector in vectors:
        taken = vector[max(start, 0) : max(start + length, 0)]
        if len(taken):
            views.append(taken)
        start -= len(vector)
    return views


def _stored(shape: torch.Size, pieces: list[torch.Tensor]) -> StoredTensor:
    return StoredTensor(tuple(shape), lambda: torch.cat(pieces).detach()[: shape.numel()].view(shape))

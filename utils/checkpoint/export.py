"""Writes a whole transformer: as a folder in the diffusers format, or as one file for ComfyUI.

    python -m utils.commands.export --checkpoint outputs/t2v-sft/checkpoint-500 --dtype bf16

The weights are read and written one shard or one tensor at a time; the whole model is never in memory.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm

from utils.checkpoint.layer_names import to_comfyui
from utils.checkpoint.stored_weights import StoredTensor, read_safetensors, read_zero, zero_folder
from utils.common.errors import UserError
from utils.common.filesystem import apply_umask, atomic_write, unreadable_in
from utils.model.spec import LEARNED, LEARNED_POSITIONS
from utils.model.weight_files import check_shapes, read_config

TRANSFORMER_CONFIG = "transformer_config.json"  # in a ZeRO checkpoint, next to DeepSpeed's files
WEIGHTS_NAME = "diffusion_pytorch_model"
POSITIONS = "patch_embed.pos_embedding"
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class TransformerWeights:
    """The weights of a transformer on disk.

    Attributes:
        flag: the option that named them, for messages.
        changes: entries of the config that differ from those of the file.
    """

    tensors: Mapping[str, StoredTensor]
    config_file: Path
    flag: str
    changes: dict[str, Any] = field(default_factory=dict)

    def checked_config(self) -> dict[str, Any]:
        """Returns the config. Raises UserError if names or shapes of the weights do not match it."""
        model_class = CogVideoXTransformer3DModel
        config = read_config(self.config_file, model_class, self.flag) | self.changes
        shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        check_shapes(shapes, self.config_file.parent, self.flag, model_class, config, strict=True)
        return config

    def finite(self, name: str, tensor: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
        """Reads and casts a tensor. Raises UserError if a value is not finite in `dtype`."""
        value = tensor.read().to(dtype).contiguous()
        if not value.isfinite().all():
            raise UserError(
                f"{self.flag} {self.config_file.parent}: {name} holds values that are not finite in {dtype}."
            )
        return value


def open_checkpoint(checkpoint: Path) -> TransformerWeights:
    """Returns the trained weights of a full fine-tuning checkpoint.

    Raises:
        UserError: the checkpoint is damaged or holds no weights.
    """
    try:
        if zero_folder(checkpoint) is not None:
            weights, config_file = read_zero(checkpoint), checkpoint / TRANSFORMER_CONFIG
        else:
            folder = checkpoint / "transformer"
            weights, config_file = read_safetensors(sorted(folder.glob("*.safetensors"))), folder / "config.json"
    except Exception as error:  # whatever the readers of zip, pickle and safetensors files raise
        reason = unreadable_in(checkpoint) or f"it is damaged ({error})"
        raise UserError(f"--checkpoint {checkpoint}: {reason}.") from error
    if not weights:
        raise UserError(f"--checkpoint {checkpoint} is not the folder checkpoint-N of a training run.")
    return TransformerWeights(weights, config_file, "--checkpoint")


def export(weights: TransformerWeights, folder: Path, dtype: torch.dtype) -> None:
    """Writes the config, shards of at most 5 GB and their index to a new folder. The write is atomic.

    Raises:
        UserError: names or shapes do not match the config, or a value is not finite in `dtype`.
    """
    weights.checked_config()
    split = split_torch_state_dict_into_shards(
        {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in weights.tensors.items()},
        filename_pattern=f"{WEIGHTS_NAME}{{suffix}}.safetensors",
        max_shard_size="5GB",
    )
    tmp_dir = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(tmp_dir, ignore_errors=True)
    tmp_dir.mkdir(parents=True)
    try:
        with _progress(len(weights.tensors)) as progress:
            for file, names in split.filename_to_tensors.items():
                shard = {}
                for name in names:
                    shard[name] = weights.finite(name, weights.tensors[name], dtype)
                    progress.update()
                save_file(shard, tmp_dir / file, metadata={"format": "pt"})
                apply_umask(tmp_dir / file)
                del shard
                gc.collect()
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (tmp_dir / f"{WEIGHTS_NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        config = json.loads(weights.config_file.read_text()) | weights.changes
        (tmp_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        tmp_dir.rename(folder)
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)


def export_comfyui(weights: TransformerWeights, file: Path, dtype: torch.dtype) -> list[str]:
    """Writes one safetensors file with ComfyUI's names, one tensor at a time. The write is atomic.

    Returns:
        notes on weights that ComfyUI has no place for.

    Raises:
        UserError: names or shapes do not match the config, or a value is not finite in `dtype`.
    """
    config = weights.checked_config()
    tensors, metadata = _comfyui_tensors(weights.tensors, config), {"format": "pt"}
    is_5b_i2v = config["in_channels"] == 2 * config["out_channels"] and config["patch_size_t"] is None
    if choice := config.get(LEARNED_POSITIONS) or ("drop" if is_5b_i2v and not config[LEARNED] else None):
        metadata["learned_positions"] = choice
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + torch.Size(tensor.shape).numel() * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data is aligned
    with atomic_write(file) as tmp, tmp.open("wb") as output, _progress(len(tensors)) as progress:
        output.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            output.write(weights.finite(name, tensor, dtype).flatten().view(torch.uint8).numpy().data)
            progress.update()
    if POSITIONS in weights.tensors and POSITIONS not in tensors:
        return ["the learned positions are left out, since ComfyUI has either such a table or rotary positions."]
    return []


def _comfyui_tensors(tensors: Mapping[str, StoredTensor], config: dict[str, Any]) -> dict[str, StoredTensor]:
    """Returns the tensors of a ComfyUI file.

    ComfyUI takes a model with a table of positions for one without rotary positions, and a model without for one with
    them. So the file of 2b holds its sincos table, which diffusers computes, and that of 5b-I2V lacks its learned one.
    """
    named = {to_comfyui(name): tensor for name, tensor in tensors.items() if name != POSITIONS}
    if not config["use_rotary_positional_embeddings"]:
        without_blocks = CogVideoXTransformer3DModel.from_config(config | {"num_layers": 0})
        computed = without_blocks.patch_embed.pos_embedding.detach()
        named[POSITIONS] = tensors.get(POSITIONS, StoredTensor(tuple(computed.shape), lambda: computed))
    return named


@contextmanager
def _progress(total: int) -> Iterator[tqdm]:
    with tqdm(total=total, desc="Writing the transformer", unit="tensor", mininterval=1.0) as progress:
        yield progress

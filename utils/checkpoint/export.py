"""Exports a checkpoint of a full fine-tuning run to the diffusers format.

    python -m utils.commands.export --checkpoint outputs/t2v-sft/checkpoint-500 --dtype bf16

The weights are read and written one shard at a time; the whole model is never in memory.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm

from utils.checkpoint.stored_weights import StoredTensor, read_safetensors, read_zero, zero_folder
from utils.common.errors import UserError
from utils.common.filesystem import apply_umask, unreadable_in
from utils.model.weight_files import check_shapes, read_config

TRANSFORMER_CONFIG = "transformer_config.json"  # in a ZeRO checkpoint, next to DeepSpeed's files
WEIGHTS_NAME = "diffusion_pytorch_model"


def open_checkpoint(checkpoint: Path) -> tuple[dict[str, StoredTensor], Path]:
    """Returns the trained weights of a checkpoint and the path of the transformer config.

    Raises:
        UserError: the checkpoint is damaged, holds adapters, or holds no weights.
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
    if any(".lora_A." in name for name in weights):
        raise UserError(f"--checkpoint {checkpoint} holds adapters, which need no export; load it with --lora_path.")
    if not weights:
        raise UserError(f"--checkpoint {checkpoint} is not the folder checkpoint-N of a full fine-tuning run.")
    return weights, config_file


def export(weights: Mapping[str, StoredTensor], config_file: Path, folder: Path, dtype: torch.dtype, flag: str) -> None:
    """Writes the config, shards of at most 5 GB and their index to a new folder. The write is atomic.

    Args:
        flag: the flag that error messages name.

    Raises:
        UserError: names or shapes do not match the config, or a value is not finite in `dtype`.
    """
    model_class = CogVideoXTransformer3DModel
    config = read_config(config_file, model_class, flag)
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    check_shapes(shapes, config_file.parent, flag, model_class, config, strict=True)
    split = split_torch_state_dict_into_shards(
        {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in weights.items()},
        filename_pattern=f"{WEIGHTS_NAME}{{suffix}}.safetensors",
        max_shard_size="5GB",
    )
    tmp_dir = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(tmp_dir, ignore_errors=True)
    tmp_dir.mkdir(parents=True)
    progress = tqdm(total=len(weights), desc="Exporting the transformer", unit="tensor", mininterval=1.0)
    try:
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = weights[name].read().to(dtype).contiguous()
                if not shard[name].isfinite().all():
                    raise UserError(f"{flag} {config_file.parent}: {name} holds values that are not finite in {dtype}.")
                progress.update()
            save_file(shard, tmp_dir / file, metadata={"format": "pt"})
            apply_umask(tmp_dir / file)
            del shard
            gc.collect()
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (tmp_dir / f"{WEIGHTS_NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        shutil.copy(config_file, tmp_dir / "config.json")
        tmp_dir.rename(folder)
    finally:
        progress.close()
        shutil.rmtree(tmp_dir, ignore_errors=True)

"""A fine-tuned transformer in the diffusers format, from any checkpoint of a full fine-tuning run.

    python -m utils.commands.export --checkpoint outputs/t2v-sft/checkpoint-500 --dtype bf16

The weights go from the checkpoint's files to the new ones shard by shard; no process holds the model.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm

from utils.checkpoint.stored_weights import StoredTensor, read_safetensors, read_zero, zero_folder
from utils.common.errors import UserError
from utils.model.loading import CogVideoXTransformer3DModel
from utils.model.weight_files import check_shapes, read_config

TRANSFORMER_CONFIG = "transformer_config.json"  # of a ZeRO checkpoint, whose weights are DeepSpeed's own files
WEIGHTS_NAME = "diffusion_pytorch_model"


def open_checkpoint(checkpoint: Path) -> tuple[dict[str, StoredTensor], Path]:
    """The trained weights of a checkpoint and the config of their transformer. Raises UserError."""
    try:
        if zero_folder(checkpoint) is not None:
            weights, config_file = read_zero(checkpoint), checkpoint / TRANSFORMER_CONFIG
        else:
            folder = checkpoint / "transformer"
            weights, config_file = read_safetensors(sorted(folder.glob("*.safetensors"))), folder / "config.json"
    except Exception as error:  # of zip files, pickles and safetensors
        raise UserError(f"--checkpoint {checkpoint} is damaged ({error}).") from error
    if any(".lora_A." in name for name in weights):
        raise UserError(f"--checkpoint {checkpoint} holds adapters; load it with --lora_path as it is.")
    if not weights:
        raise UserError(f"--checkpoint {checkpoint} is not the folder checkpoint-N of a full fine-tuning run.")
    return weights, config_file


def export(weights: Mapping[str, StoredTensor], config_file: Path, folder: Path, dtype: torch.dtype, flag: str) -> None:
    """Writes config, shards of at most 5 GB and their index to a new folder, which is complete or absent.

    Args:
        flag: what a fault is said to be of.

    Raises:
        UserError: names or shapes are not those of the config, or a value is not finite in `dtype`.
    """
    kind = CogVideoXTransformer3DModel
    config = read_config(config_file, kind, flag)
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    check_shapes(shapes, config_file.parent, flag, kind, config, strict=True)
    split = split_torch_state_dict_into_shards(
        {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in weights.items()},
        filename_pattern=f"{WEIGHTS_NAME}{{suffix}}.safetensors",
        max_shard_size="5GB",
    )
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    progress = tqdm(total=len(weights), desc="Exporting the transformer", unit="tensor", mininterval=1.0)
    try:
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = weights[name].read().to(dtype).contiguous()
                if not shard[name].isfinite().all():
                    raise UserError(f"{flag} {config_file.parent}: {name} holds values that are not finite in {dtype}.")
                progress.update()
            save_file(shard, aside / file, metadata={"format": "pt"})
            del shard
            gc.collect()
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (aside / f"{WEIGHTS_NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        shutil.copy(config_file, aside / "config.json")
        aside.rename(folder)
    finally:
        progress.close()
        shutil.rmtree(aside, ignore_errors=True)

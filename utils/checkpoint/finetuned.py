"""Finds and loads a fine-tuned transformer, merged from a ZeRO checkpoint or in the diffusers format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel

from utils.checkpoint.lora_reader import lora_in
from utils.checkpoint.stored_weights import is_merged, read_merged, zero_folder
from utils.common.errors import UserError


def find_transformer(path: Path) -> Path:
    """Returns the folder with the transformer's weights: `path` itself or `path`/transformer.

    The folder is in the diffusers format or is the output of DeepSpeed's `zero_to_fp32.py`, which has no config.

    Raises:
        UserError: there are no weights, or only files of DeepSpeed that have to be merged first.
    """
    for folder in (path / "transformer", path):
        if (folder / "config.json").is_file():
            return folder
    if is_merged(path):
        return path
    if (files := zero_folder(path)) is not None:
        checkpoint = path if files != path else path.parent
        raise UserError(
            f"--transformer_path {path} is a ZeRO checkpoint that has not been merged. Run\n"
            f"    python {checkpoint}/zero_to_fp32.py {checkpoint} {checkpoint}/merged --safe_serialization\n"
            f"and give --transformer_path {checkpoint}/merged, or, for a folder in the diffusers format, run\n"
            f"    python -m utils.commands.export --checkpoint {checkpoint}\n"
            "and give the same --transformer_path again."
        )
    if path.is_dir() and lora_in(path) is not None:
        raise UserError(f"--transformer_path {path} holds a LoRA; give it as --lora_path.")
    checkpoints = sorted(folder.name for folder in path.glob("checkpoint-*")) if path.is_dir() else []
    raise UserError(
        f"--transformer_path {path}: there are no transformer weights. Give the folder checkpoint-N of a full "
        "fine-tuning run, the output of zero_to_fp32.py, or a transformer in the diffusers format."
        + (f" The folder has {', '.join(checkpoints)}." if checkpoints else "")
    )


def load_merged(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    """Loads a transformer from the output of `zero_to_fp32.py`. Weights are read and cast one at a time.

    Args:
        config: config of the transformer.

    Raises:
        UserError: a value is not finite.
    """
    with init_empty_weights():
        transformer = CogVideoXTransformer3DModel.from_config(config)
    state = {}
    for name, stored in read_merged(folder).items():
        state[name] = stored.read().to(dtype)
        if not state[name].isfinite().all():
            raise UserError(f"--transformer_path {folder}: {name} holds values that are not finite.")
    transformer.load_state_dict(state, assign=True)
    return transformer.eval()

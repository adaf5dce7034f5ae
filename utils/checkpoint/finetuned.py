"""Finds and loads a fine-tuned transformer, merged from a ZeRO checkpoint or in the diffusers format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel

from utils.checkpoint.stored_weights import is_merged, read_merged, zero_folder
from utils.common.errors import UserError


def find_transformer(path: Path) -> Path:
    """The folder with the weights of a fine-tuned transformer that `path` is or holds.

    It is in the diffusers format, or holds what DeepSpeed's `zero_to_fp32.py` wrote: weights without a config.

    Raises:
        UserError: there is none, or there are only DeepSpeed's own files, which have to be merged first.
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
    inside = sorted(found.name for found in path.glob("checkpoint-*")) if path.is_dir() else []
    raise UserError(
        f"--transformer_path {path}: there are no weights of a transformer. Give the folder checkpoint-N of a full "
        "fine-tuning run, the output of zero_to_fp32.py, or a transformer in the diffusers format."
        + (f" It has {', '.join(inside)}." if inside else "")
    )


def load_merged(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    """The transformer of a config with the weights that `zero_to_fp32.py` wrote, cast one by one.

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

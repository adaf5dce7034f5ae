"""Finds and loads a fine-tuned transformer, merged from a ZeRO checkpoint or in the diffusers format."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel

from utils.checkpoint.export import TRANSFORMER_CONFIG
from utils.checkpoint.lora_reader import lora_in, stated_in_lora
from utils.checkpoint.stored_weights import is_merged, read_merged, zero_folder
from utils.common.errors import UserError
from utils.model.spec import LEARNED, LEARNED_POSITIONS, ModelSpec
from utils.model.weight_files import read_config


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


def trained_positions(transformer: Path | None, loras: Sequence[Path], spec: ModelSpec) -> tuple[str | None, str]:
    """Returns how a trained file treats learned positions, and its flag and path for messages.

    The first is None if no file states it. Files that cannot be read count as such; loading them reports the error.

    Args:
        transformer, loras: paths of a fine-tuned transformer and of LoRAs.
        spec: of the base, whose config may state it too.

    Raises:
        UserError: two LoRAs were trained differently.
    """
    if spec.task == "t2v":  # `Lora.check_fits` refuses LoRAs that state their positions
        loras = []
    stated = {lora: text for lora in loras if (text := stated_in_lora(lora).get("learned_positions"))}
    if len(set(stated.values())) > 1:
        ways = ", ".join(f"{lora} with {text}" for lora, text in stated.items())
        raise UserError(f"--lora_path: the LoRAs treat learned positions differently: {ways}.")
    for lora, text in stated.items():
        return text, f"--lora_path {lora}"
    config = spec.transformer
    if transformer is not None:
        with suppress(UserError, OSError, ValueError):
            folder = find_transformer(transformer)
            config_file = (folder.parent / TRANSFORMER_CONFIG) if is_merged(folder) else folder / "config.json"
            if config_file.is_file():
                config = read_config(config_file, CogVideoXTransformer3DModel)
            else:
                config = {LEARNED: "patch_embed.pos_embedding" in read_merged(folder)}
    is_dropped = spec.has_learned_positions and not config[LEARNED]
    return "drop" if is_dropped else config.get(LEARNED_POSITIONS), f"--transformer_path {transformer}"


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

"""Finds and loads a fine-tuned transformer: in the diffusers format, merged from a ZeRO checkpoint, or for ComfyUI."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel

from utils.checkpoint.adapter_names import parse_name
from utils.checkpoint.export import POSITIONS, TRANSFORMER_CONFIG
from utils.checkpoint.layer_names import to_comfyui
from utils.checkpoint.lora_reader import lora_in, stated_in_lora
from utils.checkpoint.stored_weights import (
    StoredTensor,
    is_merged,
    open_weights,
    read_merged,
    read_safetensors,
    zero_folder,
)
from utils.common.errors import UserError
from utils.model.spec import LEARNED, LEARNED_POSITIONS, ModelSpec
from utils.model.weight_files import expected_shapes, read_config


def find_transformer(path: Path) -> Path:
    """Returns the folder with the transformer's weights, `path` itself or `path`/transformer, or a single file.

    The folder is in the diffusers format or is the output of DeepSpeed's `zero_to_fp32.py`. The latter and single
    files have no config; see `read_without_config`.

    Raises:
        UserError: there are no weights, or only files of DeepSpeed that have to be merged first.
    """
    if path.is_file():
        return path
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
        "fine-tuning run, the output of zero_to_fp32.py, a transformer in the diffusers format, or a file for ComfyUI."
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
    if transformer is not None and transformer.is_file():
        stated_in_file = None
        with suppress(UserError):
            _, metadata = open_weights(transformer, "--transformer_path")
            stated_in_file = metadata.get("learned_positions")
        return stated_in_file, f"--transformer_path {transformer}"
    if transformer is not None:
        with suppress(UserError, OSError, ValueError):
            folder = find_transformer(transformer)
            config_file = (folder.parent / TRANSFORMER_CONFIG) if is_merged(folder) else folder / "config.json"
            if config_file.is_file():
                config = read_config(config_file, CogVideoXTransformer3DModel)
            else:
                config = {LEARNED: POSITIONS in read_merged(folder)}
    is_dropped = spec.has_learned_positions and not config[LEARNED]
    return "drop" if is_dropped else config.get(LEARNED_POSITIONS), f"--transformer_path {transformer}"


def read_without_config(path: Path, config: dict[str, Any]) -> dict[str, StoredTensor]:
    """Returns the weights of a transformer under diffusers' names.

    Args:
        path: the output of `zero_to_fp32.py`, or a file with the names of ComfyUI or diffusers.
        config: config of the base. A table of positions that diffusers computes or drops is left out.

    Raises:
        UserError: a single file is damaged or holds a LoRA.
        Exception: whatever the readers raise if the output of `zero_to_fp32.py` is damaged.
    """
    if not path.is_file():
        return read_merged(path)
    stored, _ = open_weights(path, "--transformer_path")
    if any(map(parse_name, stored)):
        raise UserError(f"--transformer_path {path} holds a LoRA; give it as --lora_path.")
    names = {to_comfyui(name): name for name in expected_shapes(CogVideoXTransformer3DModel, config)}
    named = {names.get(name.removeprefix("model.diffusion_model."), name): stored[name] for name in stored}
    return {name: tensor for name, tensor in named.items() if name != POSITIONS or POSITIONS in names}


def load_without_config(
    path: Path, config: dict[str, Any], dtype: torch.dtype, base_files: Sequence[Path] = ()
) -> CogVideoXTransformer3DModel:
    """Loads a transformer from weights without a config. Weights are read and cast one at a time.

    Args:
        path: as in `read_without_config`.
        config: config of the transformer.
        base_files: the base's weights. A file for ComfyUI lacks the learned positions, which no training changes.

    Raises:
        UserError: a value is not finite.
    """
    with init_empty_weights():
        transformer = CogVideoXTransformer3DModel.from_config(config)
    tensors, state = read_without_config(path, config), {}
    if config[LEARNED] and POSITIONS not in tensors:
        tensors[POSITIONS] = read_safetensors(list(base_files))[POSITIONS]
    for name, stored in tensors.items():
        state[name] = stored.read().to(dtype)
        if not state[name].isfinite().all():
            raise UserError(f"--transformer_path {path}: {name} holds values that are not finite.")
    transformer.load_state_dict(state, assign=True)
    return transformer.eval()

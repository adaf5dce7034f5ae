"""Writes LoRA files that loaders apply at the trained strength."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from utils.checkpoint.layer_names import to_comfyui
from utils.checkpoint.lora_reader import COMFYUI_SUFFIX, METADATA_KEY, WEIGHTS_FILE, Lora


def lora_paths(folder: Path, choice: str, name: str) -> dict[str, Path]:
    """Returns format -> path of the LoRA in a checkpoint folder.

    ComfyUI lists LoRAs by their file names, so its file has the names of the run and the checkpoint.

    Args:
        choice: "diffusers", "comfyui" or "both".
        name: name of the run and the checkpoint, such as t2v-lora-checkpoint-100.
    """
    paths = {"diffusers": folder / WEIGHTS_FILE, "comfyui": folder / f"{name}{COMFYUI_SUFFIX}"}
    return {format: path for format, path in paths.items() if choice in (format, "both")}


def format_of(folder: Path) -> str:
    """Returns the formats of the LoRA in a checkpoint folder: "diffusers", "comfyui" or "both"."""
    if not any(folder.glob(f"*{COMFYUI_SUFFIX}")):
        return "diffusers"
    return "both" if (folder / WEIGHTS_FILE).is_file() else "comfyui"


def save_lora(
    state: dict[str, torch.Tensor], config: LoraConfig, paths: Mapping[str, Path], stated: Mapping[str, str]
) -> None:
    """Writes adapters at their trained strength.

    The strength alpha / rank is multiplied into the B matrices, and the metadata sets alpha = rank. Loaders that read
    the metadata and loaders that assume alpha = rank (older diffusers, ComfyUI) therefore apply the same weights, and
    a LoRA scale of 1.0 is the trained strength everywhere. The original alpha is in the checkpoint's `args.json`.

    Args:
        state: adapters under peft's names, `....lora_A.weight` [rank, in] and `....lora_B.weight` [out, rank], float32.
        config: config of the adapters during training.
        paths: see `lora_paths`.
        stated: other entries for the metadata of the files.
    """
    strength = config.lora_alpha / config.r
    folded = {name: tensor * strength if ".lora_B." in name else tensor for name, tensor in state.items()}
    settings = config.to_dict() | {"lora_alpha": config.r}
    for format, path in paths.items():
        _write(folded, settings, stated, format, path)


def convert_lora(lora: Lora, paths: Mapping[str, Path]) -> None:
    """Writes a LoRA in other formats, at its stored strength. Other entries of the metadata are kept.

    Raises:
        UserError: a value is not finite.
    """
    ranks = {layer: adapter.rank for layer, adapter in lora.adapters.items()}
    rank = lora.ranks[-1]
    pattern = {layer: other for layer, other in ranks.items() if other != rank}
    settings = {"r": rank, "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": pattern}
    settings["target_modules"] = sorted(ranks)
    for format, path in paths.items():
        _write(lora.tensors(), settings, lora.metadata, format, path)


def _write(
    state: dict[str, torch.Tensor], settings: dict[str, Any], metadata: Mapping[str, str], format: str, path: Path
) -> None:
    """Writes adapters under the names of a format.

    Args:
        state: adapters under peft's names, with their strength folded into B.
        settings: entries of the adapters' config.
        metadata: other entries for the metadata of the file.
    """
    named = {}
    for name, tensor in state.items():
        layer, _, matrix = name.rpartition(".lora_")
        prefix = f"diffusion_model.{to_comfyui(layer)}" if format == "comfyui" else f"transformer.{layer}"
        named[f"{prefix}.lora_{matrix}"] = tensor.contiguous()
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    config = {f"transformer.{name}": value for name, value in values.items() if _is_setting(value)}
    described = {METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
    save_file(named, path, metadata={**metadata, "format": "pt", **described})


def _is_setting(value: Any) -> bool:
    """Whether a value of the adapters' config is stored. Others are unset or empty."""
    return isinstance(value, bool | int | float | str | list) or (isinstance(value, dict) and bool(value))

"""Applies LoRA files to a transformer: as adapters, as the start of a training run, or merged into its weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig, set_peft_model_state_dict

from utils.checkpoint.lora_reader import Adapter, Lora
from utils.checkpoint.stored_weights import StoredTensor
from utils.common.errors import UserError
from utils.config.args import Args
from utils.training.trainable import target_layers


def scales_for(loras: Sequence[Any], scales: Sequence[float], flag: str) -> list[float]:
    """Returns one scale per LoRA. A single scale is for all of them.

    Args:
        flag: the option that names the LoRAs.

    Raises:
        UserError: the numbers differ.
    """
    if len(scales) not in (1, len(loras)):
        raise UserError(
            f"--lora_scale has {len(scales)} values for {len(loras)} files of {flag}; give one for all or one per file."
        )
    return list(scales) * len(loras) if len(scales) == 1 else list(scales)


def add_loras(transformer: CogVideoXTransformer3DModel, loras: Sequence[Lora], scales: Sequence[float]) -> None:
    """Adds the adapters of LoRAs that fit the transformer, in the dtype of its weights.

    Args:
        scales: strength of each; 1.0 is the strength stored in the file, 0 disables it.

    Raises:
        UserError: a value is not finite.
    """
    names = [f"lora_{number}" for number in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        # the strength is in B, so each layer's alpha is its rank
        ranks = {re.escape(layer): adapter.rank for layer, adapter in lora.adapters.items()}
        pattern = ranks if len(lora.ranks) > 1 else {}
        rank, layers = lora.ranks[0], list(lora.adapters)
        tensors = lora.tensors()
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, rank_pattern=pattern, alpha_pattern=pattern)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            transformer.add_adapter(config, adapter_name=name)
        set_adapters(transformer, tensors, name)
    transformer.requires_grad_(False)
    transformer.set_adapters(names, list(scales))


def set_adapters(transformer: CogVideoXTransformer3DModel, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Sets the weights of an adapter. All of its tensors must be given, and no others."""
    result = set_peft_model_state_dict(transformer, tensors, adapter_name=name)
    missing = [key for key in result.missing_keys if f".{name}." in key]
    assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)


def init_lora_errors(lora: Lora, config: dict[str, Any], args: Args) -> list[str]:
    """Returns why a run cannot start from a LoRA that fits its transformer.

    The rank, the target modules or the treatment of learned positions differ.
    """
    errors = []
    positions, trained_with = args.model.learned_positions, lora.metadata.get("learned_positions")
    if positions and trained_with and trained_with != positions:
        errors.append(
            f"--learned_positions is {positions}, but --init_lora {lora.file} was trained with {trained_with}; give "
            f"--learned_positions {trained_with}."
        )
    if lora.ranks != [args.lora.rank]:
        ranks = " and ".join(map(str, lora.ranks))
        remedy = f"give --rank {ranks}" if len(lora.ranks) == 1 else "a run needs the same rank for all layers"
        errors.append(f"--rank is {args.lora.rank}, but --init_lora {lora.file} has rank {ranks}; {remedy}.")
    selected = target_layers(config, args.lora.target_modules)
    if selected != lora.adapters.keys():
        names = sorted({re.sub(r"^transformer_blocks\.\d+\.", "", layer) for layer in lora.adapters})
        only = [*sorted(lora.adapters.keys() - selected), *sorted(selected - lora.adapters.keys())]
        errors.append(
            f"--target_modules {' '.join(args.lora.target_modules)} selects {len(selected)} layers, and --init_lora "
            f"{lora.file} has adapters of {len(lora.adapters)}; {only[0]} is not in both. The file's layers are named "
            f"{' '.join(names)}."
        )
    return errors


def start_from(transformer: CogVideoXTransformer3DModel, lora: Lora, args: Args) -> None:
    """Sets the adapters of a run to those of a LoRA, such that the transformer applies it at its stored strength.

    The run multiplies B A by its own alpha / rank, so B is divided by it.

    Raises:
        UserError: a value is not finite.
    """
    set_adapters(transformer, lora.tensors(args.lora.rank / args.lora.alpha), "default")


def merge_loras(
    weights: Mapping[str, StoredTensor], loras: Sequence[Lora], scales: Sequence[float]
) -> dict[str, StoredTensor]:
    """Returns the weights of a transformer with LoRAs added to them. Each weight is computed when it is read."""
    merged = dict(weights)
    for lora, scale in zip(loras, scales, strict=True):
        for layer, adapter in lora.adapters.items():
            weight = merged[f"{layer}.weight"]
            merged[f"{layer}.weight"] = StoredTensor(weight.shape, partial(_merged, weight, adapter, scale))
    return merged


def _merged(weight: StoredTensor, adapter: Adapter, scale: float) -> torch.Tensor:
    """Returns a weight with an adapter added to it, float32."""
    return weight.read().float() + scale * adapter.change()

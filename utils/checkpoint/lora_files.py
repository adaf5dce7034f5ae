"""Writes LoRA files that every loader applies at the trained strength, and loads them without ignoring any tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open

from utils.common.errors import UserError
from utils.common.filesystem import unreadable

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "lora"
# Part of the tensor names -> the tool that writes such files.
FOREIGN_FORMATS = {
    "lora_unet_": "kohya's sd-scripts",
    "lora_transformer_": "kohya's sd-scripts",
    "diffusion_model.": "ComfyUI or the original CogVideoX code",
    "base_model.model.": "peft",
    ".lora_down.": "kohya's sd-scripts",
    ".lora.down.": "an old version of diffusers",
    ".processor.": "an old version of diffusers",
}


def save_lora(state: dict[str, torch.Tensor], config: LoraConfig, folder: Path) -> None:
    """Writes adapters in the diffusers format at their trained strength.

    The strength alpha / rank is multiplied into the B matrices, and the metadata sets alpha = rank. Loaders that read
    the metadata and loaders that assume alpha = rank (older diffusers, ComfyUI) therefore apply the same weights, and
    a LoRA scale of 1.0 is the trained strength everywhere. The original alpha is in the checkpoint's `args.json`.

    Args:
        state: adapters under peft's names, `....lora_A.weight` [rank, in] and `....lora_B.weight` [out, rank], float32.
        config: config of the adapters during training.
        folder: folder of the new file.
    """
    strength = config.lora_alpha / config.r
    folded = {name: tensor * strength if ".lora_B." in name else tensor for name, tensor in state.items()}
    metadata = config.to_dict() | {"lora_alpha": config.r}
    CogVideoXPipeline.save_lora_weights(
        folder,
        transformer_lora_layers={name: tensor.contiguous() for name, tensor in folded.items()},
        transformer_lora_adapter_metadata={name: value for name, value in metadata.items() if _is_json_value(value)},
    )


def _is_json_value(value: Any) -> bool:
    """Whether diffusers can store a metadata value; it converts sets to lists."""
    return isinstance(value, bool | int | float | str | list | set)


def load_lora(transformer: CogVideoXTransformer3DModel, path: Path, scale: float) -> int:
    """Adds the adapters of a checkpoint folder or a .safetensors file to a transformer.

    Args:
        path: the folder or file.
        scale: strength of the adapters; 1.0 is the strength stored in the file, 0 disables them.

    Returns:
        the number of modules with an adapter, which equals the number in the file.

    Raises:
        UserError: the file is missing, holds no adapters or values that are not finite, or some adapters do not belong
            to this transformer.
    """
    file = find_lora(path)
    modules = _adapter_modules(transformer, file)
    state, metadata = CogVideoXPipeline.lora_state_dict(file.parent, weight_name=file.name, return_lora_metadata=True)
    if not_finite := [name for name, weight in state.items() if not weight.isfinite().all()]:
        raise UserError(f"--lora_path {file}: {not_finite[0]} holds values that are not finite.")
    CogVideoXPipeline.load_lora_into_transformer(state, transformer, adapter_name=ADAPTER, metadata=metadata)
    matched = sum(isinstance(module, LoraLayer) and ADAPTER in module.lora_A for module in transformer.modules())
    assert matched == len(modules), f"{matched} of {len(modules)} adapter modules were loaded"
    transformer.set_adapters([ADAPTER], [scale])
    return matched


def find_lora(path: Path) -> Path:
    """Returns the path of the weights file: `path` itself, or the file in the folder `path`.

    Raises:
        UserError: there is no such file.
    """
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if file.is_file():
        return file
    found = sorted(file.parent.name for file in path.glob(f"checkpoint-*/{WEIGHTS_FILE}")) if path.is_dir() else []
    hint = f"; it has {', '.join(found)}" if found else ""
    raise UserError(f"--lora_path {path}: there is no {WEIGHTS_FILE}{hint}. Give the folder checkpoint-N of a run.")


def _adapter_modules(transformer: CogVideoXTransformer3DModel, file: Path) -> set[str]:
    """Returns the names of the modules for which a file has adapters.

    Raises:
        UserError: the file cannot be read, or a tensor does not match a linear layer of the transformer.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = unreadable(file) or f"it cannot be read as safetensors ({error})"
        raise UserError(f"--lora_path {file}: {reason}.") from error
    layers = dict(transformer.named_modules())
    unexpected, modules = [], set()
    for name, shape in shapes.items():
        module, _, matrix = name.removeprefix("transformer.").rpartition(".lora_")
        pair = [shapes.get(f"transformer.{module}.lora_{side}.weight", [0, 0]) for side in "AB"]
        layer = layers.get(module)
        matches = (
            name.startswith("transformer.")
            and matrix in ("A.weight", "B.weight")
            and isinstance(layer, torch.nn.Linear)
            and pair == [[pair[0][0], layer.in_features], [layer.out_features, pair[0][0]]]
        )
        if matches:
            modules.add(module)
        else:
            unexpected.append(f"{name} {list(shape)}")
    if foreign := next(
        (tool for marker, tool in FOREIGN_FORMATS.items() if any(marker in name for name in shapes)), None
    ):
        raise UserError(
            f"--lora_path {file} is in the format of {foreign}, which is not read: {next(iter(shapes))}. Convert it to "
            "the diffusers format, whose names are like transformer.transformer_blocks.0.attn1.to_q.lora_A.weight."
        )
    if not modules:
        first = unexpected[0] if unexpected else "nothing at all"
        raise UserError(f"--lora_path {file}: no adapter module matches this transformer; the file holds {first}.")
    if unexpected:
        raise UserError(
            f"--lora_path {file}: {len(unexpected)} of {len(shapes)} tensors do not belong to this transformer, "
            f"such as {unexpected[0]}. Was it trained on another checkpoint?"
        )
    return modules

"""Writes LoRA files that every loader applies at the trained strength, and loads them without ignoring any tensor."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterable
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
_OTHER_MODEL = "Give a LoRA of CogVideoX."
_OTHER_KIND = "Such adapters are not supported."
_OTHER_FORMAT = (
    "Such files are not read; convert the file to the diffusers format, whose names are like "
    "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight."
)
_PEFT = (
    "If it is from a training_state/ folder, give the folder checkpoint-N above it. Otherwise convert it to the "
    "diffusers format: put 'transformer.' before each name, after removing 'base_model.model.' and '.default', and "
    "multiply the lora_B tensors by alpha / rank."
)
_WHOLE_TRANSFORMER = "Give its folder as --transformer_path."
# Pattern in a tensor's name -> what the file holds, and what to do. The first match counts: a LoRA of another model may
# be in any format.
FOREIGN_FILES = (
    (r"\.matrix_[AB]\.\d", "adapters in the format of CogVideo's SAT code", _OTHER_FORMAT),
    (r"^(transformer\.)?transformer_blocks\.\d+\.attn1\.to_q\.weight$", "a whole transformer", _WHOLE_TRANSFORMER),
    (r"(double|single)(_transformer)?_blocks[._]", "adapters of Flux or HunyuanVideo", _OTHER_MODEL),
    (r"[._]\d+[._](self|cross)_attn|^transformer\.blocks\.", "adapters of Wan", _OTHER_MODEL),
    (r"(down|up|input|output|middle)_blocks?[._]", "adapters of Stable Diffusion", _OTHER_MODEL),
    (r"transformer_blocks[._]\d+[._]attn2?[._]", "adapters of another model, such as SD3 or LTX-Video", _OTHER_MODEL),
    (r"^(text_encoders?|lora_te\d?)[._]", "adapters of a text encoder", "CogVideoX is trained without them."),
    (r"lokr_|hada_|oft_|lora_mid|^lycoris_|\.diff(_b)?$", "LyCORIS adapters, such as LoKr, LoHa or OFT", _OTHER_KIND),
    (r"lora_magnitude_vector|dora_scale", "DoRA adapters", _OTHER_KIND),
    (r"\.processor\.|[._]lora\.(down|up)\.", "adapters in the format of an old diffusers version", _OTHER_FORMAT),
    (r"^lora_(unet|transformer)_|\.lora_(down|up)\.", "adapters in the format of kohya's sd-scripts", _OTHER_FORMAT),
    (r"^diffusion_model\.", "adapters in the format of ComfyUI", _OTHER_FORMAT),
    (r"^base_model\.|\.lora_[AB]\.\w+\.weight$|^transformer_blocks\.", "adapters in the format of peft", _PEFT),
    (r"\.alpha$", "adapters with alpha tensors", "Multiply the lora_B tensors by alpha / rank and remove alpha."),
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


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
    if not path.is_dir():
        raise UserError(f"--lora_path {path}: there is no such file or folder.")
    if (path / "transformer").is_dir():
        raise UserError(f"--lora_path {path} holds a whole transformer; give it as --transformer_path.")
    found = [file.parent for level in ("*", "*/*") for file in sorted(path.glob(f"{level}/{WEIGHTS_FILE}"))]
    found += sorted(file for file in path.iterdir() if file.suffix == ".safetensors" or "_lora_" in file.name)
    names = ", ".join(str(file.relative_to(path)) for file in found)
    hint = f"; it has {names}. Give one of these" if found else ". Give the folder checkpoint-N of a LoRA run"
    raise UserError(f"--lora_path {path}: there is no {WEIGHTS_FILE} in it{hint}.")


def describe_foreign(names: Iterable[str]) -> str | None:
    """Returns what a file with tensors of these names holds, and what to do; None if no pattern matches."""
    names = list(names)
    for pattern, content, remedy in FOREIGN_FILES:
        if name := next((name for name in names if re.search(pattern, name)), None):
            return f"{content} ({name}). {remedy}"
    return None


def _describe_pickle(file: Path) -> str | None:
    """Returns the rest of a sentence about a file of `torch.save`; None for any other file. Does not run the pickle."""
    if not zipfile.is_zipfile(file):
        is_pickle = file.suffix in _PICKLES
        return "is not a safetensors file; files of torch.save are not read" if is_pickle else None
    try:
        with zipfile.ZipFile(file) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
        texts = [text for content in pickles for _, text, _ in pickletools.genops(content) if isinstance(text, str)]
    except (ValueError, zipfile.BadZipFile):  # damaged
        texts = []
    content = describe_foreign(texts)
    return "is a file of torch.save, which is not read" + (f"; it holds {content.rstrip('.')}" if content else "")


def _adapter_modules(transformer: CogVideoXTransformer3DModel, file: Path) -> set[str]:
    """Returns the names of the modules for which a file has adapters.

    Raises:
        UserError: the file cannot be read, or a tensor does not match a linear layer of the transformer.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        if pickle := None if unreadable(file) else _describe_pickle(file):
            raise UserError(f"--lora_path {file} {pickle}.") from error
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
    if unexpected and (foreign := describe_foreign(shapes)):
        raise UserError(f"--lora_path {file} holds {foreign}")
    if not modules:
        first = unexpected[0] if unexpected else "nothing at all"
        raise UserError(f"--lora_path {file}: no adapter module matches this transformer; the file holds {first}.")
    if unexpected:
        raise UserError(
            f"--lora_path {file}: {len(unexpected)} of {len(shapes)} tensors do not belong to this transformer, "
            f"such as {unexpected[0]}. Was it trained on another checkpoint?"
        )
    return modules

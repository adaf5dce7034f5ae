"""Checks the config and weight files of one component before it is loaded."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import CogVideoXDPMScheduler
from safetensors import SafetensorError, safe_open

from utils.common.errors import UserError
from utils.common.filesystem import unreadable


def read_config(path: Path, model_class: Any | None, flag: str = "--model_path") -> dict[str, Any]:
    """Reads a component's config and completes it with the defaults of its class.

    Args:
        model_class: the diffusers class; None for components of other libraries, whose config is returned as is.

    Raises:
        UserError: the file is missing, is not JSON, or describes another class.
    """
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{flag}: {path} is missing.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {unreadable(path) or f'{path} cannot be read as JSON ({error})'}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{flag}: {path} is not a config; a JSON object is expected.")
    if model_class is None:
        return config
    found, expected = config.get("_class_name"), model_class.__name__
    # both CogVideoX schedulers have the same config fields
    if found != expected and not (model_class is CogVideoXDPMScheduler and found == "CogVideoXDDIMScheduler"):
        raise UserError(f"{flag}: {path} describes a {found}; a CogVideoX checkpoint has a {expected}.")
    return with_defaults(model_class, config)


def with_defaults(model_class: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config completed with the defaults of its class."""
    parameters = inspect.signature(model_class).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | config


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files from which diffusers or transformers loads a component; they may be missing.

    Empty if there is neither a single file nor an index of shards. Other variants in the folder, such as
    `model.fp16.safetensors`, are not loaded.
    """
    is_diffusers = folder.name != "text_encoder"
    stem = "diffusion_pytorch_model" if is_diffusers else "model"
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.is_file() and (is_diffusers or not single.is_file()):  # only diffusers looks for an index first
        return [folder / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [single] if single.is_file() else []


def describe_other_weights(folder: Path) -> str:
    """Returns a sentence about a folder without weights that can be loaded."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    is_variant = any("." in name.removesuffix(".safetensors") for name in names)
    if not is_variant and any(re.search(r"-\d+-of-\d+\.safetensors$", name) for name in names):
        return f"{folder} holds shards without their .safetensors.index.json; is the download complete?"
    if names:
        expected = f"{names[0].partition('.')[0]}.safetensors"
        return (
            f"{folder} holds {names[0]}, which is not loaded; the plain file {expected} is expected. Download the "
            "model without a variant, or rename the files."
        )
    if any(folder.glob("*.bin")):
        return f"{folder} holds .bin files only, which are not loaded; download the model as safetensors."
    return f"{folder} holds no .safetensors file; is the download complete?"


LFS_POINTER = "a Git LFS pointer and not the file itself; run `git lfs pull` in the model's folder."


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file was cloned without Git LFS and only names the content."""
    with file.open("rb") as content:
        return content.read(64).startswith(b"version https://git-lfs")


def check_weights(folder: Path, flag: str, model_class: Any | None, config: dict[str, Any] | None) -> None:
    """Checks the headers of a component's safetensors files.

    Args:
        model_class, config: if both are given, every tensor of such a model must be present with its shape.

    Raises:
        UserError: a file is missing or truncated, or a tensor is missing or has another shape.
    """
    if reason := unreadable(folder):
        raise UserError(f"{flag}: {reason}.")
    try:
        files = weight_files(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{flag}: the index of the shards in {folder} cannot be read ({error}).") from error
    if folder.is_dir() and not files:
        raise UserError(f"{flag}: {describe_other_weights(folder)}")
    shapes: dict[str, list[int]] = {}
    errors = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            if reason := unreadable(file):
                errors.append(f"{flag}: {reason}.")
            elif not file.exists():
                errors.append(f"{flag}: {file} is missing; is the download complete?")
            elif is_lfs_pointer(file):
                errors.append(f"{flag}: {file} is {LFS_POINTER}")
            else:
                errors.append(f"{flag}: {file} is damaged ({error}); is the download complete?")
    if errors:
        raise UserError(errors)
    if model_class is not None and config is not None:
        check_shapes(shapes, folder, flag, model_class, config)


def check_shapes(
    shapes: dict[str, list[int]],
    folder: Path,
    flag: str,
    model_class: Any,
    config: dict[str, Any],
    strict: bool = False,
) -> None:
    """Compares the tensors of a folder with those of a model with this config.

    Args:
        shapes: tensor name -> shape, as found in the folder.
        strict: whether additional tensors are an error.

    Raises:
        UserError: a tensor is missing, has another shape or, with `strict`, is unexpected.
    """
    with init_empty_weights(include_buffers=True):
        expected = {name: list(tensor.shape) for name, tensor in model_class.from_config(config).state_dict().items()}
    wrong = [name for name, shape in expected.items() if shapes.get(name) != shape]
    if strict:
        wrong += sorted(shapes.keys() - expected.keys())
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{flag}: {folder} does not hold the weights that its config describes; {len(wrong)} tensors differ, such "
            f"as {name}, which is {shapes.get(name, 'missing')} and should be {expected.get(name, 'missing')}."
        )

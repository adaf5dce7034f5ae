"""Config and weights of one component of a checkpoint, looked at before they are loaded."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import CogVideoXDPMScheduler
from safetensors import SafetensorError, safe_open

from utils.common.errors import UserError


def read_config(path: Path, kind: Any | None, flag: str = "--model_path") -> dict[str, Any]:
    """A component's config, completed with the defaults of its class; None for one of another library.

    Raises:
        UserError: missing, not JSON, or of another class.
    """
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{flag}: {path} is missing.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {path} cannot be read as JSON ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{flag}: {path} is not a config.")
    if kind is None:
        return config
    found, expected = config.get("_class_name"), kind.__name__
    # the schedulers of CogVideoX share their settings, whichever of them the checkpoint names
    if found != expected and not (kind is CogVideoXDPMScheduler and found == "CogVideoXDDIMScheduler"):
        raise UserError(f"{flag}: {path} describes a {found}; a CogVideoX checkpoint has a {expected}.")
    return with_defaults(kind, config)


def with_defaults(kind: Any, config: dict[str, Any]) -> dict[str, Any]:
    """A config completed with the defaults of its class."""
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | config


def check_weights(folder: Path, flag: str, kind: Any | None, config: dict[str, Any] | None) -> None:
    """Reads the headers of a component's safetensors.

    Args:
        kind, config: where given, every tensor of such a model must be there in its shape.

    Raises:
        UserError: files that are missing or cut short, or tensors that are missing or of another shape.
    """
    files = sorted(folder.glob("*.safetensors"))
    if folder.is_dir() and not files:
        raise UserError(f"{flag}: {folder} holds no .safetensors file; is the download complete?")
    shapes: dict[str, list[int]] = {}
    errors = []
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            errors.append(f"{flag}: {index} cannot be read ({error}).")
            continue
        missing = sorted(shards - {file.name for file in files})
        errors += [f"{flag}: {folder / shard} is missing; is the download complete?" for shard in missing]
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            errors.append(f"{flag}: {file} is damaged ({error}); is the download complete?")
    if errors:
        raise UserError(errors)
    if kind is not None and config is not None:
        check_shapes(shapes, folder, flag, kind, config)


def check_shapes(
    shapes: dict[str, list[int]], folder: Path, flag: str, kind: Any, config: dict[str, Any], no_others: bool = False
) -> None:
    """Compares the tensors of a folder with those of a model of this config.

    Args:
        no_others: there must be no tensor besides.

    Raises:
        UserError: a tensor is missing, has another shape, or does not belong there.
    """
    with init_empty_weights(include_buffers=True):
        expected = {name: list(tensor.shape) for name, tensor in kind.from_config(config).state_dict().items()}
    wrong = [name for name, shape in expected.items() if shapes.get(name) != shape]
    if no_others:
        wrong += sorted(shapes.keys() - expected.keys())
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{flag}: {folder} does not hold the weights that its config describes; {len(wrong)} tensors differ, such "
            f"as {name}, which is {shapes.get(name, 'missing')} and should be {expected.get(name, 'missing')}."
        )

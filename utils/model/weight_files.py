"""Checks the config and weight files of one component before it is loaded."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import CogVideoXDPMScheduler
from safetensors import SafetensorError, safe_open
from transformers import T5Config, T5EncoderModel

from utils.common.errors import UserError
from utils.common.filesystem import unreadable, unreadable_in

# Type of a parameter of a model -> types of its value in a config. Numbers may lack a decimal point.
_JSON_TYPES: dict[Any, tuple[type, ...]] = {
    **{kind: (kind,) for kind in (bool, int, str)},
    float: (float, int),
    int | None: (int, type(None)),
}
# The name of a weight file of a variant, or of one of its shards.
_VARIANT = re.compile(r".+\.([\w-]+?)(?:-\d+-of-\d+)?\.safetensors")


def read_config(path: Path, model_class: Any, flag: str = "--model_path") -> dict[str, Any]:
    """Reads a component's config and completes it with the defaults of its class.

    Args:
        model_class: the class of the component. The config of a text encoder is returned as is.

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
    if (quantization := config.get("quantization_config")) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(
            f"{flag}: {path} describes weights that are quantized ({method}); give the checkpoint with bf16 or fp16 "
            "weights, which --quantize_base and --quantize can store in fewer bits."
        )
    if model_class is T5EncoderModel:
        if config.get("model_type") != "t5":
            raise UserError(f"{flag}: {path} describes a {config.get('model_type')}; a CogVideoX checkpoint has a t5.")
        return config
    found, expected = config.get("_class_name"), model_class.__name__
    # both CogVideoX schedulers have the same config fields
    if found != expected and not (model_class is CogVideoXDPMScheduler and found == "CogVideoXDDIMScheduler"):
        raise UserError(f"{flag}: {path} describes a {found}; a CogVideoX checkpoint has a {expected}.")
    if errors := list(_type_errors(model_class, config)):
        raise UserError(f"{flag}: {path}: {error}." for error in errors)
    return with_defaults(model_class, config)


def _type_errors(model_class: Any, config: dict[str, Any]) -> Iterator[str]:
    """Yields an error for each entry of another type than that of the class, such as a number in quotes or null."""
    for parameter in inspect.signature(model_class).parameters.values():
        value, default = config.get(parameter.name, parameter.default), parameter.default
        kinds = _JSON_TYPES.get(parameter.annotation, ())
        if kinds and type(value) not in (*kinds, type(default)):
            example = json.dumps(default)
            yield f"{parameter.name} is {json.dumps(value)}, which has the wrong type; an example is {example}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{parameter.name} is {value}, which is not a finite number"


def with_defaults(model_class: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config completed with the defaults of its class."""
    parameters = inspect.signature(model_class).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | config


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a component has weights of a variant, such as `model.fp16.safetensors` or shards of this name.

    If it has, the pipelines of diffusers load them, and otherwise the plain weights of the component.
    """
    pattern = rf".+\.{re.escape(variant)}(-\d+-of-\d+)?\.(safetensors|bin)"
    return any(re.fullmatch(pattern, path.name) for path in folder.glob("*"))


def _names(folder: Path, variant: str | None) -> tuple[str, str]:
    """Returns the names that a component's single weight file and its index of shards should have."""
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    suffix = f".{variant}" if variant is not None and has_variant(folder, variant) else ""
    return f"{stem}{suffix}.safetensors", f"{stem}.safetensors.index{suffix}.json"


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Returns the safetensors files from which diffusers or transformers loads a component; they may be missing.

    Empty if there is neither a single file nor an index of shards.

    Args:
        variant: which weights to load if the folder has them.

    Raises:
        OSError, ValueError, LookupError, TypeError, AttributeError: the index of the shards cannot be read.
    """
    single, index = (folder / name for name in _names(folder, variant))
    is_diffusers = folder.name != "text_encoder"
    if index.is_file() and (is_diffusers or not single.is_file()):  # only diffusers looks for an index first
        return [folder / shard for shard in _read_shard_names(index)]
    return [single] if single.is_file() else []


def _read_shard_names(index: Path) -> list[str]:
    """Returns the names of the shards that an index lists. Raises the errors that `weight_files` documents."""
    content = json.loads(index.read_text())
    names = sorted(set(content["weight_map"].values()))
    if any(Path(name).name != name for name in names) or "metadata" not in content:  # diffusers refuses both
        raise ValueError("it has no metadata, or names files in other folders")
    return names


def describe_other_weights(folder: Path, flag: str, variant: str | None) -> str:
    """Returns a sentence on why no weights can be loaded from a folder.

    Args:
        flag, variant: as in `check_weights`.
    """
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    single, index = _names(folder, variant)
    if legacy := sorted(folder.glob(f"*.safetensors.{variant}.index.json")):
        new = legacy[0].name.replace(f".{variant}.index.", f".index.{variant}.")
        return f"{folder} holds {legacy[0].name}, a name of old diffusers versions; rename it to {new}."
    if names and (other := _VARIANT.fullmatch(names[0])) and other[1] != variant:
        remedy = f"give --variant {other[1]}" if flag == "--model_path" else f"remove .{other[1]} from the names"
        return f"{folder} holds weights of the variant {other[1]} only ({names[0]}); {remedy}."
    if any(re.search(r"-\d+-of-\d+(\.\w+)?\.safetensors$", name) for name in names):
        return f"{folder} holds shards without their index {index}; is the download complete?"
    if (folder / single).is_symlink():
        return (
            f"{folder / single} is a link to {(folder / single).readlink()}, which does not exist; download it again."
        )
    if names:
        return f"{folder} holds {names[0]}, which is not loaded; the file {single} is expected."
    if any(folder.glob("*.bin")):
        return f"{folder} holds .bin files only, which are not loaded; download the model as safetensors."
    return f"{folder} holds no .safetensors file; is the download complete?"


def check_weights(
    folder: Path, flag: str, model_class: Any, config: dict[str, Any] | None, variant: str | None = None
) -> None:
    """Checks the headers of the safetensors files from which a component is loaded.

    Args:
        flag: the option that names the folder, for the message.
        model_class, config: every tensor of such a model must be present with its shape; unknown if `config` is None.
        variant: as in `weight_files`.

    Raises:
        UserError: a file is missing or truncated, or a tensor is missing or has another shape.
    """
    if reason := unreadable(folder):
        raise UserError(f"{flag}: {reason}.")
    try:
        files = weight_files(folder, variant)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = unreadable_in(folder) or f"the index of the shards in {folder} cannot be read ({error})"
        raise UserError(f"{flag}: {reason}.") from error
    if folder.is_dir() and not files:
        raise UserError(f"{flag}: {describe_other_weights(folder, flag, variant)}")
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
            else:
                errors.append(f"{flag}: {file} is damaged ({error}); is the download complete?")
    if errors:
        raise UserError(errors)
    if config is not None:
        check_shapes(shapes, folder, flag, model_class, config)


def expected_shapes(model_class: Any, config: dict[str, Any]) -> dict[str, list[int]]:
    """Returns the shapes of the tensors of a model, without those that transformers ties to others."""
    with init_empty_weights(include_buffers=True):
        is_t5 = model_class is T5EncoderModel
        model = T5EncoderModel(T5Config(**config)) if is_t5 else model_class.from_config(config)
    tied = getattr(model, "_tied_weights_keys", None) or ()
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


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
    try:
        expected = expected_shapes(model_class, config)
    except Exception as error:  # whatever the constructors of diffusers and transformers raise
        reason = " ".join(str(error).split())  # transformers writes several lines
        raise UserError(f"{flag}: {folder} has a config of another kind ({reason}).") from error
    if "encoder.embed_tokens.weight" in shapes and model_class is T5EncoderModel:  # another name of the same tensor
        shapes = {"shared.weight": shapes["encoder.embed_tokens.weight"], **shapes}
    wrong = [name for name, shape in expected.items() if shapes.get(name) != shape]
    if strict:
        wrong += sorted(shapes.keys() - expected.keys())
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{flag}: {folder} does not hold the weights that its config describes; {len(wrong)} tensors differ, such "
            f"as {name}, which is {shapes.get(name, 'missing')} and should be {expected.get(name, 'missing')}."
        )

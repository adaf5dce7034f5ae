"""Reads LoRA files of diffusers, peft, ComfyUI, kohya's sd-scripts and CogVideo's SAT code.

Every reader gives the same result: for each layer, A, B and the strength at which B A is added to the weight.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from utils.checkpoint.adapter_names import Part, describe_foreign, parse_name, sat_adapters
from utils.checkpoint.stored_weights import StoredTensor, open_weights
from utils.common.errors import UserError
from utils.common.filesystem import unreadable
from utils.training.trainable import linear_layers

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_SUFFIX = "-comfyui.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # of diffusers: config of the adapters, in the file's metadata
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MAX_NAMES = 3
TRAINED_ON = "trained_on"  # of our LoRAs: kind of the base
# Kind -> a base of this kind.
_BASES = {
    "CogVideoX, text to video": "CogVideoX-5b",
    "CogVideoX, image to video": "CogVideoX-5b-I2V",
    "CogVideoX1.5, text to video": "CogVideoX1.5-5B",
    "CogVideoX1.5, image to video": "CogVideoX1.5-5B-I2V",
}


@dataclass(frozen=True)
class Adapter:
    """The change of one linear layer, `strength * B A`.

    Attributes:
        a: A [rank, in_features], as stored.
        b: B [out_features, rank], as stored.
        strength: alpha / rank; 1 if it is unknown.
    """

    a: StoredTensor
    b: StoredTensor
    strength: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def change(self) -> torch.Tensor:
        """Returns the change of the weight [out_features, in_features], float32."""
        return self.strength * (self.b.read().float() @ self.a.read().float())


@dataclass(frozen=True)
class Lora:
    """A LoRA on disk.

    Attributes:
        file: where it was read.
        flag: the option that names it, for messages.
        adapters: layer, under diffusers' name -> its adapter.
        metadata: of the file, without the config of the adapters.
        notes: facts that the user should know, such as an unknown strength.
    """

    file: Path
    flag: str
    adapters: dict[str, Adapter]
    metadata: dict[str, str]
    notes: list[str]

    @property
    def ranks(self) -> list[int]:
        return sorted({adapter.rank for adapter in self.adapters.values()})

    def tensors(self, multiplier: float = 1.0) -> dict[str, torch.Tensor]:
        """Reads the adapters under peft's names. Float32; the strength times `multiplier` is folded into B.

        Raises:
            UserError: a value is not finite.
        """
        tensors = {}
        for layer, adapter in self.adapters.items():
            tensors[f"{layer}.lora_A.weight"] = adapter.a.read().float()
            tensors[f"{layer}.lora_B.weight"] = adapter.b.read().float() * (adapter.strength * multiplier)
        if not_finite := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise UserError(f"{self.flag} {self.file}: {not_finite[0]} holds values that are not finite.")
        return tensors

    def check_finite(self) -> None:
        """Reads all values. Takes 0.1 s per 500 MB that the system has in memory.

        Raises:
            UserError: a value is not finite.
        """
        for layer, adapter in self.adapters.items():
            for name, tensor in (("A", adapter.a), ("B", adapter.b)):
                smallest, largest = tensor.read().float().aminmax()  # both are NaN if a value is; faster than isfinite
                if not (smallest.isfinite() and largest.isfinite()):
                    subject = f"{self.flag} {self.file}: {layer}.lora_{name}.weight"
                    raise UserError(f"{subject} holds values that are not finite.")

    def check_fits(self, config: dict[str, Any]) -> None:
        """Checks that the adapters fit the layers of a transformer with this config. Reads no weights.

        Raises:
            UserError: one does not, or the LoRA was trained on a base of another kind.
        """
        channels, image_channels = config["in_channels"], 2 * config["out_channels"]
        if channels != image_channels and (base := self._image_to_video_base(config)):
            raise UserError(
                f"{self.flag} {self.file} was trained for image to video, with {image_channels} input channels; this "
                f"transformer has {channels}, for text to video. Give the base that it was trained on as --model_path, "
                f"such as THUDM/{base}."
            )
        self._check_kind(kind_of(config))
        layers = linear_layers(config)
        wrong = []
        for name, adapter in self.adapters.items():
            layer = layers.get(name)
            if layer is None:
                wrong.append(f"{name}, which it does not have as a linear layer")
            elif (adapter.b.shape[0], adapter.a.shape[1]) != (layer.out_features, layer.in_features):
                found, expected = f"{adapter.b.shape[0]}x{adapter.a.shape[1]}", tuple(layer.weight.shape)
                wrong.append(f"{name}, which is {expected[0]}x{expected[1]} and not {found}")
        if wrong:
            raise UserError(
                f"{self.flag} {self.file}: {len(wrong)} of {len(self.adapters)} adapters do not fit this transformer, "
                f"such as that of {wrong[0]}. Was it trained on another checkpoint?"
            )

    def _check_kind(self, kind: str) -> None:
        """Checks the kind of the base, if the file states one. Adapters of all kinds may have the same shapes.

        A LoRA for text to video may be used on a model for image to video of the same version, with a note.

        Raises:
            UserError: the kinds do not agree.
        """
        stated = self.metadata.get(TRAINED_ON, kind)
        if stated == kind or stated not in _BASES:
            return
        subject = f"{self.flag} {self.file} was trained on {stated}, and this transformer is {kind}"
        if stated.replace("text", "image") != kind:
            raise UserError(f"{subject}. Give its base as --model_path, such as THUDM/{_BASES[stated]}.")
        self.notes.append(f"{subject}.")

    def _image_to_video_base(self, config: dict[str, Any]) -> str | None:
        """Returns the name of the base, if the file shows that it is one for image to video; None otherwise."""
        if "learned_positions" in self.metadata:  # only this model has them
            return "CogVideoX-5b-I2V"
        projection = self.adapters.get("patch_embed.proj")  # a linear layer in CogVideoX1.5 alone
        pixels = config["patch_size"] ** 2 * (config["patch_size_t"] or 1)
        if projection is not None and projection.a.shape[1] == 2 * config["out_channels"] * pixels:
            return "CogVideoX1.5-5B-I2V"
        return None


def kind_of(config: Mapping[str, Any]) -> str:
    """Returns the version and task of a transformer with this config."""
    version = "CogVideoX1.5" if config["patch_size_t"] is not None else "CogVideoX"
    return f"{version}, {'image' if config['in_channels'] == 2 * config['out_channels'] else 'text'} to video"


def lora_in(folder: Path) -> Path | None:
    """Returns the LoRA file of a folder, by its name; None if there is none, or several for ComfyUI."""
    named = [path for name in (WEIGHTS_FILE, _PEFT_FILE) if (path := folder / name).is_file()]
    comfyui = list(folder.glob(f"*{COMFYUI_SUFFIX}"))
    return named[0] if named else comfyui[0] if len(comfyui) == 1 else None


def find_lora(path: Path, flag: str) -> Path:
    """Returns the path of the weights file: `path` itself, or the file in the folder `path`.

    Raises:
        UserError: there is no such file.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{flag} {path}: {unreadable(path) or 'there is no such file or folder'}.")
    if (file := lora_in(path)) is not None:
        return file
    if (path / "transformer").is_dir() or (path / "config.json").is_file():
        raise UserError(f"{flag} {path} holds a whole transformer; cli_demo.py takes it as --transformer_path.")
    found = [file.parent for level in ("*", "*/*") for file in sorted(path.glob(f"{level}/{WEIGHTS_FILE}"))]
    found += sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".pt"))
    found += sorted((*path.glob(f"*/{_PEFT_FILE}"), *path.glob("[0-9]*/mp_rank_00_model_states.pt")))
    names = ", ".join(str(file.relative_to(path)) for file in found)
    hint = f"; it has {names}. Give one of these" if found else ". Give the folder checkpoint-N of a LoRA run"
    raise UserError(f"{flag} {path}: there is no {WEIGHTS_FILE} in it{hint}.")


def lora_sources(path: Path, flag: str) -> list[Path]:
    """Returns the files that `read_lora` reads: the weights, and the config of peft's adapters if it is beside them.

    Raises:
        UserError: there is no LoRA.
    """
    file = find_lora(path, flag)
    config = file.with_name(_PEFT_CONFIG)
    return [file, config] if config.is_file() else [file]


def stated_in_lora(path: Path) -> dict[str, str]:
    """Returns the metadata of a LoRA file or of the one in a folder. Empty if it has none, or cannot be read."""
    try:
        with safe_open(find_lora(path, ""), framework="pt") as file:
            return file.metadata() or {}
    except (UserError, OSError, SafetensorError):
        return {}


def read_lora(path: Path, flag: str, config: dict[str, Any] | None = None) -> Lora:
    """Reads the names and shapes of a LoRA's tensors, and its strength. The tensors stay on disk.

    Args:
        path: a file, a folder checkpoint-N, or a folder with one LoRA.
        flag: the option that names it, for messages.
        config: config of the transformer that the adapters must fit; None for any.

    Raises:
        UserError: there is no such file, or it holds something else, is incomplete, or does not fit.
    """
    file = find_lora(path, flag)
    tensors, metadata = open_weights(file, flag)
    is_sat = bool(sat := sat_adapters(tensors))
    layers = _by_layer({name: tensors[name] for name in sat or tensors}, f"{flag} {file}")
    strength_of = _strengths(file, metadata, flag)
    adapters, unknown = {}, False
    for layer, parts in layers.items():
        a, b, alpha = parts["A"], parts["B"], parts.get("alpha")
        rank = a.shape[0]
        strength = float(alpha.read()) / rank if alpha is not None else strength_of(layer, rank)
        unknown |= strength is None
        if strength is None:
            strength = 1 / rank if is_sat else 1.0
        if not math.isfinite(strength):
            raise UserError(f"{flag} {file}: the alpha of {layer} is not a finite number.")
        adapters[layer] = Adapter(a, b, strength)
    metadata.pop(METADATA_KEY, None)
    lora = Lora(file, flag, adapters, metadata, [])
    if unknown:
        ranks = " or ".join(map(str, lora.ranks))
        scales = " or ".join(f"1/{rank}" for rank in lora.ranks)
        lora.notes.append(
            f"{flag} {file} does not state its alpha. "
            + (
                f"The default of CogVideo's SAT code, alpha = 1, is used: scale {scales}."
                if is_sat
                else f"It is applied at scale 1, as if alpha were the rank, {ranks}. If it comes from CogVideo's "
                f"SAT code, its scale is {scales}."
            )
        )
    if config is not None:
        lora.check_fits(config)
    return lora


def _by_layer(tensors: Mapping[str, StoredTensor], subject: str) -> dict[str, dict[Part, StoredTensor]]:
    """Returns layer -> A, B and, if the file has it, alpha.

    Raises:
        UserError: a tensor fits no layer, or one is missing.
    """
    layers: dict[str, dict[Part, StoredTensor]] = {}
    unmapped = []
    for name, tensor in tensors.items():
        parsed = parse_name(name)
        if parsed is None:
            unmapped.append(name)
        elif parsed[1] in layers.setdefault(parsed[0], {}):
            raise UserError(f"{subject} holds the {parsed[1]} of {parsed[0]} twice, under other names ({name}).")
        else:
            layers[parsed[0]][parsed[1]] = tensor
    if unmapped and (foreign := describe_foreign(tensors)):
        raise UserError(f"{subject} holds {foreign}")
    if not tensors:
        raise UserError(f"{subject} holds no tensors.")
    if unmapped:
        names = ", ".join(unmapped[:_MAX_NAMES]) + (" and others" if len(unmapped) > _MAX_NAMES else "")
        raise UserError(f"{subject}: {len(unmapped)} of {len(tensors)} tensors fit no layer of CogVideoX: {names}.")
    for layer, parts in layers.items():
        if missing := [part for part in ("A", "B") if part not in parts]:
            raise UserError(f"{subject} lacks the {missing[0]} of {layer}; is it complete?")
        a, b = parts["A"].shape, parts["B"].shape
        if len(a) != 2 or len(b) != 2:
            raise UserError(f"{subject}: A {list(a)} and B {list(b)} of {layer} are no matrices of a linear layer.")
        if a[0] != b[1] or a[0] == 0:
            raise UserError(f"{subject}: A {list(a)} and B {list(b)} of {layer} have no common rank.")
        if "alpha" in parts and math.prod(parts["alpha"].shape) != 1:
            raise UserError(f"{subject}: the alpha of {layer} is not a single number.")
    return layers


def _strengths(file: Path, metadata: Mapping[str, str], flag: str) -> Callable[[str, int], float | None]:
    """Returns a function: layer, rank -> strength that the file states for layers without an alpha of their own.

    It is in the metadata of diffusers or kohya's sd-scripts, or in peft's `adapter_config.json` beside the file.
    """
    source = file.with_name(_PEFT_CONFIG)
    try:
        if METADATA_KEY in metadata:
            stored = json.loads(metadata[METADATA_KEY])
            config = {name.removeprefix("transformer."): value for name, value in stored.items()}
        elif source.is_file():
            config = json.loads(source.read_text())
        else:
            stated = metadata.get("ss_network_alpha", "")
            # tools that merge or resize write Dynamic; the layers then have alphas of their own
            config = {"lora_alpha": float(stated)} if re.fullmatch(r"[\d.]+(e-?\d+)?|nan|inf", stated) else {}
        alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
        re.compile("|".join(patterns))
        if not isinstance(alpha, int | float | None) or not all(isinstance(x, int | float) for x in patterns.values()):
            raise ValueError("alpha is no number")
    except (OSError, ValueError, AttributeError, TypeError, re.error) as error:
        reason = (unreadable(source) if source.is_file() else None) or f"its adapter config cannot be read ({error})"
        raise UserError(f"{flag} {file}: {reason}.") from error

    def strength(layer: str, rank: int) -> float | None:
        stated = patterns.get(get_pattern_key(list(patterns), layer), alpha)
        return None if stated is None else stated / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return strength

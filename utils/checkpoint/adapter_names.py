"""Names of the tensors in LoRA files of other tools, and of files that hold something else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from utils.checkpoint.layer_names import to_diffusers

Part = Literal["A", "B", "alpha"]

_PREFIX = (
    r"(?:base_model\.model\.|model\.|diffusion_model\.|transformer\.|unet\.|lora_unet_+|lora_transformer_|lycoris_)*"
)
# What follows the name of the layer: diffusers, peft (with the adapter's name) and kohya; old diffusers; SAT, with the
# number of the part; the strength of a layer.
_SUFFIX = (
    r"(?:\.lora_(?P<new>A|B|down|up)(?:\.\w+)?\.weight"
    r"|[._]lora\.(?P<old>down|up)\.weight"
    r"|\.matrix_(?P<sat>[AB])\.(?P<number>\d+)"
    r"|\.(?P<alpha>alpha))"
)
_NAME = re.compile(rf"{_PREFIX}(?P<layer>.+?){_SUFFIX}")
_SAT_ADAPTER = re.compile(r"\.matrix_[AB]\.\d+$")
_PARTS: dict[str, Part] = {"A": "A", "B": "B", "down": "A", "up": "B", "alpha": "alpha"}

# Part of the name of a tensor of an adapter, in any format.
_ADAPTER = re.compile(r"lora|lokr|hada|oft_|vera_|ia3|\.alpha$|\.diff(_b)?$|\.matrix_[AB]|dora_scale")

_OTHER_MODEL = "Give a LoRA of CogVideoX."
_OTHER_KIND = "Such adapters are not supported."
# Pattern in a tensor's name -> what the file holds, and what to do. The first match counts: a LoRA of another model may
# be in any format.
FOREIGN_FILES = (
    (
        r"^((model\.)?diffusion_model\.)?(transformer\.)?"
        r"(transformer_blocks\.\d+\.attn1\.to_q|blocks\.\d+\.q|layers\.\d+\.attention\.query_key_value)\.weight$",
        "a whole transformer",
        "It is no LoRA; cli_demo.py takes a transformer in the format of diffusers or ComfyUI as --transformer_path.",
    ),
    (r"(double|single)(_transformer)?_blocks[._]", "adapters of Flux or HunyuanVideo", _OTHER_MODEL),
    (r"(down|up|input|output|middle)_blocks?[._]", "adapters of Stable Diffusion", _OTHER_MODEL),
    (r"^(text_encoders?|lora_te\d?)[._]", "adapters of a text encoder", "CogVideoX is trained without them."),
    (r"layers[._]\d+[._]self_attn", "adapters of a language model", _OTHER_MODEL),
    (r"[._]\d+[._](self|cross)_attn|^transformer\.blocks\.", "adapters of Wan", _OTHER_MODEL),
    (r"transformer_blocks[._]\d+[._]attn2?[._]", "adapters of another model, such as SD3 or LTX-Video", _OTHER_MODEL),
    (r"lokr_|hada_|oft_|lora_mid|^lycoris_|\.diff(_b)?$", "LyCORIS adapters, such as LoKr, LoHa or OFT", _OTHER_KIND),
    (r"lora_magnitude_vector|dora_scale", "DoRA adapters", _OTHER_KIND),
)


def parse_name(name: str) -> tuple[str, Part] | None:
    """Returns the layer of an adapter's tensor, under diffusers' name, and its part; None if it fits no layer.

    Formats: diffusers, old and new; peft; ComfyUI; kohya's sd-scripts; CogVideo's SAT code.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    number = match["number"]
    layer = to_diffusers(match["layer"] + (f".{number}" if number else ""))
    part = match["new"] or match["old"] or match["sat"] or match["alpha"]
    return None if layer is None else (layer, _PARTS[part])


def sat_adapters(names: Iterable[str]) -> list[str]:
    """Returns the names of adapters of CogVideo's SAT code. Such a file also holds the frozen base."""
    return [name for name in names if _SAT_ADAPTER.search(name)]


def describe_foreign(names: Iterable[str]) -> str | None:
    """Returns what a file with tensors of these names holds, and what to do; None if no pattern matches."""
    names = list(names)
    if names and not any(map(_ADAPTER.search, names)) and not re.search(FOREIGN_FILES[0][0], "\n".join(names), re.M):
        return f"no adapters, but other weights ({names[0]}). {_OTHER_MODEL}"
    for pattern, content, remedy in FOREIGN_FILES:
        if name := next((name for name in names if re.search(pattern, name)), None):
            return f"{content} ({name}). {remedy}"
    return None

"""Names of the transformer's layers in diffusers, ComfyUI and CogVideo's SAT code.

| diffusers | ComfyUI | SAT |
|---|---|---|
| `transformer_blocks.0.attn1.to_q` | `blocks.0.q` | `transformer.layers.0.attention.query_key_value`, part 0 of 3 |

ComfyUI's names are those of its `comfy/ldm/cogvideo/model.py`, SAT's those of CogVideo's
`tools/export_sat_lora_weight.py`.
"""

from __future__ import annotations

import re

# Layers of a block with another name in ComfyUI. All others of a block (norm1.linear, norm2.norm...) have the same.
_COMFYUI_IN_BLOCKS = {
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "attn_out",
    "attn1.norm_q": "norm_q",
    "attn1.norm_k": "norm_k",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
}
# Layers outside the blocks with another name in ComfyUI. The others are patch_embed, norm_final, norm_out, proj_out.
_COMFYUI_OUTSIDE = {
    f"{name}_embedding.linear_{number}": f"{name}_embedding_linear_{number}"
    for name in ("time", "ofs")
    for number in (1, 2)
}
_SAT = {
    "attention.query_key_value.0": "attn1.to_q",
    "attention.query_key_value.1": "attn1.to_k",
    "attention.query_key_value.2": "attn1.to_v",
    "attention.dense.0": "attn1.to_out.0",
}
# Linear layers, which can have adapters.
_LINEAR_IN_BLOCKS = (
    *("norm1.linear", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    *("norm2.linear", "ff.net.0.proj", "ff.net.2"),
)
_LINEAR_OUTSIDE = (
    *("patch_embed.proj", "patch_embed.text_proj", *_COMFYUI_OUTSIDE),
    *("norm_out.linear", "proj_out"),
)


def to_comfyui(layer: str) -> str:
    """Returns ComfyUI's name of a layer or weight.

    Args:
        layer: its name in diffusers, such as `transformer_blocks.0.attn1.to_q` or `proj_out.bias`.
    """
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
    names, prefix, rest = (
        (_COMFYUI_IN_BLOCKS, f"blocks.{match[1]}.", match[2]) if match else (_COMFYUI_OUTSIDE, "", layer)
    )
    for name, comfyui in names.items():
        if rest == name or rest.startswith(f"{name}."):
            return prefix + comfyui + rest.removeprefix(name)
    return prefix + rest


def _spellings() -> dict[str, dict[str, str]]:
    """Returns list of blocks -> name of a layer of the block, with underscores -> diffusers' name. "" is no block."""
    old_diffusers = {f"attn1.processor.to_{name}": f"attn1.to_{name}" for name in ("q", "k", "v")}
    old_diffusers["attn1.processor.to_out"] = "attn1.to_out.0"
    names = {
        "transformer_blocks": {name: name for name in _LINEAR_IN_BLOCKS} | old_diffusers,
        "blocks": {_COMFYUI_IN_BLOCKS.get(name, name): name for name in _LINEAR_IN_BLOCKS},
        "layers": _SAT,
        "": {name: name for name in _LINEAR_OUTSIDE},
    }
    return {blocks: {name.replace(".", "_"): layer for name, layer in table.items()} for blocks, table in names.items()}


_SPELLINGS = _spellings()


def to_diffusers(layer: str) -> str | None:
    """Returns diffusers' name of a linear layer; None if no such layer is known.

    Args:
        layer: its name in diffusers, ComfyUI or SAT, where underscores may stand for dots. SAT's name of a part of a
            fused layer ends with the part's number.
    """
    text = layer.replace(".", "_")
    match = re.fullmatch(r"(transformer_blocks|blocks|layers)_(\d+)_(.+)", text)
    if match is None:
        return _SPELLINGS[""].get(text)
    name = _SPELLINGS[match[1]].get(match[3])
    return None if name is None else f"transformer_blocks.{match[2]}.{name}"

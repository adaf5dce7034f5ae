"""Reads files for ComfyUI as ComfyUI does: with its names of the layers and the rule W + B A, and nothing else.

Independent of `utils.checkpoint`. The names are those of ComfyUI's `comfy/ldm/cogvideo/model.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

# ComfyUI's module -> the module of diffusers that computes the same
BLOCK = {
    "q": "attn1.to_q",
    "k": "attn1.to_k",
    "v": "attn1.to_v",
    "attn_out": "attn1.to_out.0",
    "norm_q": "attn1.norm_q",
    "norm_k": "attn1.norm_k",
    "ff_proj": "ff.net.0.proj",
    "ff_out": "ff.net.2",
    "norm1.linear": "norm1.linear",
    "norm1.norm": "norm1.norm",
    "norm2.linear": "norm2.linear",
    "norm2.norm": "norm2.norm",
}
OUTSIDE = {
    "time_embedding_linear_1": "time_embedding.linear_1",
    "time_embedding_linear_2": "time_embedding.linear_2",
    "ofs_embedding_linear_1": "ofs_embedding.linear_1",
    "ofs_embedding_linear_2": "ofs_embedding.linear_2",
    "patch_embed.proj": "patch_embed.proj",
    "patch_embed.text_proj": "patch_embed.text_proj",
    "norm_final": "norm_final",
    "norm_out.linear": "norm_out.linear",
    "norm_out.norm": "norm_out.norm",
    "proj_out": "proj_out",
}


def modules(transformer: CogVideoXTransformer3DModel) -> dict[str, torch.nn.Module]:
    """Returns ComfyUI's name -> module."""
    found = dict(transformer.named_modules())
    names = {comfyui: name for comfyui, name in OUTSIDE.items() if name in found}
    for number in range(len(transformer.transformer_blocks)):
        names |= {f"blocks.{number}.{key}": f"transformer_blocks.{number}.{name}" for key, name in BLOCK.items()}
    return {comfyui: found[name] for comfyui, name in names.items()}


def apply_lora(transformer: CogVideoXTransformer3DModel, file: Path) -> int:
    """Adds B A to the weights. Returns the number of layers; every tensor of the file is used."""
    tensors, layers = load_file(file), modules(transformer)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    for name in names:
        a, b = (tensors.pop(f"{name}.lora_{matrix}.weight") for matrix in "AB")
        layers[name.removeprefix("diffusion_model.")].get_parameter("weight").data.add_(b @ a)
    assert not tensors
    return len(names)


def load_transformer(file: Path, config: dict) -> CogVideoXTransformer3DModel:
    """Returns the transformer of a file; every tensor of the file is used, and every weight is in it."""
    transformer = CogVideoXTransformer3DModel.from_config(config)
    tensors = load_file(file)
    with torch.no_grad():
        for name, module in modules(transformer).items():
            for kind, parameter in module.named_parameters(recurse=False):
                parameter.copy_(tensors.pop(f"{name}.{kind}"))
        if "patch_embed.pos_embedding" in tensors:
            transformer.patch_embed.pos_embedding.copy_(tensors.pop("patch_embed.pos_embedding"))
    assert not tensors
    return transformer.eval()

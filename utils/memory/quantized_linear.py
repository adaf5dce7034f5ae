"""Linear layers with frozen weights in 8 or 4 bits, for the base model under LoRA.

Each forward and backward pass dequantizes the weight and frees it after the matrix product. This costs the memory
traffic of one weight matrix, which is small compared to a product with ten thousand tokens: with int4, 11 bytes per
weight in 5 kernels, and compiled 2.6 bytes in one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

# int4: number of consecutive weights of a row that share a scale and an offset.
GROUP = 64
FP8 = torch.float8_e4m3fn


def quantize_blocks(transformer: torch.nn.Module, scheme: str, device: torch.device | str | None = None) -> None:
    """Replaces the frozen linear layers of all blocks with `QuantizedLinear`, one at a time.

    Args:
        scheme: "int8", "fp8" or "int4".
        device: device of the codes; defaults to the device of the weights. The weights may be on the host.
    """
    for block in transformer.transformer_blocks:  # type: ignore[union-attr]
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is torch.nn.Linear and not layer.weight.requires_grad:
                    setattr(parent, name, QuantizedLinear(layer, scheme, device))


def encode(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantizes a weight [out, in].

    Returns:
        codes, scale and offset:
        int8, fp8: codes [out, in], float32 scale [out, 1], no offset;
        int4: two codes per byte, uint8 [out, in / 2]; bfloat16 scale and offset [out, groups, 1].
    """
    weight = weight.float()
    if scheme == "int4":
        groups = weight.unflatten(1, (-1, math.gcd(weight.shape[1], GROUP)))
        low, high = groups.aminmax(dim=2, keepdim=True)
        low = low.bfloat16()
        scale = ((high - low.float()) / 15).clamp(min=1e-8).bfloat16()
        codes = ((groups - low.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8).flatten(1)
        return codes[:, 0::2] | codes[:, 1::2] << 4, scale, low
    max_code = 127.0 if scheme == "int8" else torch.finfo(FP8).max
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / max_code
    scaled = weight / scale
    return (scaled.round().to(torch.int8) if scheme == "int8" else scaled.to(FP8)), scale, None


def decode(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Dequantizes codes to a weight [out, in] in `dtype`. Each value is rounded once, as in compiled blocks."""
    if offset is None:
        return codes.to(dtype).mul_(scale)  # computes in float32
    values = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1).to(dtype).unflatten(1, (scale.shape[1], -1))
    return torch.addcmul(offset.to(dtype), values, scale.to(dtype)).flatten(1)


class QuantizedLinear(torch.nn.Module):
    """A frozen linear layer, x [..., in] -> [..., out]. Computes in the dtype of autocast if enabled, else of x."""

    def __init__(self, layer: torch.nn.Linear, scheme: str, device: torch.device | str | None) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        codes, scale, offset = encode(layer.weight.detach().to(device or layer.weight.device), scheme)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(x.to(dtype), self.codes, self.scale, self.offset, bias)


class _Product(torch.autograd.Function):
    """x W^T + b. Saves the codes of W for the backward pass instead of W."""

    @staticmethod
    def forward(ctx: Any, x: Any, codes: Any, scale: Any, offset: Any, bias: Any) -> torch.Tensor:
        ctx.save_for_backward(codes, scale, offset)
        return functional.linear(x, decode(codes, scale, offset, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        codes, scale, offset = ctx.saved_tensors
        return grad @ decode(codes, scale, offset, grad.dtype), None, None, None, None

"""Counts the bytes that operations read from and write to GPU memory.

Each operation is counted as a kernel that reads its inputs once and writes its outputs once. The compiler fuses kernels
and keeps intermediate results in registers, which is not modelled, so compiled blocks move fewer bytes than counted.
Tiles that a kernel reads repeatedly are not modelled either: products and attention move more bytes.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")}
# Operations that do not read the tensor that they change.
OVERWRITING = {f"aten::{name}_" for name in ("copy", "fill", "zero", "normal", "uniform", "random")}


@cache
def moves_data(func: Any) -> bool:
    """Whether an operation is a kernel, not a view, an allocation or a query."""
    return func.namespace != "prim" and not func.is_view and "empty" not in func._schema.name


@cache
def operation_kind(func: Any) -> str:
    """Returns "products", "attention" or "other"."""
    if "scaled_dot_product" in func._schema.name:
        return "attention"
    return "products" if func._schema.name in PRODUCTS else "other"


def traffic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, host: torch.device) -> int:
    """Returns the bytes of an operation's inputs and outputs. Views and new uninitialized tensors have none.

    Args:
        host: device of tensors in host memory, which are not counted.
    """
    if not moves_data(func):
        return 0
    schema = func._schema
    read = _tensors((args, kwargs), host)
    storages = {tensor.untyped_storage()._cdata for tensor in read.values()}
    written = {
        key: tensor for key, tensor in _tensors(result, host).items() if tensor.untyped_storage()._cdata not in storages
    }
    if schema.is_mutable:
        values = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        # fused Adam writes gradients only to remove a loss scale, which has happened before
        changed = {argument.name for argument in schema.arguments if argument.is_write} - {"grads"}
        written |= _tensors([value for name, value in values.items() if name in changed], host)
        if schema.name in OVERWRITING:
            read = {key: tensor for key, tensor in read.items() if key not in written}
    elif not written:
        return 0
    return sum(map(_size, [*read.values(), *written.values()]))


def _tensors(values: Any, host: torch.device) -> dict[int, torch.Tensor]:
    """Returns the distinct tensors in GPU memory by identity."""
    return {id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.device != host}


def _size(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements; a dimension with stride 0 repeats the same ones."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.itemsize

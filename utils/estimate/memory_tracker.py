"""What a computation would take of a GPU's memory, and how much work it is, found without a GPU and without weights.

The computation runs on fake tensors, which have shapes, dtypes and storages but no data; the storages that are alive
are counted after every operation. All of autograd, checkpointing and optimizer are torch's own.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from utils.memory import pinned_memory

# Stands for host memory, which is counted apart.
ELSEWHERE = torch.device("meta")
# The CUDA caching allocator hands out blocks of so many bytes.
BLOCK = 512
# What torch's autocast computes in float32 on CUDA and leaves as it is on a CPU.
IN_FLOAT32 = ("layer_norm", "group_norm", "softmax")


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all storages that are alive.

    Attributes:
        now, peak: bytes now, and the most since `watch_peak`.
        gradients: those of them that were gradients, at the peak.
        host: the most bytes in host memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.gradients = self.host = self._on_host = 0
        self.peak = sys.maxsize
        self._parameters: list[torch.nn.Parameter] = []
        self._alive: set[int] = set()

    def watch_peak(self, parameters: Iterable[torch.nn.Parameter] = ()) -> None:
        """Forgets the peak; at the next one the gradients of these are looked at."""
        self.peak, self.gradients, self._parameters = self.now, 0, list(parameters)

    def add(self, tensor: torch.Tensor) -> None:
        storage, is_on_host = tensor.untyped_storage(), tensor.device == ELSEWHERE
        key = storage._cdata
        if key not in self._alive:
            self._alive.add(key)
            self._count(storage_size(tensor), is_on_host)
            weakref.finalize(storage, self._drop, key, storage_size(tensor), is_on_host)

    def _count(self, bytes_: int, is_on_host: bool) -> None:
        if is_on_host:
            self._on_host += bytes_
            self.host = max(self.host, self._on_host)
        else:
            self.now += bytes_

    def _drop(self, key: int, bytes_: int, is_on_host: bool) -> None:
        self._alive.discard(key)
        self._count(-bytes_, is_on_host)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        if self.now > self.peak:
            gc.collect()  # cycles keep recomputed tensors alive here; on a GPU an allocation that fails frees them
            if self.now > self.peak:
                self.peak = self.now
                self.gradients = sum(storage_size(p.grad) for p in self._parameters if p.grad is not None)
        return result


def storage_size(tensor: torch.Tensor) -> int:
    """Bytes that a tensor's storage takes of the GPU."""
    return -(-tensor.untyped_storage().nbytes() // BLOCK) * BLOCK


@contextmanager
def simulate() -> Iterator[MemoryTracker]:
    """Within the block every new tensor is fake, and counted."""
    live = MemoryTracker()
    gc.collect()
    gc.freeze()  # what was there before need not be looked through at every new peak
    try:
        sent = patch.object(pinned_memory, "HOST", ELSEWHERE)
        with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast(), sent, live:
            yield live
    finally:
        gc.unfreeze()


def give_fake_weights(module: torch.nn.Module, recurse: bool = True) -> None:
    """Puts fake tensors in place of those on the meta device. Is to be called within `simulate`."""
    for part in module.modules() if recurse else [module]:
        for name, weight in list(part._parameters.items()):
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype)
                part._parameters[name] = torch.nn.Parameter(fake, weight.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def take_weights(module: torch.nn.Module) -> None:
    """Puts a module's own weights, not those of its parts, back on the meta device."""
    for name, weight in list(module._parameters.items()):
        if weight is not None:
            module._parameters[name] = torch.nn.Parameter(weight.to("meta"), weight.requires_grad)


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Autocast on the CPU computes in the dtypes that autocast on CUDA would."""
    functional = torch.nn.functional

    def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) else x, (args, kwargs))
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        # not by a torch function mode, which is off where checkpointing recomputes
        for name in IN_FLOAT32:
            stack.enter_context(patch.object(functional, name, in_float32(getattr(functional, name))))
        yield


def flop_counter() -> FlopCounterMode:
    """Counts floating-point operations, two a multiplication with addition; attention of the CPU too."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward_flops(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    return FlopCounterMode(display=False, custom_mapping={attention: forward_flops, backward: backward_flops})

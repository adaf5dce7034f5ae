"""Measures the GPU memory and the work of a computation without a GPU and without weights.

The computation runs on fake tensors, which have shapes, dtypes and storages but no data. All live storages are counted
after every operation. Autograd, checkpointing and optimizers run unchanged.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from utils.estimate.memory_traffic import operation_kind, traffic
from utils.memory import pinned_memory

# Device of tensors in host memory, which is counted separately from GPU memory.
HOST_PLACEHOLDER = torch.device("meta")
# The CUDA caching allocator rounds each allocation up to a multiple of this many bytes.
ALLOCATION_UNIT = 512
# Functions that autocast runs in float32 on CUDA, but not on a CPU.
AUTOCAST_FLOAT32 = ("layer_norm", "group_norm", "softmax")


def _attention_flop(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flop(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# Operation -> function that returns its floating-point operations. torch has none for attention on a CPU.
FLOP_FORMULAS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all live storages.

    Attributes:
        now: current bytes of GPU memory.
        peak: maximum of `now` since `watch_peak`.
        gradients: bytes of gradients at the peak.
        host: maximum bytes of host memory.
        flop: floating-point operations since `restart_counts`; a multiply-add counts as two.
        traffic: bytes read and written since `restart_counts`, by kind of operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.gradients = self.host = self._on_host = self.flop = 0
        self.peak = sys.maxsize
        self.traffic: Counter[str] = Counter()
        self._parameters: list[torch.nn.Parameter] = []
        self._alive: set[int] = set()

    def watch_peak(self, parameters: Iterable[torch.nn.Parameter] = ()) -> None:
        """Restarts the search for the peak. At each new peak, the gradients of `parameters` are counted."""
        gc.collect()
        self._parameters = list(parameters)
        self._note_peak()

    def restart_counts(self) -> None:
        """Sets `flop` and `traffic` to zero."""
        self.traffic.clear()
        self.flop = 0

    def _note_peak(self) -> None:
        self.peak = self.now
        self.gradients = sum(storage_size(p.grad) for p in self._parameters if p.grad is not None)

    def add(self, tensor: torch.Tensor) -> None:
        """Counts the storage of a tensor until it is freed; a storage that is already counted is ignored."""
        storage, is_on_host = tensor.untyped_storage(), tensor.device == HOST_PLACEHOLDER
        key = storage._cdata
        if key not in self._alive:
            self._alive.add(key)
            self._count(storage_size(tensor), is_on_host)
            weakref.finalize(storage, self._drop, key, storage_size(tensor), is_on_host)

    def _count(self, num_bytes: int, is_on_host: bool) -> None:
        if is_on_host:
            self._on_host += num_bytes
            self.host = max(self.host, self._on_host)
        else:
            self.now += num_bytes

    def _drop(self, key: int, num_bytes: int, is_on_host: bool) -> None:
        self._alive.discard(key)
        self._count(-num_bytes, is_on_host)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.traffic[operation_kind(func)] += traffic(func, args, kwargs or {}, result, HOST_PLACEHOLDER)
        if formula := FLOP_FORMULAS.get(func._overloadpacket):
            self.flop += formula(*args, **kwargs or {}, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        if self.now > self.peak:
            # reference cycles keep recomputed tensors alive; on a GPU, a failed allocation would free them
            gc.collect()
            if self.now > self.peak:
                self._note_peak()
        return result


def storage_size(tensor: torch.Tensor) -> int:
    """Returns the bytes that the allocator reserves for a tensor's storage."""
    return -(-tensor.untyped_storage().nbytes() // ALLOCATION_UNIT) * ALLOCATION_UNIT


@contextmanager
def simulate() -> Iterator[MemoryTracker]:
    """Makes every new tensor in the block a fake tensor, and yields the tracker that counts them."""
    tracker = MemoryTracker()
    gc.freeze()  # the collection at each new peak skips objects that exist already
    try:
        host_memory = patch.object(pinned_memory, "HOST", HOST_PLACEHOLDER)
        with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast(), cuda_foreach(), host_memory, tracker:
            yield tracker
    finally:
        gc.unfreeze()


def give_fake_weights(module: torch.nn.Module) -> None:
    """Replaces weights and buffers on the meta device with fake tensors. Call it within `simulate`."""
    for submodule in module.modules():
        for name, weight in list(submodule._parameters.items()):
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype)
                submodule._parameters[name] = torch.nn.Parameter(fake, weight.requires_grad)
        for name, buffer in list(submodule._buffers.items()):
            if buffer is not None:
                submodule._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    gc.freeze()  # the collection at each new peak skips the weights


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Makes autocast on the CPU use the dtypes of autocast on CUDA."""
    functional = torch.nn.functional

    def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) else x, (args, kwargs))
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        # patched, because a torch function mode is inactive while checkpointing recomputes
        for name in AUTOCAST_FLOAT32:
            stack.enter_context(patch.object(functional, name, in_float32(getattr(functional, name))))
        yield


@contextmanager
def cuda_foreach() -> Iterator[None]:
    """Makes optimizers and clipping choose the implementations that they choose by default for CUDA tensors."""
    devices = [*_foreach_utils._get_foreach_kernels_supported_devices(), "cpu"]
    types = [*_foreach_utils._foreach_supported_types, FakeTensor]
    with (
        patch.object(optimizer, "_get_foreach_kernels_supported_devices", lambda: devices),
        patch.object(optimizer, "_foreach_supported_types", types),
        patch.object(_foreach_utils, "_foreach_supported_types", types),
    ):
        yield

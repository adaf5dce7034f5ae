"""What a transformer block keeps from the forward pass for the backward pass, and where it is kept.

Gradient checkpointing keeps a block's inputs and computes everything else anew (arXiv:1604.06174). Of that, attention
is most of the work and its outputs are a small part of the memory, so they may be kept too (selective checkpointing,
arXiv:2205.05198, section 5). What is kept may wait in host memory. None of it changes a single number.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from utils import host
from utils.host import SideStream

aten = torch.ops.aten
# What F.scaled_dot_product_attention becomes; its unfused form is no single operation, and is computed anew.
ATTENTION = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)
# The smallest tensors that are sent to host memory, in bytes: below, copying costs more than it saves.
SMALLEST = 2**20
# Copies under way: tensors that are leaving while the next block computes, and that come back before they are needed.
LEAVING, AHEAD = 2, 4


def checkpoint_blocks(transformer: CogVideoXTransformer3DModel, keep_attention: bool, offload: bool) -> None:
    """Makes each block keep its inputs alone.

    Args:
        keep_attention: and the outputs of its attention.
        offload: let all of that wait in host memory.
    """
    memory = HostMemory() if offload else None

    def run(block: torch.nn.Module, *inputs: Any) -> Any:
        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            if not keep_attention:
                return nullcontext(), nullcontext()
            kept: deque[Any] = deque()
            return KeepAttention(kept, memory), ReuseAttention(kept, memory)

        # of the block only its inputs go through these hooks; checkpointing has its own for all that is inside
        elsewhere = torch.autograd.graph.saved_tensors_hooks(memory.send, memory.fetch) if memory else nullcontext()
        with elsewhere:
            return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)

    transformer.enable_gradient_checkpointing(run)


class KeepAttention(TorchDispatchMode):
    """In the forward pass: puts what attention returns aside."""

    def __init__(self, kept: deque[Any], memory: HostMemory | None) -> None:
        super().__init__()
        self.kept, self.memory = kept, memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func in ATTENTION:
            # without the graph that autograd is about to hang on them
            aside = tree_map_only(torch.Tensor, torch.Tensor.detach, result)
            self.kept.append(tree_map_only(torch.Tensor, self.memory.send, aside) if self.memory else aside)
        return result


class ReuseAttention(TorchDispatchMode):
    """In the backward pass: gives it back in place of computing it."""

    def __init__(self, kept: deque[Any], memory: HostMemory | None) -> None:
        super().__init__()
        self.kept, self.memory = kept, memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ATTENTION:
            return func(*args, **kwargs or {})
        kept = self.kept.popleft()
        return tree_map_only(Parked, self.memory.fetch, kept) if self.memory else kept


class Parked:
    """A tensor that waits in host memory.

    Attributes:
        here: the tensor on its device, before it has left and after it has come back.
        copied: when it has left, or has come back.
    """

    def __init__(self, tensor: torch.Tensor, away: torch.Tensor, index: int) -> None:
        self.here: torch.Tensor | None = tensor
        self.away, self.index, self.device = away, index, tensor.device
        self.copied: torch.cuda.Event | None = None


class HostMemory:
    """Sends tensors to host memory and fetches them, beside the computation.

    They are fetched in the reverse order of sending, as a backward pass needs them, and some ahead of being asked for.
    """

    def __init__(self) -> None:
        self.order: list[weakref.ref[Parked]] = []
        self.leaving: deque[Parked] = deque()
        self.copies = SideStream()

    def send(self, tensor: torch.Tensor) -> Parked | torch.Tensor:
        if tensor.nbytes < SMALLEST:
            return tensor
        while self.order and self.order[-1]() is None:  # of a backward pass that is over
            self.order.pop()
        parked = Parked(tensor, host.empty_like(tensor), len(self.order))
        parked.copied = self.copies.copy(tensor, parked.away)
        self.order.append(weakref.ref(parked))
        self.leaving.append(parked)
        if len(self.leaving) > LEAVING:
            gone = self.leaving.popleft()
            self.copies.wait(gone.copied)
            gone.here = None
        return parked

    def fetch(self, parked: Parked | torch.Tensor) -> torch.Tensor:
        if isinstance(parked, torch.Tensor):
            return parked
        for index in range(parked.index, max(parked.index - AHEAD, -1), -1):
            wanted = self.order[index]()
            if wanted is not None and wanted.here is None:
                wanted.here = torch.empty(wanted.away.shape, dtype=wanted.away.dtype, device=wanted.device)
                wanted.copied = self.copies.copy(wanted.away, wanted.here)
        if parked in self.leaving:
            self.leaving.remove(parked)
        self.copies.wait(parked.copied)
        tensor, parked.here = parked.here, None
        assert tensor is not None
        return tensor

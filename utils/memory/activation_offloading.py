"""Moves saved activations to host memory during the forward pass and back before the backward pass needs them."""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from utils.memory import pinned_memory
from utils.memory.pinned_memory import CopyStream

# Tensors below this size stay on the device: copying them costs more time than it saves memory.
MIN_OFFLOAD_BYTES = 2**20
# Copies to the host that may be in flight. The device memory of a tensor is freed once this many newer ones follow it.
MAX_PENDING_OFFLOADS = 2


class OffloadedTensor:
    """A tensor that has a copy in host memory.

    Attributes:
        on_device: the tensor on its device, until its offload is done and from its prefetch to its fetch; else None.
        on_host: the copy in host memory.
        block: position of its block in the order of the forward passes.
        copy_event: end of the latest copy, in either direction; None if the copy was synchronous.
        was_fetched: whether `ActivationOffloader.fetch` has returned it.
    """

    def __init__(self, tensor: torch.Tensor, on_host: torch.Tensor, block: int) -> None:
        self.on_device: torch.Tensor | None = tensor
        self.on_host, self.block, self.device, self.stride = on_host, block, tensor.device, tensor.stride()
        self.copy_event: torch.cuda.Event | None = None
        self.was_fetched = False


class ActivationOffloader:
    """Offloads tensors to host memory and fetches them, concurrently with the computation.

    A backward pass needs the blocks in reverse order. The first fetch from a block therefore also prefetches the rest
    of the block and all tensors of the block before it.
    """

    def __init__(self) -> None:
        self.blocks: list[list[tuple[weakref.ref[OffloadedTensor], torch.Tensor, Any]]] = []
        self.arena = pinned_memory.PinnedArena()
        # Host buffers free for reuse, by layout. All copies run on one stream, so a copy out of a buffer has finished
        # before the next copy into it starts.
        self.free_buffers: defaultdict[Any, list[torch.Tensor]] = defaultdict(list)
        self.pending: deque[OffloadedTensor] = deque()
        self.copies = CopyStream()

    def saved_tensors_hooks(self, block: torch.nn.Module, inputs: tuple[Any, ...]) -> AbstractContextManager:
        """Returns a context that offloads the tensors which autograd saves. Call it once per forward pass of a block.

        Two groups of tensors stay, because the device holds them anyway: weights and buffers of the block, which a
        compiled block saves too, and inputs inside a tuple, which all blocks share.
        """
        shared = tree_leaves([value for value in inputs if not isinstance(value, torch.Tensor)])
        stays = {
            storage_id(tensor) for tensor in (*block.parameters(), *block.buffers(), *shared) if tensor is not None
        }

        def pack(tensor: torch.Tensor) -> OffloadedTensor | torch.Tensor:
            return tensor if storage_id(tensor) in stays else self.offload(tensor)

        while self.blocks and all(reference() is None for reference, _, _ in self.blocks[-1]):
            for _, on_host, layout in self.blocks.pop():  # from a finished backward pass
                self.free_buffers[layout].append(on_host)
        self.blocks.append([])
        return torch.autograd.graph.saved_tensors_hooks(pack, self.fetch)

    def offload(self, tensor: torch.Tensor) -> OffloadedTensor | torch.Tensor:
        """Starts copying a tensor of the current block to host memory.

        Returns the tensor itself if it is below `MIN_OFFLOAD_BYTES`.
        """
        if tensor.nbytes < MIN_OFFLOAD_BYTES:
            return tensor
        layout = tensor.shape, tensor.stride(), tensor.dtype
        free = self.free_buffers[layout]
        offloaded = OffloadedTensor(tensor, free.pop() if free else self.arena.empty_like(tensor), len(self.blocks) - 1)
        offloaded.copy_event = self.copies.copy(tensor, offloaded.on_host)
        self.blocks[-1].append((weakref.ref(offloaded), offloaded.on_host, layout))
        self.pending.append(offloaded)
        if len(self.pending) > MAX_PENDING_OFFLOADS:
            oldest = self.pending.popleft()
            self.copies.wait(oldest.copy_event)
            oldest.on_device = None
        return offloaded

    def fetch(self, offloaded: OffloadedTensor | torch.Tensor) -> torch.Tensor:
        """Returns the tensor on its device and prefetches the rest of its block and the block before."""
        if isinstance(offloaded, torch.Tensor):
            return offloaded
        nearest = self.blocks[max(offloaded.block - 1, 0) : offloaded.block + 1]
        for candidate in (reference() for block in reversed(nearest) for reference, _, _ in block):
            if (
                candidate is not None
                and candidate.on_device is None
                and (candidate is offloaded or not candidate.was_fetched)
            ):
                # a compiled backward pass requires the original strides
                candidate.on_device = torch.empty_strided(
                    candidate.on_host.shape, candidate.stride, dtype=candidate.on_host.dtype, device=candidate.device
                )
                candidate.copy_event = self.copies.copy(candidate.on_host, candidate.on_device)
        if offloaded in self.pending:
            self.pending.remove(offloaded)
        self.copies.wait(offloaded.copy_event)
        tensor, offloaded.on_device, offloaded.was_fetched = offloaded.on_device, None, True
        assert tensor is not None
        return tensor


def storage_id(tensor: torch.Tensor) -> int:
    """Storage identity of a tensor; works for fake tensors too."""
    return tensor.untyped_storage()._cdata

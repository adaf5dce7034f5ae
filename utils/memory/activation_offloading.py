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

# The smallest tensors that are sent to host memory, in bytes: below, copying costs more than it saves.
MIN_OFFLOAD_BYTES = 2**20


# Copies under way: tensors that are leaving while the next block computes, and that come back before they are needed.
MAX_PENDING_OFFLOADS, PREFETCH_DISTANCE = 2, 4


class OffloadedTensor:
    """A tensor that waits in host memory.

    Attributes:
        here: the tensor on its device, before it has left and after it has come back.
        copied: when it has left, or has come back.
        was_fetched: whether it has been asked for.
    """

    def __init__(self, tensor: torch.Tensor, away: torch.Tensor, index: int) -> None:
        self.here: torch.Tensor | None = tensor
        self.away, self.index, self.device, self.stride = away, index, tensor.device, tensor.stride()
        self.copied: torch.cuda.Event | None = None
        self.was_fetched = False


class ActivationOffloader:
    """Sends tensors to host memory and fetches them, beside the computation.

    They are fetched in the reverse order of sending, as a backward pass needs them, and some ahead of being asked for.
    """

    def __init__(self) -> None:
        self.order: list[tuple[weakref.ref[OffloadedTensor], torch.Tensor, Any]] = []
        self.arena = pinned_memory.PinnedArena()
        # Memory of tensors that are no longer needed. All copies are on one stream, so that one that still reads it
        # is over when the next writes.
        self.spare: defaultdict[Any, list[torch.Tensor]] = defaultdict(list)
        self.leaving: deque[OffloadedTensor] = deque()
        self.copies = CopyStream()

    def of_block(self, block: torch.nn.Module, inputs: tuple[Any, ...]) -> AbstractContextManager:
        """Sends what autograd keeps within, but for what is on the device anyway.

        That is the block's weights, which a compiled block keeps too, and what all blocks share: inputs in a tuple.
        """
        shared = tree_leaves([value for value in inputs if not isinstance(value, torch.Tensor)])
        stays = {
            storage_id(tensor) for tensor in (*block.parameters(), *block.buffers(), *shared) if tensor is not None
        }

        def send(tensor: torch.Tensor) -> OffloadedTensor | torch.Tensor:
            return tensor if storage_id(tensor) in stays else self.send(tensor)

        return torch.autograd.graph.saved_tensors_hooks(send, self.fetch)

    def send(self, tensor: torch.Tensor) -> OffloadedTensor | torch.Tensor:
        if tensor.nbytes < MIN_OFFLOAD_BYTES:
            return tensor
        while self.order and self.order[-1][0]() is None:  # of a backward pass that is over
            _, away, layout = self.order.pop()
            self.spare[layout].append(away)
        layout = tensor.shape, tensor.stride(), tensor.dtype
        spare = self.spare[layout]
        offloaded = OffloadedTensor(tensor, spare.pop() if spare else self.arena.empty_like(tensor), len(self.order))
        offloaded.copied = self.copies.copy(tensor, offloaded.away)
        self.order.append((weakref.ref(offloaded), offloaded.away, layout))
        self.leaving.append(offloaded)
        if len(self.leaving) > MAX_PENDING_OFFLOADS:
            left = self.leaving.popleft()
            self.copies.wait(left.copied)
            left.here = None
        return offloaded

    def fetch(self, offloaded: OffloadedTensor | torch.Tensor) -> torch.Tensor:
        if isinstance(offloaded, torch.Tensor):
            return offloaded
        for index in range(offloaded.index, max(offloaded.index - PREFETCH_DISTANCE, -1), -1):
            candidate = self.order[index][0]()
            if (
                candidate is not None
                and candidate.here is None
                and (candidate is offloaded or not candidate.was_fetched)
            ):
                # with the strides it had, on which a compiled backward pass insists
                candidate.here = torch.empty_strided(
                    candidate.away.shape, candidate.stride, dtype=candidate.away.dtype, device=candidate.device
                )
                candidate.copied = self.copies.copy(candidate.away, candidate.here)
        if offloaded in self.leaving:
            self.leaving.remove(offloaded)
        self.copies.wait(offloaded.copied)
        tensor, offloaded.here, offloaded.was_fetched = offloaded.here, None, True
        assert tensor is not None
        return tensor


def storage_id(tensor: torch.Tensor) -> int:
    """Names the memory that a tensor is in, a fake one's too."""
    return tensor.untyped_storage()._cdata

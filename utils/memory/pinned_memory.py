"""Pinned host memory and asynchronous copies between GPU and host."""

from __future__ import annotations

import torch

# Memory prediction replaces this device in order to count host memory separately.
HOST = torch.device("cpu")
# Pinned memory is allocated in chunks of this size.
CHUNK_BYTES = 2**30
# Tensors in a chunk start at multiples of this many bytes.
ALIGNMENT = 512


class PinnedArena:
    """Allocates pinned host memory for copies of GPU tensors. Copies are asynchronous only from and to pinned memory.

    Allocations are packed into chunks; PyTorch's own pinned allocator would round each one up to a power of two. A
    chunk is freed with the last of its tensors.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty_like(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns an uninitialized host tensor with the same strides; pinned if the tensor is on CUDA."""
        if not tensor.is_cuda:
            return torch.empty_like(tensor, dtype=dtype, device=HOST)
        stride = torch.empty_like(tensor, device="meta").stride()
        return self.allocate(tensor.numel(), dtype or tensor.dtype).as_strided(tensor.shape, stride)

    def allocate(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns an uninitialized tensor (count,)."""
        size = count * dtype.itemsize
        if self._used + size > len(self._chunk):
            self._chunk = torch.empty(max(CHUNK_BYTES, size), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            self._used = 0
        values = self._chunk[self._used : self._used + size].view(dtype)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return values


class CopyStream:
    """Copies tensors on a CUDA stream of its own; copies are synchronous without a GPU.

    Call `wait` before freeing the source or reading the target of a copy. Only later GPU work waits, not the CPU.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event | None:
        """Starts a copy and returns the event of its end, or None if the copy is already done."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream())  # until the source is written and the target is unused
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, copy_event: torch.cuda.Event | None) -> None:
        """Makes the current stream wait for a copy."""
        if copy_event is not None:
            torch.cuda.current_stream().wait_event(copy_event)

    def wait_on_host(self, copy_event: torch.cuda.Event | None) -> None:
        """Blocks the CPU until a copy is done, so that it may read the target."""
        if copy_event is not None:
            copy_event.synchronize()

    def synchronize(self) -> None:
        """Blocks the CPU until all copies are done, so that it may read their targets."""
        if self.stream is not None:
            self.stream.synchronize()

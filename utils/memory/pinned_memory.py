"""Copies between a GPU and host memory, beside the computation."""

from __future__ import annotations

import torch

# A prediction puts another device here, whose bytes it counts apart.
HOST = torch.device("cpu")


# Page-locked memory is had from the system in pieces of so many bytes.
CHUNK_BYTES = 2**30
# Tensors in it begin at multiples of so many bytes.
ALIGNMENT = 512


class PinnedArena:
    """Host memory for tensors of a GPU, page-locked, as it has to be to copy beside other work.

    They lie one behind the other; torch would give each a power of two of bytes. All are given back together.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty_like(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """In the order of dimensions in which the tensor lies on its device; ordinary memory where that is the host."""
        if not tensor.is_cuda:
            return torch.empty_like(tensor, dtype=dtype, device=HOST)
        stride = torch.empty_like(tensor, device="meta").stride()
        return self.take(tensor.numel(), dtype or tensor.dtype).as_strided(tensor.shape, stride)

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """The next so many values."""
        size = count * dtype.itemsize
        if self._used + size > len(self._chunk):
            self._chunk = torch.empty(max(CHUNK_BYTES, size), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            self._used = 0
        values = self._chunk[self._used : self._used + size].view(dtype)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return values


class CopyStream:
    """Copies on a stream of its own; on a CPU they are done when they return.

    Whoever gives up a tensor that is copied, or uses one that is copied to, calls `wait` first: the GPU's work that
    comes later then waits for the copy, and the CPU, which is ahead of it, does not.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event | None:
        """Returns what tells that it is done."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream())  # the source is written, the target no longer read
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)

    def synchronize(self) -> None:
        """Waits until the host may read what was copied to it."""
        if self.stream is not None:
            self.stream.synchronize()

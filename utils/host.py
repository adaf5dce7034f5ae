"""Copies between a GPU and host memory, beside the computation."""

from __future__ import annotations

import torch

# A prediction puts another device here, whose bytes it counts apart.
HOST = torch.device("cpu")


def empty_like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Host memory for a tensor; page-locked where a GPU copies to it, as it has to be to copy beside other work."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=HOST, pin_memory=tensor.is_cuda)


class SideStream:
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

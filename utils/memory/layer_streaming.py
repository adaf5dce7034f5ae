"""Weights in host memory, copied to the device one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import torch

from utils.memory.pinned_memory import CopyStream


def stream_weights(layers: Iterable[torch.nn.Module], device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the weights of each layer on the device, by name, for `torch.func.functional_call`.

    Weights are valid until the next ones are requested. The next layer is copied while the current one computes, so the
    device holds two layers. The weights pass through pinned memory that PyTorch reuses, so the processes of a machine
    can share weights that are memory-mapped.
    """
    copies = CopyStream()
    current: dict[str, torch.Tensor] = {}
    current_event = None
    for layer in chain(layers, [torch.nn.Module()]):
        # A copy starts once the computation with earlier layers is done, so their memory may be reused.
        upcoming, event = {}, None
        for name, weight in layer.named_parameters():
            upcoming[name] = torch.empty_like(weight, device=device)
            event = copies.copy(weight.pin_memory() if device.type == "cuda" else weight, upcoming[name])
        if current:
            copies.wait(current_event)
            yield current
            current.clear()  # the caller still refers to it
        current, current_event = upcoming, event

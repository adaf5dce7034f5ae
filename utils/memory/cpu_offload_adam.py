"""Adam in host memory, for full fine-tuning on one GPU without DeepSpeed.

The GPU has the weights in the training's precision and nothing else of them: each gradient leaves as soon as the
backward pass has made it. Float32 weights, gradients and both of Adam's states, 16 bytes a weight, are on the host, as
under ZeRO-Offload (arXiv:2101.06840), and the update is torch's own, for the CPU.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from utils.memory import pinned_memory
from utils.memory.pinned_memory import CopyStream

# Gradients that may be on their way at a time.
MAX_PENDING_OFFLOADS = 2


class CPUOffloadAdam(torch.optim.Adam):
    """torch's Adam on float32 copies of weights that are on a GPU.

    Its parameters are these copies, `masters`. They have the gradients when a backward pass returns, so that clipping
    works on them as on any others; the weights themselves have none. Several backward passes before an update add up.
    """

    def __init__(self, weights: list[torch.nn.Parameter], **settings: Any) -> None:
        self.weights = weights
        self.masters = []
        masters, gradients = (
            pinned_memory.PinnedArena(),
            pinned_memory.PinnedArena(),
        )  # apart, since a checkpoint holds only the first
        for weight in weights:
            master = torch.nn.Parameter(masters.empty_like(weight, torch.float32))
            master.data.copy_(weight.data)
            master.grad = gradients.empty_like(weight, torch.float32)
            self.masters.append(master)
        super().__init__(self.masters, **settings, fused=True)
        self._step_supports_amp_scaling = False  # an update that overflows in fp16 is not begun, so that it is noticed
        self._copies, self._leaving = CopyStream(), deque[tuple[torch.Tensor, Any]]()
        self._has_gradient: set[int] = set()
        self._is_in_backward = False
        for index, weight in enumerate(weights):
            weight.register_post_accumulate_grad_hook(lambda weight, index=index: self._take(weight, index))

    def _take(self, weight: torch.Tensor, index: int) -> None:
        """Moves a gradient that has just been made to the host."""
        if not self._is_in_backward:
            self._is_in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)  # type: ignore[attr-defined]
        assert weight.grad is not None
        gradient, target = weight.grad.float(), self.masters[index].grad
        weight.grad = None
        assert target is not None
        if index in self._has_gradient:
            target.add_(gradient.to(pinned_memory.HOST))
            return
        self._has_gradient.add(index)
        self._leaving.append((gradient, self._copies.copy(gradient, target)))
        if len(self._leaving) > MAX_PENDING_OFFLOADS:
            self._copies.wait(self._leaving.popleft()[1])

    def _end_backward(self) -> None:
        self._copies.synchronize()
        self._leaving.clear()
        self._is_in_backward = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master.to(weight.device, non_blocking=True))  # as float32, for it is the GPU that converts
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The next backward pass overwrites; the memory stays."""
        self._has_gradient.clear()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"masters": [master.data for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "masters"})
        for weight, master, stored in zip(self.weights, self.masters, state_dict["masters"], strict=True):
            master.copy_(stored)
            weight.copy_(master)

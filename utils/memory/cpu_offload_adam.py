"""Adam in host memory, for full fine-tuning on one GPU without DeepSpeed.

The GPU holds only the weights, in the training precision. Each gradient moves to the host as soon as the backward pass
has computed it. The host holds float32 weights, gradients and both Adam states, 16 bytes per weight, as in ZeRO-Offload
(arXiv:2101.06840). The update is PyTorch's own Adam on the CPU.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from utils.memory import pinned_memory
from utils.memory.pinned_memory import CopyStream

# Copies of gradients to the host that may be in flight.
MAX_PENDING_OFFLOADS = 2


class CPUOffloadAdam(torch.optim.Adam):
    """torch.optim.Adam on float32 host copies of GPU weights.

    The parameters of the optimizer are these copies, `masters`. After a backward pass they hold the gradients, so the
    usual gradient clipping applies; the gradients of the GPU weights are None. Gradients of several backward passes
    before an update are summed.

    Args:
        weights: the trained parameters on the GPU.
        settings: arguments of torch.optim.Adam, such as `lr` and `decoupled_weight_decay`.
    """

    def __init__(self, weights: list[torch.nn.Parameter], **settings: Any) -> None:
        self.weights = weights
        self.masters = []
        # separate arenas: saving a tensor saves its whole storage, and a checkpoint holds only the masters
        masters, gradients = pinned_memory.PinnedArena(), pinned_memory.PinnedArena()
        for weight in weights:
            master = torch.nn.Parameter(masters.empty_like(weight, torch.float32))
            master.data.copy_(weight.data)
            master.grad = gradients.empty_like(weight, torch.float32)
            self.masters.append(master)
        super().__init__(self.masters, **settings, fused=True)
        # GradScaler then does not call `step` if fp16 gradients overflow, so that the loop can detect a skipped update
        self._step_supports_amp_scaling = False
        self._copies, self._pending = CopyStream(), deque[tuple[torch.Tensor, Any]]()
        self._has_gradient: set[int] = set()
        self._is_in_backward = False
        for index, weight in enumerate(weights):
            weight.register_post_accumulate_grad_hook(lambda weight, index=index: self._offload_gradient(weight, index))

    def _offload_gradient(self, weight: torch.Tensor, index: int) -> None:
        """Moves a newly accumulated gradient to the host."""
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
        self._pending.append((gradient, self._copies.copy(gradient, target)))
        if len(self._pending) > MAX_PENDING_OFFLOADS:
            self._copies.wait(self._pending.popleft()[1])

    def _end_backward(self) -> None:
        self._copies.synchronize()
        self._pending.clear()
        self._is_in_backward = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master.to(weight.device, non_blocking=True))  # transfers float32; the GPU casts
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Lets the next backward pass overwrite the gradients. Their memory stays allocated."""
        self._has_gradient.clear()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"masters": [master.data for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "masters"})
        for weight, master, stored in zip(self.weights, self.masters, state_dict["masters"], strict=True):
            master.copy_(stored)
            weight.copy_(master)

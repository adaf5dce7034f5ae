"""Adam in host memory, for full fine-tuning on one GPU without DeepSpeed.

The GPU holds only the weights, in the training precision. Each gradient moves to the host as soon as the backward pass
has computed it. The host holds float32 weights, both Adam states and a staging buffer, 14 bytes per half-precision
weight, as in ZeRO-Offload (arXiv:2101.06840). The update is PyTorch's fused Adam on the CPU.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from utils.memory.pinned_memory import CopyStream, PinnedArena

# Copies of gradients to the host that may be in flight.
MAX_PENDING_OFFLOADS = 2
# Number of weights that are updated at a time. While the CPU updates a chunk, the GPU receives the one before. The
# gradients of a chunk in float32 stay in the CPU's cache.
CHUNK = 2**20


class CPUOffloadAdam(torch.optim.Adam):
    """torch.optim.Adam on float32 host copies of GPU weights.

    The parameters of the optimizer are these copies, `masters`. Gradients go through the optimizer's own buffers, so
    `grad` is None for both; gradients of several backward passes before an update are summed. `clip` replaces
    torch.nn.utils.clip_grad_norm_.

    Args:
        weights: the trained parameters on the GPU.
        settings: arguments of torch.optim.Adam, such as `lr` and `decoupled_weight_decay`.
    """

    def __init__(self, weights: list[torch.nn.Parameter], **settings: Any) -> None:
        self.weights = weights
        # separate arenas: saving a tensor saves its whole storage, and a checkpoint holds only the masters
        masters, staging = PinnedArena(), PinnedArena()
        self.masters = [torch.nn.Parameter(masters.empty_like(weight, torch.float32)) for weight in weights]
        for weight, master in zip(weights, self.masters, strict=True):
            master.data.copy_(weight.data)
        super().__init__(self.masters, **settings, fused=True)
        # GradScaler then does not call `step` if fp16 gradients overflow, so that the loop can detect a skipped update
        self._step_supports_amp_scaling = False
        # A gradient arrives in the dtype of its weight. The updated weight leaves from the same memory.
        self._staging = [staging.empty_like(weight) for weight in weights]
        self._sums: dict[int, torch.Tensor] = {}  # float32 gradients of earlier backward passes
        self._num_arrived = [0] * len(weights)  # gradients per weight since the last update
        self._norms: dict[int, torch.Tensor] = {}
        self._factor: torch.Tensor | float = 1.0
        self._copies, self._pending = CopyStream(), deque[tuple[torch.Tensor, Any]]()
        self._arrivals: dict[int, Any] = {}  # events of the last copies of gradients
        for index, weight in enumerate(weights):
            weight.register_post_accumulate_grad_hook(lambda weight, index=index: self._offload_gradient(weight, index))

    def _offload_gradient(self, weight: torch.Tensor, index: int) -> None:
        """Moves a new gradient to the host. Its norm is computed on the GPU."""
        gradient = weight.grad
        assert gradient is not None
        weight.grad = None
        if self._num_arrived[index]:
            self._add_to_sum(index)
        else:
            self._norms[index] = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self._num_arrived[index] += 1
        self._arrivals[index] = self._copies.copy(gradient, self._staging[index])
        self._pending.append((gradient, self._arrivals[index]))
        if len(self._pending) > MAX_PENDING_OFFLOADS:
            self._copies.wait(self._pending.popleft()[1])

    def _add_to_sum(self, index: int) -> None:
        """Makes room in the staging buffer for the gradient of another backward pass."""
        self._copies.wait_on_host(self._arrivals[index])
        self._norms.pop(index, None)
        if index not in self._sums:
            self._sums[index] = torch.empty_like(self.masters[index])
        if self._num_arrived[index] == 1:
            self._sums[index].copy_(self._staging[index])
        else:
            self._sums[index].add_(self._staging[index])

    def _finish_copies(self) -> None:
        self._copies.synchronize()
        self._pending.clear()

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """Returns the norm of the gradients, which may carry a loss scale."""
        summed = [index for index, count in enumerate(self._num_arrived) if count > 1 and index not in self._norms]
        if summed:
            self._finish_copies()
        for index in summed:
            norm = torch.linalg.vector_norm(self._sums[index] + self._staging[index])
            self._norms[index] = norm.to(self.weights[index].device)
        return torch.linalg.vector_norm(torch.stack([self._norms[index] for index in sorted(self._norms)]))

    @torch.no_grad()
    def clip(self, max_norm: float, scale: float) -> torch.Tensor:
        """Sets the factor by which the next `step` clips and unscales the gradients.

        Args:
            max_norm: maximum norm of the unscaled gradients.
            scale: loss scale that the gradients contain.

        Returns:
            the norm of the unscaled gradients before clipping.
        """
        norm = self.norm() / scale
        self._factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) / scale  # as in torch.nn.utils.clip_grad_norm_
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self._finish_copies()
        factor, self._factor = float(self._factor), 1.0
        gradients = torch.empty(CHUNK)
        copy_event = None
        for index, count in enumerate(self._num_arrived):
            if count:
                copy_event = self._update(index, gradients, factor)
        self._copies.wait(copy_event)

    def _update(self, index: int, gradients: torch.Tensor, factor: float) -> Any:
        """Updates a weight; returns the event of its copy to the GPU.

        Args:
            gradients: float32 (CHUNK,), temporary memory.
        """
        master, group = self.masters[index], self.param_groups[0]
        state, (beta1, beta2) = self.state[master], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        state["step"] += 1
        update = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        copy_event = None
        for start in range(0, master.numel(), CHUNK):
            value, mean, square, staging, weight = (
                tensor.view(-1)[start : start + CHUNK]
                for tensor in (master, state["exp_avg"], state["exp_avg_sq"], self._staging[index], self.weights[index])
            )
            gradient = gradients[: len(value)].copy_(staging)
            if self._num_arrived[index] > 1:
                gradient.add_(self._sums[index].view(-1)[start : start + CHUNK])
            update(
                [value],
                [gradient.mul_(factor)],
                [mean],
                [square],
                [],
                [state["step"]],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            copy_event = self._copies.copy(staging.copy_(value), weight)
        return copy_event

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Lets the next backward pass overwrite the gradients. Their memory stays allocated."""
        self._num_arrived = [0] * len(self.weights)
        self._norms.clear()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"masters": [master.data for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies a state dict, whose tensors may be memory-mapped. The base class would keep them."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for index, (weight, master) in enumerate(zip(self.weights, self.masters, strict=True)):
            master.copy_(state_dict["masters"][index])
            weight.copy_(master)
            self.state[master] = {name: value.clone() for name, value in state_dict["state"].get(index, {}).items()}

"""Adam with 8-bit or 4-bit states, and without float32 copies of half-precision weights.

An update is bound by memory traffic. Operation by operation, it moves 314 bytes per weight with 8 bits and 417 with 4
bits, in about 50 kernels. Compiled, it moves 18 and 27 bytes in 2 and 4 kernels, random numbers included.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from utils.common.seeds import ROUNDING, seed_for
from utils.memory.low_bit_states import (
    BLOCK,
    ROUNDED_BITS,
    Codebook,
    Moment,
    encode,
    make_codebook,
    rounding_noise,
    stochastic_round,
)

# Number of weights that are updated at a time; bounds the temporary memory of an update.
CHUNK = 2**23
# Smaller tensors keep float32 states. So do tensors whose size is not a multiple of BLOCK.
MIN_QUANTIZED_SIZE = 4096


def update_piece(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    mean: Moment,
    square: Moment,
    noise: torch.Tensor | None,
    codebooks: tuple[Codebook, Codebook],
    factor: torch.Tensor,
    coefficients: torch.Tensor,
    decoupled_weight_decay: bool,
) -> None:
    """Updates a piece of a weight and its moments in place. Weight and gradient have the shape of the moments.

    Each operation rounds once, because fused ones such as `lerp` round differently when they are compiled.

    Args:
        noise: random numbers for `stochastic_round`, if the weight is in half precision.
        factor: scalar that multiplies the gradient.
        coefficients: float32 (7,), from `LowBitAdam._coefficients`.
    """
    decay, mean_share, square_decay, square_share, correction, eps, rate = coefficients.unbind()
    value, gradient = weight.float(), gradient.float() * factor
    if decoupled_weight_decay:
        value = value * decay
    else:
        gradient = gradient + value * decay
    new_mean = mean.read(codebooks[0])
    new_mean.add_((gradient - new_mean).mul_(mean_share))
    new_square = square.read(codebooks[1]).mul_(square_decay).add_((gradient * gradient).mul_(square_share))
    del gradient
    mean.write(new_mean, codebooks[0])
    square.write(new_square, codebooks[1])
    divisor = new_square.sqrt_().div_(correction).add_(eps)
    value = torch.addcdiv(value, new_mean.mul_(rate), divisor)
    weight.copy_(value if noise is None else stochastic_round(value, weight.dtype, noise))


class LowBitAdam(torch.optim.Optimizer):
    """Adam for weights in float32 or half precision.

    Args:
        mean_bits: bits of the first moment, 8 or 4. The second moment always has 8.
        decoupled_weight_decay: AdamW.
        seed: seed of stochastic rounding. Results are the same on every process and after resuming.
        in_backward: update each weight during the backward pass as soon as its gradient is computed, then free the
            gradient. `step` does nothing, and gradients cannot be clipped or accumulated.
        compiled: compile the update, which then takes one kernel in place of fifty. On a CPU, the states have equal
            bits, and the weights differ by the rounding of the square root, which is exact only in compiled code. On a
            GPU, all results differ by float32 rounding: the compiler fuses multiplications with additions.
    """

    def __init__(
        self,
        weights: list[torch.nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        mean_bits: int,
        decoupled_weight_decay: bool,
        seed: int,
        in_backward: bool,
        compiled: bool,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(weights, settings | {"decoupled_weight_decay": decoupled_weight_decay})
        self.mean_bits, self.seed, self.in_backward = mean_bits, seed, in_backward
        self._update_piece = torch.compile(update_piece) if compiled else update_piece
        self._index: dict[torch.Tensor, int] = {weight: index for index, weight in enumerate(weights)}
        # Codebooks of the first and second moment, built lazily on the weights' device. A module-level cache would leak
        # fake tensors from memory prediction into a real run.
        self._codebooks: tuple[Codebook, Codebook] | None = None
        self._norms: list[torch.Tensor] = []
        self._factor: torch.Tensor | None = None
        self._latest: tuple[list[float], torch.Tensor] = [], torch.empty(0)
        if in_backward:
            for weight in weights:
                weight.register_post_accumulate_grad_hook(self._update_in_backward)

    def _update_in_backward(self, weight: torch.Tensor) -> None:
        self._norms.append(_norm(weight))
        self._update(weight)
        weight.grad = None

    @torch.no_grad()
    def clip(self, max_norm: float, scale: float) -> torch.Tensor:
        """Sets the factor by which the next `step` clips and unscales the gradients.

        The stored gradients do not change: in fp16, small ones would underflow if divided by the loss scale.

        Args:
            max_norm: maximum norm of the unscaled gradients; must be infinite with `in_backward`.
            scale: loss scale that the gradients contain.

        Returns:
            the norm of the unscaled gradients before clipping, including gradients that were already released.
        """
        norms = (
            self._norms if self.in_backward else [_norm(weight) for weight in self._index if weight.grad is not None]
        )
        norm, self._norms = torch.linalg.vector_norm(torch.stack(norms)) / scale, []
        if not self.in_backward:
            # as in torch.nn.utils.clip_grad_norm_
            self._factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) / scale
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not self.in_backward:  # otherwise done already; DDP may have put zeros in place of the gradients
            for weight in self._index:
                if weight.grad is not None:
                    self._update(weight)

    @torch.no_grad()
    def _update(self, weight: torch.Tensor) -> None:
        state, device = self.state[weight], weight.device
        assert weight.grad is not None
        step = state["step"] = state.get("step", 0) + 1
        generator = torch.Generator(device).manual_seed(
            seed_for(ROUNDING, self.seed, step * len(self._index) + self._index[weight])
        )
        if self._codebooks is None:
            self._codebooks = make_codebook(self.mean_bits, True, device), make_codebook(8, False, device)
        if self._factor is None:
            self._factor = torch.ones((), device=device)
        named_codebooks = dict(zip(("mean", "square"), self._codebooks, strict=True))
        if step == 1:
            for name, codebook in named_codebooks.items():
                state |= zero_state(name, weight, codebook)
        # `data`: a graph would depend on the shape of the weight that a view belongs to
        weights, gradients = weight.view(-1).data, weight.grad.reshape(-1).data
        for start in range(0, len(weights), CHUNK):
            mean, square = (view_moment(state, *named, start, generator) for named in named_codebooks.items())
            shape = (-1,) if mean.scale is None else (-1, BLOCK)
            value, gradient = (flat[start : start + CHUNK].view(shape) for flat in (weights, gradients))
            noise = rounding_noise(value, value.dtype, generator) if value.dtype in ROUNDED_BITS else None
            if self._update_piece is not update_piece:
                _share_graph(value, gradient, *mean, *square, noise)
            self._update_piece(
                value,
                gradient,
                mean,
                square,
                noise,
                self._codebooks,
                self._factor,
                self._coefficients(step, device),
                self.param_groups[0]["decoupled_weight_decay"],
            )
        torch.autograd.graph.increment_version(weight)  # a change of `data` is hidden from autograd's checks

    def _coefficients(self, step: int, device: torch.device) -> torch.Tensor:
        """Returns the coefficients of an update as a tensor, because compiled code is specialized on numbers."""
        group = self.param_groups[0]
        (beta1, beta2), rate, decay = group["betas"], group["lr"], group["weight_decay"]
        values = [
            1 - rate * decay if group["decoupled_weight_decay"] else decay,
            1 - beta1,
            beta2,
            1 - beta2,
            math.sqrt(1 - beta2**step),
            group["eps"],
            -rate / (1 - beta1**step),
        ]
        if values != self._latest[0]:  # all weights share the coefficients of an update
            self._latest = values, torch.tensor(values, device=device)
        return self._latest[1]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # the base class would cast all states to the dtype of the weights, on their device
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for index, weight in enumerate(self._index):
            if index in state_dict["state"]:
                self.state[weight] = {
                    name: value if name == "step" else value.to(weight.device, copy=True)
                    for name, value in state_dict["state"][index].items()
                }


def _norm(weight: torch.Tensor) -> torch.Tensor:
    """Float32 norm of the gradient."""
    assert weight.grad is not None
    return torch.linalg.vector_norm(weight.grad, dtype=torch.float32)


def zero_state(name: str, weight: torch.Tensor, codebook: Codebook) -> dict[str, torch.Tensor]:
    """Returns the state of one moment of a weight before its first update.

    Returns:
        `name`: uint8 codes (N * bits / 8,) and `name`_scale: float32 (N / BLOCK, 1); or `name`: float32 (N,), if the
        weight is below `MIN_QUANTIZED_SIZE`.
    """
    count, device = weight.numel(), weight.device
    if count < MIN_QUANTIZED_SIZE or count % BLOCK:
        return {name: torch.zeros(count, device=device)}
    zeros = torch.zeros(1, BLOCK, device=device)
    codes, scale = encode(zeros, codebook, noise=zeros)  # zero has a code of its own, so nothing is rounded
    rows = count // BLOCK
    return {name: codes.expand(rows, -1).flatten(), f"{name}_scale": scale.repeat(rows, 1)}


def view_moment(state: dict[str, Any], name: str, codebook: Codebook, start: int, generator: torch.Generator) -> Moment:
    """Returns the piece of a moment that belongs to the CHUNK weights from `start` on."""
    values, scale = state[name], state.get(f"{name}_scale")
    if scale is None:
        return Moment(values[start : start + CHUNK], None, None)
    rows = slice(start // BLOCK, (start + CHUNK) // BLOCK)
    values, scale = values.view(len(scale), -1)[rows], scale[rows]
    noise = None
    if codebook.bits == 4:
        noise = torch.rand(len(values), BLOCK, device=values.device, generator=generator)
    return Moment(values, scale, noise)


def _share_graph(*tensors: torch.Tensor | None) -> None:
    """Makes the compiler use one graph for any number of rows. It always compiles a single row separately."""
    for tensor in tensors:
        if tensor is not None and len(tensor) > 1:
            torch._dynamo.mark_dynamic(tensor, 0)

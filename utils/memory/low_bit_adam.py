"""Adam with 8-bit or 4-bit states, and without float32 copies of half-precision weights.

States are quantized in blocks with one scale each. The codes are dense near the largest value of a block; with 8 bits
they cover seven orders of magnitude (8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2). The
first moment works in 4 bits. The second moment needs 8, because the update divides by its root.

Rounding to nearest would lose updates of half-precision weights, and of a 4-bit first moment, that are smaller than
half the distance to the next value. Both use stochastic rounding, which is exact in expectation (arXiv:2010.06192,
section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from utils.common.seeds import ROUNDING, seed_for

# Number of values that share a scale.
BLOCK = 256
# Number of weights that are updated at a time; bounds the temporary memory of an update.
CHUNK = 2**23
# Smaller tensors keep float32 states. So do tensors whose size is not a multiple of BLOCK.
MIN_QUANTIZED_SIZE = 4096


@dataclass(frozen=True)
class Codebook:
    """The values that codes represent.

    Attributes:
        bits: 8 or 4.
        signed: whether the values cover (-1, 1] or [0, 1].
        values: float32 (2**bits,), ascending; the code is the index.
    """

    bits: int
    signed: bool
    values: torch.Tensor


def make_codebook(bits: int, signed: bool, device: torch.device) -> Codebook:
    """Builds a codebook whose values are spaced linearly within each decade.

    Each decade below 1 has half as many values as the decade above it.
    """
    values = [torch.ones(1)]
    for decade in range(bits - 1):
        count = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, count + 1)
        values.append(10.0 ** (decade - bits + 2) * (edges[1:] + edges[:-1]) / 2)
    positive = torch.cat(values)
    both = [-positive[1:], torch.zeros(1), positive] if signed else [torch.zeros(1), positive]
    return Codebook(bits, signed, torch.cat(both).sort().values.to(device))


def encode(values: torch.Tensor, codebook: Codebook, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes float32 (N,) to codes uint8 (N * bits / 8,) and scales float32 (N / BLOCK, 1).

    8 bits round to nearest, but never round a nonzero second moment to zero. 4 bits round stochastically.
    """
    blocks = values.view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    blocks, table = blocks / scale, codebook.values
    if codebook.bits == 8:
        codes = torch.bucketize(blocks, (table[1:] + table[:-1]) / 2, out_int32=True)
        if not codebook.signed:  # unsigned values are second moments, and the update divides by their root
            codes.clamp_min_(1)
        return codes.to(torch.uint8).flatten(), scale
    upper = torch.bucketize(blocks, table, out_int32=True).clamp_(1, len(table) - 1)
    below, above = table[upper - 1], table[upper]
    noise = torch.rand(blocks.shape, device=values.device, generator=generator)
    codes = (upper - (noise >= (blocks - below) / (above - below)).int()).to(torch.uint8).view(-1, 2)
    return codes[:, 0] | codes[:, 1] << 4, scale


def decode(codes: torch.Tensor, scale: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """Dequantizes codes to float32 (N,)."""
    if codebook.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=1)
    return (codebook.values[codes.int()].view(-1, BLOCK) * scale).flatten()


# Half-precision dtype -> number of mantissa bits to drop from float32, and the factor that maps the dtype's smallest
# normal number to that of float32, so that subnormal numbers round correctly too.
ROUNDED_BITS = {torch.bfloat16: (16, 1.0), torch.float16: (13, 2.0**-112)}


def stochastic_round(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Rounds float32 to one of the two nearest half-precision numbers at random; exact in expectation."""
    bits, factor = ROUNDED_BITS[dtype]
    noise = torch.randint(2**bits, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    scaled = values if factor == 1 else values * factor
    return noise.add_(scaled.view(torch.int32)).bitwise_and_(-(2**bits)).view(torch.float32).div_(factor).to(dtype)


class LowBitAdam(torch.optim.Optimizer):
    """Adam for weights in float32 or half precision.

    Args:
        mean_bits: bits of the first moment, 8 or 4. The second moment always has 8.
        decoupled_weight_decay: AdamW.
        seed: seed of stochastic rounding. Results are the same on every process and after resuming.
        in_backward: update each weight during the backward pass as soon as its gradient is computed, then free the
            gradient. `step` does nothing, and gradients cannot be clipped or accumulated.
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
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(weights, settings | {"decoupled_weight_decay": decoupled_weight_decay})
        self.mean_bits, self.seed, self.in_backward = mean_bits, seed, in_backward
        self._index: dict[torch.Tensor, int] = {weight: index for index, weight in enumerate(weights)}
        # Codebooks of the first and second moment, built lazily on the weights' device. A module-level cache would leak
        # fake tensors from memory prediction into a real run.
        self._codebooks: tuple[Codebook, Codebook] | None = None
        self._norms: list[torch.Tensor] = []
        self._factor: torch.Tensor | float = 1.0
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
        self._factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) / scale  # as in torch.nn.utils.clip_grad_norm_
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not self.in_backward:  # otherwise done already; DDP may have put zeros in place of the gradients
            for weight in self._index:
                if weight.grad is not None:
                    self._update(weight)

    @torch.no_grad()
    def _update(self, weight: torch.Tensor) -> None:
        group, state = self.param_groups[0], self.state[weight]
        assert weight.grad is not None
        state["step"] = state.get("step", 0) + 1
        step, (beta1, beta2), rate = state["step"], group["betas"], group["lr"]
        generator = torch.Generator(weight.device).manual_seed(
            seed_for(ROUNDING, self.seed, step * len(self._index) + self._index[weight])
        )
        if self._codebooks is None:
            self._codebooks = make_codebook(self.mean_bits, True, weight.device), make_codebook(8, False, weight.device)
        mean_state, square_state = (
            QuantizedState(state, name, codebook, generator)
            for name, codebook in zip(("mean", "square"), self._codebooks, strict=True)
        )
        if step == 1:
            for moment in (mean_state, square_state):
                moment.fill_with_zeros(weight)
        weights, gradients = weight.view(-1), weight.grad.reshape(-1)
        for start in range(0, len(weights), CHUNK):
            part = slice(start, start + CHUNK)
            value, gradient = weights[part].float(), gradients[part].float()
            if not self.in_backward:
                gradient = gradient * self._factor
            if group["decoupled_weight_decay"]:
                value = value * (1 - rate * group["weight_decay"])
            else:
                gradient = gradient + group["weight_decay"] * value
            mean = mean_state.read(part).lerp_(gradient, 1 - beta1)
            square = square_state.read(part).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            mean_state.write(part, mean)
            square_state.write(part, square)
            divisor = square.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
            value.addcdiv_(mean, divisor, value=-rate / (1 - beta1**step))
            weights[part] = stochastic_round(value, weight.dtype, generator) if weight.dtype in ROUNDED_BITS else value

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


@dataclass(frozen=True)
class QuantizedState:
    """One moment of a weight: codes with scales, or float32 if the weight is below `MIN_QUANTIZED_SIZE`.

    Attributes:
        state: the optimizer state of the weight; holds the tensors `name` and `name`_scale.
        name: "mean" or "square".
        codebook: codebook of this moment.
        generator: random numbers of stochastic rounding.
    """

    state: dict[str, Any]
    name: str
    codebook: Codebook
    generator: torch.Generator

    def fill_with_zeros(self, weight: torch.Tensor) -> None:
        """Allocates the state of a weight."""
        count, device = weight.numel(), weight.device
        if count < MIN_QUANTIZED_SIZE or count % BLOCK:
            self.state[self.name] = torch.zeros(count, device=device)
            return
        self.state[self.name] = torch.empty(count * self.codebook.bits // 8, dtype=torch.uint8, device=device)
        self.state[f"{self.name}_scale"] = torch.empty(count // BLOCK, 1, device=device)
        for start in range(0, count, CHUNK):
            part = slice(start, min(start + CHUNK, count))
            self.write(part, torch.zeros(part.stop - part.start, device=device))

    def read(self, part: slice) -> torch.Tensor:
        """Returns a slice of the state as a new float32 tensor. The slice starts at a multiple of BLOCK."""
        scale = self.state.get(f"{self.name}_scale")
        if scale is None:
            return self.state[self.name][part].clone()
        return decode(self.state[self.name][self._code_slice(part)], scale[self._scale_slice(part)], self.codebook)

    def write(self, part: slice, values: torch.Tensor) -> None:
        """Stores float32 values in a slice of the state."""
        scale = self.state.get(f"{self.name}_scale")
        if scale is None:
            self.state[self.name][part] = values
            return
        codes, scale[self._scale_slice(part)] = encode(values, self.codebook, self.generator)
        self.state[self.name][self._code_slice(part)] = codes

    def _code_slice(self, part: slice) -> slice:
        return slice(part.start * self.codebook.bits // 8, part.stop * self.codebook.bits // 8)

    def _scale_slice(self, part: slice) -> slice:
        return slice(part.start // BLOCK, part.stop // BLOCK)

"""Adam with states of few bits and, for full fine-tuning, weights of half precision alone.

States are held in blocks with a scale each, in codes that are fine near the largest of a block and reach, with 8 bits,
seven orders of magnitude below it (8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2). The mean
of the gradients can do with 4 bits; that of their squares, by whose root is divided, cannot. What is smaller than half
a step between two values would be lost by rounding to the nearest: an update of a weight in half precision, and what a
gradient adds to a mean of 4 bits. Both are rounded up or down at random, so that on average they are exact
(arXiv:2010.06192, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from utils.common.seeds import ROUNDING, seed_for

# Weights that share a scale, and weights worked on at a time, which bounds what the update needs beside the states.
BLOCK, CHUNK = 256, 2**23
# Tensors of fewer weights keep their states in float32, and so do those that do not divide into blocks.
SMALLEST = 4096


@dataclass(frozen=True)
class Codebook:
    """Codes of so many bits, and what they stand for: `values`, ascending, float32 from -1 or 0 to 1."""

    bits: int
    signed: bool
    values: torch.Tensor


def make_codebook(bits: int, signed: bool, device: torch.device) -> Codebook:
    """Each decade below 1 has half as many values as the one above, in the middles of equal parts of it."""
    values = [torch.ones(1)]
    for decade in range(bits - 1):
        count = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, count + 1)
        values.append(10.0 ** (decade - bits + 2) * (edges[1:] + edges[:-1]) / 2)
    positive = torch.cat(values)
    both = [-positive[1:], torch.zeros(1), positive] if signed else [torch.zeros(1), positive]
    return Codebook(bits, signed, torch.cat(both).sort().values.to(device))


def encode(values: torch.Tensor, codebook: Codebook, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 (N,) -> codes uint8 (N * bits / 8,) and scales float32 (N / BLOCK, 1).

    8 bits take the nearest value, but of squares not zero for what is not; 4 bits one of both neighbours, at random.
    """
    blocks = values.view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    blocks, table = blocks / scale, codebook.values
    if codebook.bits == 8:
        codes = torch.bucketize(blocks, (table[1:] + table[:-1]) / 2, out_int32=True)
        if not codebook.signed:  # under a root, as a divisor
            codes.clamp_min_(1)
        return codes.to(torch.uint8).flatten(), scale
    upper = torch.bucketize(blocks, table, out_int32=True).clamp_(1, len(table) - 1)
    below, above = table[upper - 1], table[upper]
    chance = torch.rand(blocks.shape, device=values.device, generator=generator)
    codes = (upper - (chance >= (blocks - below) / (above - below)).int()).to(torch.uint8).view(-1, 2)
    return codes[:, 0] | codes[:, 1] << 4, scale


def decode(codes: torch.Tensor, scale: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """The float32 values (N,) that codes stand for."""
    if codebook.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=1)
    return (codebook.values[codes.int()].view(-1, BLOCK) * scale).flatten()


# Half precision -> the bits of float32 that it lacks, and what makes its smallest normal number that of float32.
ROUNDED_BITS = {torch.bfloat16: (16, 1.0), torch.float16: (13, 2.0**-112)}


def stochastic_round(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Float32 -> half precision, to either neighbour, with the chances that make the mean exact."""
    bits, factor = ROUNDED_BITS[dtype]
    noise = torch.randint(2**bits, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    scaled = values if factor == 1 else values * factor
    return noise.add_(scaled.view(torch.int32)).bitwise_and_(-(2**bits)).view(torch.float32).div_(factor).to(dtype)


class LowBitAdam(torch.optim.Optimizer):
    """Adam for weights in float32 or half precision.

    Args:
        mean_bits: 8 or 4; the mean of the squares has 8.
        decoupled_weight_decay: AdamW.
        seed: of the rounding, which is the same on every process and after resuming.
        release: update each weight in the backward pass as soon as its gradient is there, and drop the gradient. `step`
            then has nothing left to do, and gradients can neither be clipped nor added up over several passes.
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
        # of mean and squares, once the weights are where they will be; not for longer than the optimizer, which may be
        # one of fake tensors
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
        """Lets `step` clip the gradients to a norm; returns the norm they have.

        The gradients stay as they are: in fp16, small ones that are divided by the loss scale would be lost.

        Args:
            max_norm: is infinite where gradients have been released, which are gone.
            scale: of the loss, by which the gradients are too large.
        """
        norms = (
            self._norms if self.in_backward else [_norm(weight) for weight in self._index if weight.grad is not None]
        )
        norm, self._norms = torch.linalg.vector_norm(torch.stack(norms)) / scale, []
        self._factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) / scale  # as torch.nn.utils.clip_grad_norm_
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not self.in_backward:  # else all is done; DDP puts zeros where the gradients were
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
        mean_slot, square_slot = (
            QuantizedState(state, name, codebook, generator)
            for name, codebook in zip(("mean", "square"), self._codebooks, strict=True)
        )
        if step == 1:
            for slot in (mean_slot, square_slot):
                slot.fill_with_zeros(weight)
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
            mean = mean_slot.read(part).lerp_(gradient, 1 - beta1)
            square = square_slot.read(part).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            mean_slot.write(part, mean)
            square_slot.write(part, square)
            divisor = square.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
            value.addcdiv_(mean, divisor, value=-rate / (1 - beta1**step))
            weights[part] = stochastic_round(value, weight.dtype, generator) if weight.dtype in ROUNDED_BITS else value

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # which casts the states to the dtype of the weights
        for index, weight in enumerate(self._index):
            if index in state_dict["state"]:
                self.state[weight] = {
                    name: value if name == "step" else value.to(weight.device, copy=True)
                    for name, value in state_dict["state"][index].items()
                }


def _norm(weight: torch.Tensor) -> torch.Tensor:
    """Float32, of the gradient."""
    assert weight.grad is not None
    return torch.linalg.vector_norm(weight.grad, dtype=torch.float32)


@dataclass(frozen=True)
class QuantizedState:
    """One of the two states of a weight: codes with their scales, or float32 where the weight is small."""

    state: dict[str, Any]
    name: str
    codebook: Codebook
    generator: torch.Generator

    def fill_with_zeros(self, weight: torch.Tensor) -> None:
        count, device = weight.numel(), weight.device
        if count < SMALLEST or count % BLOCK:
            self.state[self.name] = torch.zeros(count, device=device)
            return
        self.state[self.name] = torch.empty(count * self.codebook.bits // 8, dtype=torch.uint8, device=device)
        self.state[f"{self.name}_scale"] = torch.empty(count // BLOCK, 1, device=device)
        for start in range(0, count, CHUNK):
            part = slice(start, min(start + CHUNK, count))
            self.write(part, torch.zeros(part.stop - part.start, device=device))

    def read(self, part: slice) -> torch.Tensor:
        """A part of the state as float32, to be written to."""
        scale = self.state.get(f"{self.name}_scale")
        if scale is None:
            return self.state[self.name][part].clone()
        return decode(self.state[self.name][self._codebooks(part)], scale[self._scales(part)], self.codebook)

    def write(self, part: slice, values: torch.Tensor) -> None:
        scale = self.state.get(f"{self.name}_scale")
        if scale is None:
            self.state[self.name][part] = values
            return
        codes, scale[self._scales(part)] = encode(values, self.codebook, self.generator)
        self.state[self.name][self._codebooks(part)] = codes

    def _codebooks(self, part: slice) -> slice:
        return slice(part.start * self.codebook.bits // 8, part.stop * self.codebook.bits // 8)

    def _scales(self, part: slice) -> slice:
        return slice(part.start // BLOCK, part.stop // BLOCK)

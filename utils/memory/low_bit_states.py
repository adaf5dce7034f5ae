"""Optimizer states in 8 or 4 bits, and stochastic rounding.

States are quantized in blocks with one scale each. The codes are dense near the largest value of a block; with 8 bits
they cover seven orders of magnitude (8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2). The
first moment works in 4 bits. The second moment needs 8, because the update divides by its root.

Rounding to nearest would lose updates of half-precision weights, and of a 4-bit first moment, that are smaller than
half the distance to the next value. Both use stochastic rounding, which is exact in expectation (arXiv:2010.06192,
section 3). The random numbers are arguments, so that the functions can be compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

# Number of values that share a scale.
BLOCK = 256


@dataclass(frozen=True)
class Codebook:
    """The values that codes represent.

    Attributes:
        bits: 8 or 4.
        signed: whether the values cover (-1, 1] or [0, 1].
        values: float32 (2**bits,), ascending; the code is the index.
        boundaries: float32 (2**bits - 1,), midpoints of neighbouring values.
    """

    bits: int
    signed: bool
    values: torch.Tensor
    boundaries: torch.Tensor


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
    table = torch.cat(both).sort().values.to(device)
    return Codebook(bits, signed, table, (table[1:] + table[:-1]) / 2)


def encode(values: torch.Tensor, codebook: Codebook, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes float32 (rows, BLOCK) to codes uint8 (rows, BLOCK * bits / 8) and scales float32 (rows, 1).

    8 bits round to nearest, but never round a nonzero second moment to zero. 4 bits round stochastically, with noise
    (rows, BLOCK) in [0, 1).
    """
    scale = values.abs().amax(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    values, table = values / scale, codebook.values
    if codebook.bits == 8:
        codes = torch.bucketize(values, codebook.boundaries, out_int32=True)
        if not codebook.signed:  # unsigned values are second moments, and the update divides by their root
            codes.clamp_min_(1)
        return codes.to(torch.uint8), scale
    assert noise is not None
    upper = torch.bucketize(values, table, out_int32=True).clamp_(1, len(table) - 1)
    below, above = table[upper - 1], table[upper]
    codes = (upper - (noise >= (values - below) / (above - below)).int()).to(torch.uint8).unflatten(1, (-1, 2))
    return codes[..., 0] | codes[..., 1] << 4, scale


def decode(codes: torch.Tensor, scale: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """Dequantizes codes to float32 (rows, BLOCK)."""
    if codebook.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)
    return codebook.values[codes.int()] * scale


# Half-precision dtype -> number of mantissa bits to drop from float32, and the factor that maps the dtype's smallest
# normal number to that of float32, so that subnormal numbers round correctly too.
ROUNDED_BITS = {torch.bfloat16: (16, 1.0), torch.float16: (13, 2.0**-112)}


def rounding_noise(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Draws the random numbers with which `stochastic_round` rounds values of this shape."""
    high = 2 ** ROUNDED_BITS[dtype][0]
    return torch.randint(high, values.shape, dtype=torch.int32, device=values.device, generator=generator)


def stochastic_round(values: torch.Tensor, dtype: torch.dtype, noise: torch.Tensor) -> torch.Tensor:
    """Rounds float32 to one of the two nearest half-precision numbers at random; exact in expectation."""
    bits, factor = ROUNDED_BITS[dtype]
    scaled = values if factor == 1 else values * factor
    return (scaled.view(torch.int32) + noise).bitwise_and_(-(2**bits)).view(torch.float32).div_(factor).to(dtype)


class Moment(NamedTuple):
    """A piece of one moment of a weight, as views of the optimizer state.

    Attributes:
        values: codes uint8 (rows, BLOCK * bits / 8), or the moment itself in float32 (N,).
        scale: float32 (rows, 1) of codes; else None.
        noise: random numbers for `encode`, with 4 bits; else None.
    """

    values: torch.Tensor
    scale: torch.Tensor | None
    noise: torch.Tensor | None

    def read(self, codebook: Codebook) -> torch.Tensor:
        """Returns the moment in float32, as a new tensor."""
        return self.values.clone() if self.scale is None else decode(self.values, self.scale, codebook)

    def write(self, values: torch.Tensor, codebook: Codebook) -> None:
        """Stores float32 values."""
        if self.scale is None:
            self.values.copy_(values)
        else:
            codes, scale = encode(values, codebook, self.noise)
            self.values.copy_(codes)
            self.scale.copy_(scale)

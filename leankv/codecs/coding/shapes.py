"""Frequencies of integers as a scale and a shape each, in place of a table of counts.

The distributions are Student's t at whole numbers, `p(k) ~ (1 + (k / s)^2 / (2 m - 1))^(-m)`: from `m = 1`, where rare
values are frequent (Cauchy), to a large `m`, which is nearly a Gaussian. Both parameters stand on a grid, so two bytes
a coordinate say which one it is; the tables of all points are worked out once a process, where codes are written or
read.
"""

import functools

import torch
from jaxtyping import Float, Float64, UInt8

SHAPES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 16.0, 64.0)
"""`m`, halves at the finest: then sums, products, quotients and square roots do, which every processor rounds alike.
What was written with a table on one machine is read with the very same one on another."""

SCALES, LEAST_SCALE, RATIO = 256, 1 / 64, 1.03515625
"""Scales stand 3.5 % apart, from 0.016 (where `m` is 1, one value in 2,000 is not zero) to 105."""

LEAST = 2.0**-20
"""Least probability, before they are made to sum to 1, of a value; of all outside of a table, four times as much."""

OCTAVES, PARTS = 10, 4  # what lies outside is summed up to 2^10 times the table, each octave in so many steps


def fitted_shapes(
    frequencies: Float[torch.Tensor, "integers symbols"],
) -> tuple[UInt8[torch.Tensor, " integers"], UInt8[torch.Tensor, " integers"]]:
    """The likeliest scale and shape of each column, as their numbers on the grid.

    Args:
        frequencies: counts, as `leankv.codecs.coding.entropy.frequencies_of` gives them.
    """
    scale = torch.arange(SCALES).repeat(len(SHAPES)).to(torch.uint8)
    shape = torch.arange(len(SHAPES)).repeat_interleave(SCALES).to(torch.uint8)
    surprise = -probabilities(scale, shape, frequencies.shape[1] // 2 - 1).log().to(frequencies.device)
    best = (frequencies.double() @ surprise.T).argmin(dim=1).cpu()
    return scale[best], shape[best]


def probabilities(
    scale: UInt8[torch.Tensor, " integers"], shape: UInt8[torch.Tensor, " integers"], largest: int
) -> Float64[torch.Tensor, "integers {2*largest+2}"]:
    """Of the values -K to K (K is `largest`), and of all others together, in each column; on the CPU."""
    return _tables(largest)[shape.cpu().long() * SCALES + scale.cpu().long()]


@functools.lru_cache(maxsize=1)
def _tables(largest: int) -> Float64[torch.Tensor, "tables symbols"]:
    """Of every point of the grid, scale by scale: 2.6 MB for all codecs of a process, where K is 63."""
    scales = _scales().repeat(len(SHAPES))
    m = torch.tensor(SHAPES, dtype=torch.float64).repeat_interleave(SCALES)
    half = torch.stack([_density(torch.tensor(float(k)), scales, m) for k in range(largest + 1)], dim=1)
    tail = torch.zeros_like(scales)
    for step in range(OCTAVES * PARTS):
        octave, part = divmod(step, PARTS)
        width = (largest + 1) * 2**octave / PARTS
        middle = (largest + 1) * 2**octave + (part + 0.5) * width - 0.5
        tail += 2 * width * _density(torch.tensor(middle), scales, m)
    total = half[:, 0] + tail
    for k in range(1, largest + 1):  # in this order everywhere
        total += 2 * half[:, k]
    half, tail = (half / total[:, None]).clamp_min(LEAST), (tail / total).clamp_min(4 * LEAST)
    return torch.cat([half[:, 1:].flip(1), half, tail[:, None]], dim=1)


@functools.cache
def _scales() -> torch.Tensor:
    scales = [LEAST_SCALE]
    while len(scales) < SCALES:
        scales.append(scales[-1] * RATIO)
    return torch.tensor(scales, dtype=torch.float64)


def _density(k: torch.Tensor, scales: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """`(1 + (k / s)^2 / (2 m - 1))^(-m)` by products and square roots."""
    base = 1 + (k.double() / scales).square() / (2 * m - 1)
    power = torch.where(m % 1 == 0, torch.ones_like(base), base.sqrt())
    whole, square = m.long(), base
    while whole.any():
        power = torch.where(whole % 2 == 1, power * square, power)
        whole, square = whole // 2, square.square()
    return 1 / power

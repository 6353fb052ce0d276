"""Levels that scalar numbers are rounded to, by least squared error (Lloyd, 1957; Max, 1960)."""

import functools

import torch
from jaxtyping import Float, Float32, Int32

ITERATIONS = 200  # assumption: the error of a Gaussian at 5 bits is then 0.3 % above the least (Max, table I)


def lloyd_levels(
    values: Float[torch.Tensor, " n"], weights: Float[torch.Tensor, " n"], count: int
) -> Float32[torch.Tensor, " {count}"]:
    """The `count` levels that leave `sum weights (values - nearest level)^2` least, or nearly.

    k-means on a line: between two levels lies a threshold, so the sums over a cell are differences of running sums. The
    start is what suits a Gaussian (levels as dense as the cube root of the density: Panter and Dite, 1951).

    Args:
        values: the numbers.
        weights: not negative; where all are zero, the levels are some of the values.
        count: of levels.

    Returns:
        Rising levels; some may be equal.
    """
    values, order = values.double().sort()
    weights = weights.double()[order]
    start = torch.zeros(1, dtype=torch.float64, device=values.device)
    mass = torch.cat([start, weights.cumsum(0)])
    moment = torch.cat([start, (weights * values).cumsum(0)])
    places = (torch.arange(count, dtype=torch.float64, device=values.device) + 0.5) / count
    spread = torch.special.ndtr(3**0.5 * torch.special.ndtri(places))
    levels = values[torch.searchsorted(mass[1:], spread * mass[-1]).clamp_max(len(values) - 1)]
    for _ in range(ITERATIONS):
        edges = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        edges = torch.nn.functional.pad(edges, (1, 1))
        edges[-1] = len(values)
        own, total = mass[edges].diff(), moment[edges].diff()
        moved = torch.where(own > 0, total / own.clamp_min(1e-300), levels)
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels.float()


@functools.cache
def gaussian_levels(bits: int) -> Float32[torch.Tensor, " {2**bits}"]:
    """The `2^bits` levels for numbers of the standard normal distribution, on the CPU."""
    values = torch.linspace(-8, 8, 2**16 + 1, dtype=torch.float64)
    levels = lloyd_levels(values, torch.exp(-values.square() / 2), 2**bits)
    return (levels - levels.flip(0)) / 2  # symmetric, as the distribution is


def nearest_level(
    values: Float[torch.Tensor, "*any"], levels: Float[torch.Tensor, " levels"]
) -> Int32[torch.Tensor, "*any"]:
    """Index of the nearest of the rising `levels` to each value."""
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2, out_int32=True)

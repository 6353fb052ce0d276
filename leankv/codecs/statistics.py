"""Statistics of vectors that several families need, taken a piece at a time."""

import itertools

import torch
from jaxtyping import Float, Float32, Float64

ROWS = 2048  # vectors held in float32 at a time where statistics are summed, to bound memory


def mean_of(x: Float[torch.Tensor, "*sites tokens width"]) -> Float32[torch.Tensor, "*sites width"]:
    """Mean of vectors over the tokens, summed in float64."""
    pieces = ((rows.sum(dim=0, dtype=torch.float64) for rows in own.split(ROWS)) for own in _one_by_one(x))
    totals = torch.stack([torch.stack(list(own)).sum(dim=0) for own in pieces])
    return (totals / x.shape[-2]).float().reshape(*x.shape[:-2], x.shape[-1])


def sampled(x: Float[torch.Tensor, "tokens width"], count: int, seed: int) -> Float[torch.Tensor, "rows width"]:
    """`count` rows of vectors, or all where there are no more; drawn from anywhere in them."""
    if len(x) <= count:
        return x
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count].to(x.device)]


def sum_of_squares(
    x: Float[torch.Tensor, "*sites tokens width"], reference: Float[torch.Tensor, "..."]
) -> Float64[torch.Tensor, "*sites"]:
    """`sum |x - reference|^2` over the last two dimensions; `reference` may have to be expanded."""
    totals = []
    for own, its_reference in zip(_one_by_one(x), _one_by_one(reference.expand(x.shape)), strict=True):
        pieces = zip(own.split(ROWS), its_reference.split(ROWS), strict=True)
        squares = [(rows.float() - other.float()).square().sum(dtype=torch.float64) for rows, other in pieces]
        totals.append(torch.stack(squares).sum())
    return torch.stack(totals).reshape(x.shape[:-2])


def _one_by_one(x: torch.Tensor) -> list[torch.Tensor]:
    """Views `[N, W]` of `[..., N, W]`: sums over one at a time take no memory for all, and none depends on others."""
    return [x[index] for index in itertools.product(*map(range, x.shape[:-2]))]


def fraction_of_variance_unexplained(
    x: Float[torch.Tensor, "*sites tokens width"], reconstructed: Float[torch.Tensor, "*sites tokens width"]
) -> Float64[torch.Tensor, "*sites"]:
    """FVU of each site: `sum |x - x_hat|^2 / sum |x - mean(x)|^2`, one number for each leading index.

    0 is lossless; 1 is what storing nothing but the mean gives.

    Args:
        x: vectors.
        reconstructed: what decoding their codes gives.

    Returns:
        NaN where `x` does not vary at all.
    """
    return sum_of_squares(x, reconstructed) / sum_of_squares(x, mean_of(x).unsqueeze(-2))

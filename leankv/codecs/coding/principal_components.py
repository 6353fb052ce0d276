"""Principal components under an error metric: what `pca`, `transform` and others project on."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64

from leankv.codecs.statistics import ROWS, mean_of


@dataclass(frozen=True)
class Components:
    """Uncorrelated coordinates of vectors, in which the error metric is the plain squared error.

        y = (x - mean) analysis,        x = mean + y synthesis

    Attributes:
        mean: of the vectors.
        analysis: from centred vectors to coordinates.
        synthesis: the inverse of `analysis`.
        variances: of the coordinates, falling.
    """

    mean: Float32[torch.Tensor, " width"]
    analysis: Float32[torch.Tensor, "width width"]
    synthesis: Float32[torch.Tensor, "width width"]
    variances: Float64[torch.Tensor, " width"]


def principal_components(
    x: Float[torch.Tensor, "tokens width"], error_metric: Float[torch.Tensor, "width width"] | None
) -> Components:
    """Components of vectors; keeping the first D of them leaves the least error that D linear numbers can.

    With an error metric `M` they are the principal components of `M^(1/2) x` (Eckart and Young, 1936, under `|e|_M`),
    carried back by `M^(-1/2)`.

    Args:
        x: the vectors.
        error_metric: positive definite; None for the identity.
    """
    mean = mean_of(x)
    covariance = covariance_of(x, mean)
    if error_metric is None:
        variances, vectors = torch.linalg.eigh(covariance)  # ascending order
        vectors = vectors.flip(1)
        analysis = vectors.float().contiguous()
        return Components(mean, analysis, analysis.T.contiguous(), variances.flip(0).clamp_min(0))
    root, inverse = root_of(error_metric)
    variances, vectors = torch.linalg.eigh(root @ covariance @ root)
    vectors = vectors.flip(1)
    analysis, synthesis = (root @ vectors).float().contiguous(), (vectors.T @ inverse).float().contiguous()
    return Components(mean, analysis, synthesis, variances.flip(0).clamp_min(0))


def root_of(
    error_metric: Float[torch.Tensor, "width width"],
) -> tuple[Float64[torch.Tensor, "width width"], Float64[torch.Tensor, "width width"]]:
    """`M^(1/2)` and `M^(-1/2)`, both symmetric."""
    sizes, axes = torch.linalg.eigh(error_metric.double())
    roots = sizes.clamp_min(sizes[-1] * 1e-12).sqrt()
    return (axes * roots) @ axes.T, (axes / roots) @ axes.T


def covariance_of(
    x: Float[torch.Tensor, "tokens width"], mean: Float[torch.Tensor, " width"]
) -> Float64[torch.Tensor, "width width"]:
    """Covariance of vectors, summed a piece at a time."""
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for rows in x.split(ROWS):
        centred = rows.float() - mean
        covariance += centred.T @ centred / len(x)
    return covariance

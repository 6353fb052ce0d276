"""Principal components under a metric: what `pca`, `transform` and others project on."""

from dataclasses import dataclass

import torch

from leankv.codecs.base import ROWS, mean_of


@dataclass(frozen=True)
class Components:
    """Uncorrelated coordinates of vectors, in which the metric is the plain squared error.

        y = (x - mean) analysis,        x = mean + y synthesis

    Attributes:
        mean: `[W]`, float32.
        analysis: `[W, W]`, float32.
        synthesis: `[W, W]`, float32, the inverse of `analysis`.
        variances: `[W]`, float64, of the coordinates, falling.
    """

    mean: torch.Tensor
    analysis: torch.Tensor
    synthesis: torch.Tensor
    variances: torch.Tensor


def principal_components(x: torch.Tensor, metric: torch.Tensor | None) -> Components:
    """Components of vectors `[N, W]`; keeping the first D of them leaves the least error that D linear numbers can.

    With a metric `M` they are the principal components of `M^(1/2) x` (Eckart and Young, 1936, under `|e|_M`), carried
    back by `M^(-1/2)`.

    Args:
        x: `[N, W]`.
        metric: `[W, W]`, positive definite; None for the identity.
    """
    mean = mean_of(x)
    covariance = covariance_of(x, mean)
    if metric is None:
        variances, vectors = torch.linalg.eigh(covariance)  # ascending order
        vectors = vectors.flip(1)
        analysis = vectors.float().contiguous()
        return Components(mean, analysis, analysis.T.contiguous(), variances.flip(0).clamp_min(0))
    sizes, axes = torch.linalg.eigh(metric.double())
    roots = sizes.clamp_min(sizes[-1] * 1e-12).sqrt()
    root, inverse = (axes * roots) @ axes.T, (axes / roots) @ axes.T
    variances, vectors = torch.linalg.eigh(root @ covariance @ root)
    vectors = vectors.flip(1)
    analysis, synthesis = (root @ vectors).float().contiguous(), (vectors.T @ inverse).float().contiguous()
    return Components(mean, analysis, synthesis, variances.flip(0).clamp_min(0))


def covariance_of(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Covariance `[W, W]` of vectors `[N, W]`, float64."""
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for rows in x.split(ROWS):
        centred = rows.float() - mean
        covariance += centred.T @ centred / len(x)
    return covariance

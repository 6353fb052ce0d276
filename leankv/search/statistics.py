"""Intervals of means from a few samples."""

import math
from collections.abc import Sequence

from scipy.special import stdtrit

CONFIDENCE = 0.95


def t_interval(sample: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of the mean of `sample`; None for fewer than two."""
    count = len(sample)
    if count < 2:
        return None
    mean = math.fsum(sample) / count
    half = t_quantile(count - 1) * math.sqrt(variance_of(sample) / count)
    return mean - half, mean + half


def t_quantile(freedom: float) -> float:
    """How many standard errors a two-sided 95 % interval reaches, at so many degrees of freedom."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def variance_of(sample: Sequence[float]) -> float:
    """The unbiased variance of at least two numbers."""
    mean = math.fsum(sample) / len(sample)
    return math.fsum((value - mean) ** 2 for value in sample) / (len(sample) - 1)

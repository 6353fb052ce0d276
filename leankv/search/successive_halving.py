"""Screening: ranking candidates with few blocks, and spending more only on those that the choice depends on.

Successive halving (Karnin, Koren and Somekh, 2013; Jamieson and Talwalkar, 2016, arXiv 1502.07943): every candidate is
measured on the first blocks of a random order, the cheapest third of them on three times as many, and so on; only the
last few see all blocks. What decides is which candidates are cheapest, so that is where the blocks go. A sweep's
candidates are layers, a map's are parts of layers.

Knows numbers only; `measure` is handed in.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy
from scipy.special import polygamma

from leankv.search.statistics import t_interval, t_quantile, variance_of

FIRST_BLOCKS = 2  # the fewest that have a variance

KEEP_ONE_IN = 3  # as Hyperband's default (Li et al., 2018, arXiv 1603.06560)

SMALLEST_SCALE = 0.1  # assumption: costs below a tenth of the median one vary as much as one of that size


Candidate = TypeVar("Candidate", bound=Hashable)


@dataclass(frozen=True)
class Estimate:
    """What is known of one candidate's cost.

    Attributes:
        differences: nats a token that it adds, one for each block it was measured on.
        interval: 95 % interval of the mean over text, of which all blocks are a sample, in nats a token; None where one
            block is all there is.
    """

    differences: tuple[float, ...]
    interval: tuple[float, float] | None

    @property
    def mean(self) -> float:
        """Mean of `differences`."""
        return math.fsum(self.differences) / len(self.differences)


def screen(
    candidates: Sequence[Candidate], n_blocks: int, measure: Callable[[Candidate, int, int], Sequence[float]]
) -> dict[Candidate, Estimate]:
    """Measure every candidate on some blocks, and the cheapest ones on all.

    Args:
        candidates: whatever `measure` understands.
        n_blocks: how many blocks exact measurements would use; they must be in random order.
        measure: candidate, first block, end block -> one difference in nats a token for each of these blocks.

    Returns:
        candidate -> estimate. One that saw all blocks has the cost and the interval of an exact measurement.
    """
    differences: dict[Candidate, list[float]] = {candidate: [] for candidate in candidates}
    contenders, done, target = list(candidates), 0, min(FIRST_BLOCKS, n_blocks)
    while True:
        for candidate in contenders:
            differences[candidate] += measure(candidate, done, target)
        if target == n_blocks:
            return estimates_of(differences, n_blocks)
        contenders.sort(key=lambda candidate: math.fsum(differences[candidate]))
        contenders = contenders[: max(2, math.ceil(len(contenders) / KEEP_ONE_IN))]
        done, target = target, min(target * KEEP_ONE_IN, n_blocks)


def estimates_of(differences: Mapping[Candidate, Sequence[float]], n_blocks: int) -> dict[Candidate, Estimate]:
    """Each candidate's cost from the blocks it was measured on, at least two of them where there are two.

    All intervals are of the same thing, the mean over text; blocks are taken as independent draws from it. A candidate
    that saw all `n_blocks` has Student's interval of its own differences, as it would have without screening. Two
    blocks alone say next to nothing of their variance, so those that saw fewer borrow from each other: variances
    relative to the squared mean are shrunk towards their common value as in the moderated t statistic (Smyth, 2004, eq.
    5 and section 6.2).
    """
    means = {candidate: math.fsum(own) / len(own) for candidate, own in differences.items()}
    least = SMALLEST_SCALE * float(numpy.median([abs(mean) for mean in means.values()]))
    scales = {candidate: max(abs(mean), least, 1e-12) for candidate, mean in means.items()}
    relative = {
        candidate: (variance_of(own) / scales[candidate] ** 2, len(own) - 1)
        for candidate, own in differences.items()
        if len(own) > 1
    }
    prior_freedom, prior = _prior(list(relative.values()))
    estimates = {}
    for candidate, own in differences.items():
        if len(own) == n_blocks:
            estimates[candidate] = Estimate(tuple(own), t_interval(own))
            continue
        variance, freedom = relative[candidate]
        # An infinite prior freedom says that all candidates vary alike: then the common variance is theirs.
        shrunk = prior if math.isinf(prior_freedom) else _shrink(prior_freedom, prior, freedom, variance)
        half = t_quantile(min(prior_freedom + freedom, 1e6)) * scales[candidate] * math.sqrt(shrunk / len(own))
        estimates[candidate] = Estimate(tuple(own), (means[candidate] - half, means[candidate] + half))
    return estimates


def _shrink(prior_freedom: float, prior: float, freedom: int, variance: float) -> float:
    return (prior_freedom * prior + freedom * variance) / (prior_freedom + freedom)


def _prior(variances: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Degrees of freedom and value of the common variance, by moments of the log variances (Smyth, 2004, section 6.2).

    Args:
        variances: (variance, degrees of freedom) pairs.
    """
    positive = [(variance, freedom) for variance, freedom in variances if variance > 0]
    if len(positive) < 2:
        return math.inf, positive[0][0] if positive else 0.0
    freedom = numpy.array([f for _, f in positive], dtype=float)
    logs = numpy.log([v for v, _ in positive]) - polygamma(0, freedom / 2) + numpy.log(freedom / 2)
    spread = float(numpy.var(logs, ddof=1) - numpy.mean(polygamma(1, freedom / 2)))
    if spread <= 0:
        return math.inf, math.exp(float(numpy.mean(logs)))
    prior_freedom = 2 * _inverse_trigamma(spread)
    prior = math.exp(float(numpy.mean(logs)) + float(polygamma(0, prior_freedom / 2)) - math.log(prior_freedom / 2))
    return prior_freedom, prior


def _inverse_trigamma(value: float) -> float:
    """x with trigamma(x) = value, by Newton's method on 1 / trigamma (Smyth, 2004, appendix)."""
    x = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(polygamma(1, x))
        step = trigamma * (1 - trigamma / value) / float(polygamma(2, x))
        x += step
        if -step / x < 1e-8:
            break
    return x

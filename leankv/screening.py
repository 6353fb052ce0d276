"""Screening: ranking layers with few blocks, and spending more only on those that the choice depends on.

Successive halving (Karnin, Koren and Somekh, 2013; Jamieson and Talwalkar, 2016): every layer is measured on the first
blocks of a random order, the cheapest third of them on three times as many, and so on; only the last few see all
blocks. What decides is which layers are cheapest, so that is where the blocks go.

Knows numbers only; `measure` is handed in.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy
from scipy.special import polygamma, stdtrit

FIRST_BLOCKS = 2  # the fewest that have a variance
KEEP_ONE_IN = 3  # as Hyperband's default (Li et al., 2018)
CONFIDENCE = 0.95
SMALLEST_SCALE = 0.1  # assumption: costs below a tenth of the median one vary as much as one of that size


@dataclass(frozen=True)
class Estimate:
    """What is known of one layer's cost.

    Attributes:
        differences: nats a token that compressing the layer adds, one for each block it was measured on.
        low, high: 95 % interval of the mean over all blocks, in nats a token.
    """

    differences: tuple[float, ...]
    low: float
    high: float

    @property
    def mean(self) -> float:
        """Mean of `differences`."""
        return math.fsum(self.differences) / len(self.differences)


def screen(
    layers: Sequence[int], n_blocks: int, measure: Callable[[int, int, int], Sequence[float]]
) -> dict[int, Estimate]:
    """Measure every layer on some blocks, and the cheapest ones on all.

    Args:
        layers: which.
        n_blocks: how many blocks an exact sweep would use; they must be in random order.
        measure: layer, first block, end block -> one difference in nats a token for each of these blocks.

    Returns:
        layer -> estimate. A layer that saw all blocks has its exact cost, and an interval of no width.
    """
    differences: dict[int, list[float]] = {layer: [] for layer in layers}
    contenders, done, target = list(layers), 0, min(FIRST_BLOCKS, n_blocks)
    while True:
        for layer in contenders:
            differences[layer] += measure(layer, done, target)
        if target == n_blocks:
            return intervals(differences, n_blocks)
        contenders.sort(key=lambda layer: math.fsum(differences[layer]))
        contenders = contenders[: max(2, math.ceil(len(contenders) / KEEP_ONE_IN))]
        done, target = target, min(target * KEEP_ONE_IN, n_blocks)


def intervals(differences: Mapping[int, Sequence[float]], n_blocks: int) -> dict[int, Estimate]:
    """95 % interval of each layer's mean over all `n_blocks`, from the blocks it was measured on.

    Two blocks alone say next to nothing of their variance. So the layers lend each other theirs: variances relative to
    the squared mean are shrunk towards their common value as in the moderated t statistic (Smyth, 2004, eq. 5 and
    section 6.2). Blocks are a sample without replacement, hence the factor `1 - n / N` (Cochran, 1977, eq. 2.13).
    """
    means = {layer: math.fsum(d) / len(d) for layer, d in differences.items()}
    least = SMALLEST_SCALE * float(numpy.median([abs(mean) for mean in means.values()]))
    scales = {layer: max(abs(mean), least, 1e-12) for layer, mean in means.items()}
    relative = {layer: _variance(d) / scales[layer] ** 2 for layer, d in differences.items() if len(d) > 1}
    freedom = {layer: len(differences[layer]) - 1 for layer in relative}
    prior_freedom, prior = _prior([(relative[layer], freedom[layer]) for layer in relative])
    estimates = {}
    for layer, own in differences.items():
        left = 1 - len(own) / n_blocks
        half = 0.0
        if left > 0:
            d = freedom.get(layer, 0)
            # An infinite prior freedom says that all layers vary alike: then the common variance is theirs.
            shrunk = prior if math.isinf(prior_freedom) else _shrink(prior_freedom, prior, d, relative.get(layer, 0.0))
            t = float(stdtrit(min(prior_freedom + d, 1e6), (1 + CONFIDENCE) / 2))
            half = t * scales[layer] * math.sqrt(shrunk * left / len(own))
        estimates[layer] = Estimate(tuple(own), means[layer] - half, means[layer] + half)
    return estimates


def _shrink(prior_freedom: float, prior: float, freedom: int, variance: float) -> float:
    return (prior_freedom * prior + freedom * variance) / (prior_freedom + freedom)


def _variance(sample: Sequence[float]) -> float:
    mean = math.fsum(sample) / len(sample)
    return math.fsum((value - mean) ** 2 for value in sample) / (len(sample) - 1)


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

"""The least squared error that any code of a Gaussian source can have at a number of bits: how far a codec is from it.

Reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3): of a Gaussian vector whose principal
components have variances `l_j`, coded with R bits, the mean squared error is no less than

    D(R) = sum_j min(theta, l_j),        where theta is such that  sum_j max(0, 1/2 log2(l_j / theta)) = R.

What varies less than the level `theta` gets no bits; what varies more is left an error of `theta`. The bound is reached
only by coding many vectors together. A source that is not Gaussian has the same covariance and a smaller least error,
so a codec may come below the bound, as may one that looks at more than the vector itself.
"""

import math
from collections.abc import Sequence

import numpy as np


def least_error(variances: Sequence[float], bits: float) -> float:
    """D(R): the least mean squared error of a Gaussian vector, exact to rounding.

    Args:
        variances: of its principal components, in any order; those that are not above zero take no bits.
        bits: R, a vector, at least 0.

    Returns:
        In the variances' unit; at 0 bits their sum.
    """
    assert bits >= 0, "no code has less than no bits"
    falling = np.sort(np.asarray(variances, dtype=np.float64))[::-1]
    falling = falling[falling > 0]
    if not len(falling):
        return 0.0
    logarithms = np.log2(falling)
    counts = np.arange(1, len(falling) + 1)
    sums = np.cumsum(logarithms)
    # The bits at which the level has sunk to each component's variance, rising; those it has sunk to are coded.
    needed = (sums - counts * logarithms) / 2
    coded = max(1, int((needed <= bits).sum()))
    level = 2.0 ** ((sums[coded - 1] - 2 * bits) / coded)
    return float(coded * level + falling[coded:].sum())


def decibels_over_bound(error: float, variances: Sequence[float], bits: float) -> float | None:
    """How far an error is from the least one at the same bits: `10 log10(error / D(bits))`.

    6.02 dB are one bit for each component that is coded. Rounding to integers with perfect entropy coding comes to
    1.53 dB at high rates.

    Args:
        error: mean squared error of a vector.
        variances: of its principal components.
        bits: a vector.

    Returns:
        Decibels; None where one of the two errors is zero, since there is no distance to tell then.
    """
    least = least_error(variances, bits)
    return 10 * math.log10(error / least) if error > 0 and least > 0 else None

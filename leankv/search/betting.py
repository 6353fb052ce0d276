"""Is a mean below zero? A bet on it that may be looked at after every observation, and may stop whenever it has won.

Hypothesis testing by betting (Waudby-Smith and Ramdas, 2020, arXiv 2010.09686): one-sided, with the stakes of their
predictable plug-in empirical Bernstein bounds. Whoever holds that the mean of bounded values z, `|z| <= clip`,
is not below zero is offered bets on `x = z / clip`: before each value a stake `s` in `[0, c]` is chosen from the values
before it, and the wealth, 1 at first, is multiplied by `1 - s x`. While they are right, no choice of stakes makes the
expected wealth grow (`E[1 - s x] = 1 - s E[x] <= 1`), so it ever reaches `1 / alpha` with probability `alpha` at most
(Ville's inequality), whenever one stops. This needs no distribution and no least number of values: only that each one's
expectation, given those before it, is that mean, as of independent draws.

Why a bound: no test of the mean of values without one has any power (Bahadur and Savage, 1956). So values beyond
`clip` are cut to it, and what is tested is the mean of the cut values. From below that is on the safe side: it raises
the mean, and keeps one lucky value from deciding. From above it is not, so such values are counted, and a bound has to
be stated before any value is seen.

Knows numbers only.
"""

import math
from collections.abc import Sequence

import numpy

LARGEST_STAKE = 0.9
"""Of the wealth, on one value. It is what decides where values vary little, as costs of documents do. Simulated with
the costs in `tests/test_betting.py` (mean 0.018, deviation 0.01 nats a token), 7 % allowed, clip 0.1: 14 documents
at a stake of 0.5 (the paper suggests 0.5 or 0.75), 10 at 0.75, 9 at 0.9; 3 % allowed: 55, 37, 31. At 1 one value at the
bound would take all."""

SPREAD_OF_NEEDED = 200  # resampled sequences; their median is good to about a tenth

MOST_DOCUMENTS = 10_000  # beyond this a number needed is not told

ENOUGH_FOR_A_SPREAD = 8  # values; assumption: before these a standard error says little

STANDARD_ERRORS = 2.0  # how much better than what was seen the rest may be before a test is given up

CLIP_OVER_DEVIATION = 3.0  # see `choose_clip` for what this and the next were chosen by

ENOUGH_FOR_A_CLIP = 16  # selection blocks; of fewer, the farthest is less far out


class BettingTest:
    """The test of "the mean is not below zero", value by value.

    Args:
        clip: values are cut to `[-clip, clip]`; in their unit.
        alpha: how often at most it may reject what is true.

    Attributes:
        count: values seen.
        n_clipped: those of them that lay above `clip`.
        rejected: whether the wealth has reached `1 / alpha`; it stays so, whatever comes.
    """

    def __init__(self, clip: float, alpha: float):
        assert clip > 0
        assert 0 < alpha < 1
        self.clip = clip
        self.alpha = alpha
        self.count = 0
        self.n_clipped = 0
        self.rejected = False
        self._log_wealth = 0.0
        self._sum = 0.0
        self._squares = 0.0  # of x less the mean known with it
        self._own: list[float] = []

    @property
    def wealth(self) -> float:
        """What 1 has become; it is evidence against the hypothesis, and its inverse a p-value at any time."""
        return math.exp(min(self._log_wealth, 700.0))

    def add(self, value: float) -> None:
        """Bet on one more value."""
        x = min(max(value / self.clip, -1.0), 1.0)
        stake = float(_stake(numpy.array(self._squares), numpy.array(self.count), self.alpha))
        self._log_wealth += math.log1p(-stake * x)
        self.count += 1
        self.n_clipped += value > self.clip
        self._sum += x
        self._squares += (x - self._sum / (self.count + 1)) ** 2
        self._own.append(x)
        self.rejected |= self._log_wealth >= math.log(1 / self.alpha)

    def is_hopeless(self, left: int) -> bool:
        """Whether `left` more values are unlikely to be enough, even if all were as good as the mean may be.

        Giving up is always allowed: it can only keep a test from rejecting.
        """
        if self.rejected or self.count < ENOUGH_FOR_A_SPREAD:
            return False
        error = float(numpy.std(self._own, ddof=1)) / math.sqrt(self.count)
        best = min(max(self._sum / self.count - STANDARD_ERRORS * error, -1.0), 1.0)
        return self._log_wealth + left * max(0.0, math.log1p(-LARGEST_STAKE * best)) < math.log(1 / self.alpha)


def log_wealth_paths(values: numpy.ndarray, clip: float, alpha: float) -> numpy.ndarray:
    """The logarithm of the wealth after each value of many sequences at once, `[..., n]` -> `[..., n]`."""
    x = numpy.clip(numpy.asarray(values, dtype=float) / clip, -1, 1)
    count = numpy.arange(x.shape[-1])
    squares = numpy.cumsum((x - numpy.cumsum(x, axis=-1) / (count + 2)) ** 2, axis=-1)
    before = numpy.concatenate([numpy.zeros_like(x[..., :1]), squares[..., :-1]], axis=-1)
    logs: numpy.ndarray = numpy.cumsum(numpy.log1p(-_stake(before, count, alpha) * x), axis=-1)
    return logs


def _stake(squares: numpy.ndarray, count: numpy.ndarray, alpha: float) -> numpy.ndarray:
    """The next stake: `sqrt(2 ln(1 / alpha) / (variance * t * ln(1 + t)))`, at most `LARGEST_STAKE`.

    `t = count + 1` is the number of the value to come, and the variance that of x as known before it, begun with one
    value of the largest possible variance: their plug-in estimates, carried from `[0, 1]` to `[-1, 1]`.
    """
    t = count + 1.0
    variance = (1.0 + squares) / t
    return numpy.minimum(LARGEST_STAKE, numpy.sqrt(2 * math.log(1 / alpha) / (variance * t * numpy.log1p(t))))


def least_documents(allowed: float, clip: float, alpha: float) -> int:
    """How many values at least it takes to reject, were each of them `-allowed`: those of a plan that costs nothing.

    Args:
        allowed: in the unit of `clip`.
        clip: the bound.
        alpha: of the test.
    """
    return math.ceil(math.log(1 / alpha) / math.log1p(LARGEST_STAKE * min(1.0, allowed / clip)))


def documents_needed(values: Sequence[float], clip: float, alpha: float, seed: int = 0) -> int | None:
    """How many values like these it would likely take to reject: the median over sequences drawn from them.

    Args:
        values: as `BettingTest` takes them, seen so far.
        clip: the bound.
        alpha: of the test.
        seed: of the draws.

    Returns:
        The number in all; None where half of the sequences need more than `MOST_DOCUMENTS`, as they do where the mean
        is not below zero.
    """
    generator = numpy.random.default_rng(seed)
    drawn = generator.choice(numpy.asarray(values, dtype=float), size=(SPREAD_OF_NEEDED, MOST_DOCUMENTS))
    reached = log_wealth_paths(drawn, clip, alpha) >= math.log(1 / alpha)
    needed = numpy.where(reached.any(axis=1), reached.argmax(axis=1) + 1, MOST_DOCUMENTS + 1)
    median = int(numpy.sort(needed)[SPREAD_OF_NEEDED // 2])
    return median if median <= MOST_DOCUMENTS else None


def choose_clip(differences: Sequence[float], allowed: float) -> float:
    """The bound for a plan's documents, from what selection text shows: stated before certification text is read.

    Three times the farthest that any difference on selection text is from their mean; with `n` blocks fewer than 16,
    `sqrt(16 / n)` times as much; and no less than what the budget allows, so that a document at twice the budget still
    counts whole.

    What it was chosen by: plans that cost exactly 3 %, a budget of 3 %, deviations of 0.01 and 0.03 nats a document,
    16 selection blocks, up to 100 documents, 2,000 simulations each; the share falsely certified, at most 0.05 wanted,
    at 2, 3, 4 and 6 times. Gamma 0.023, 0.008, 0.004, 0; Student's t with 3 degrees of freedom 0.016, 0.005, 0.002,
    0.001; lognormal (sigma 1) 0.050, 0.021, 0.011, 0.004; Pareto (2.5) 0.081, 0.041, 0.021, 0.009. With 4 blocks six
    times are needed: 0.011, 0.008, 0.067, 0.097. A plan of +1.8 % (deviation 0.01) then takes 15, 21, 26, 38 documents.
    No bound from 16 blocks helps where one document in fifty has all the cost: 0.44, 0.31, 0.21, 0.08, for most often
    none of these is seen. `results/budget-coverage` has the same of real plans.

    Args:
        differences: what the plan adds on each selection block, in nats a token; at least two.
        allowed: `ln(1 + budget)`, in nats a token.
    """
    count = len(differences)
    assert count > 1, "one difference shows no deviation"
    mean = math.fsum(differences) / count
    times = CLIP_OVER_DEVIATION * math.sqrt(max(1.0, ENOUGH_FOR_A_CLIP / count))
    return max(times * max(abs(difference - mean) for difference in differences), allowed)

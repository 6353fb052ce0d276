"""`waterfill`: rates from sensitivities at one slope, the slope by bisection on the measured joint cost.

Reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3) in its operational form (Shoham and
Gersho, IEEE Trans. ASSP 36, 1988): at one price a byte, every site takes the option whose predicted cost and price
together are least; what those that predict from it then take and cost counts with its own. What an option is predicted
to cost is the site's contribution at a plan that was measured, times the error of the option over that of the plan's
own. The price follows from the joint cost that is wanted; that is measured, and the prediction scaled by what it
missed.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property

import numpy as np

from leankv.search.path import Measured, Path
from leankv.search.plan_space import Choice, Contributions, PlanSpace, Table

ROUNDS = 17  # halvings of the logarithm of a price: far below what separates two choices
PRICES = (-80.0, 20.0)  # its range, of nats a token and byte: from everything at its finest to all at its coarsest
SHARED = 0.1
"""Part of the mean contribution that is added to each one, as some text says too little of a site. Plans for one half
of eight blocks cost the other half less with it, by a little where rates are few (log of 2026-11-30)."""
TINY = 1e-12  # nats a token, where nothing contributes
CLOSE_ENOUGH = 0.03  # of the wanted cost
MOVES = 200  # far more than were seen to change anything
EQUAL = 1e-12  # of a cost: less is rounding
TRIES = 4  # slopes that are measured before contributions are taken anew


class Prediction:
    """What choices are expected to cost, from what the sites contribute at one that was measured.

    Args:
        space: what is chosen from.
        at: the choice that contributions are known at.
        contributions: site -> nats a token.
        cost: measured cost of `at`; contributions are scaled to add up to it.
        before: what was expected before, by other text; counts as much.
        shared: part of the mean contribution that is added to each one.
    """

    def __init__(
        self,
        space: PlanSpace,
        at: Choice,
        contributions: Mapping[Hashable, float],
        cost: float,
        before: "Prediction | None" = None,
        shared: float = SHARED,
    ):
        self.space = space
        errors = space.at(space.errors, at)
        known = np.array([max(contributions.get(site, 0.0), 0.0) for site in space.sites])
        seen = errors > 0  # an exact site tells nothing of what its options would cost
        weights = np.ones(len(known))
        if seen.any():
            cost = max(cost, 1e-9)
            weights[seen] = np.maximum(known[seen] + shared * known[seen].mean(), TINY) / errors[seen]
            weights[~seen] = np.median(weights[seen])
            weights *= cost / float(weights @ errors)
            if before is not None:
                weights = (weights + before._weights * cost / before.of(at)) / 2
        self._weights: np.ndarray = weights

    @cached_property
    def _costs(self) -> Table:
        """Nats a token."""
        costs: Table = self._weights[:, None, None] * self.space.errors
        return costs

    def of(self, choice: Choice) -> float:
        """Nats a token that a choice is expected to add."""
        return math.fsum(self.space.at(self._costs, choice))

    def tilted(self, sites: Mapping[int, float]) -> "Prediction":
        """The same where some sites (by number) are expected to cost so many times as much."""
        factors = np.ones(len(self.space.sites))
        factors[list(sites)] = list(sites.values())
        other = object.__new__(Prediction)
        other.space, other._weights = self.space, factors * self._weights
        return other

    def at_price(self, price: float, codec_price: float = 0.0, start: Choice | None = None) -> Choice:
        """The best choice where a byte costs `price` nats a token, and a byte of codecs `codec_price` more.

        Where sites predict from others, the best for one depends on what those take: all take their best, or the one
        that gains the most where that is cheaper, until none gains. They begin at `start`, or where each would be best
        in a context of the middle level.
        """
        space = self.space
        prices = self._costs + price * space.sizes + codec_price * space.codec_sizes
        choice = start or tuple(int(index) for index in prices[:, :, prices.shape[2] // 2].argmin(axis=1))
        n_sites, n_options = prices.shape[:2]
        sites, options = np.repeat(np.arange(n_sites), n_options), np.tile(np.arange(n_options), n_sites)
        for _ in range(MOVES):
            moved = np.tile(choice, (len(sites), 1))
            moved[np.arange(len(sites)), sites] = options
            totals = space.totals(prices, moved).reshape(n_sites, n_options)
            here, best = totals[0, choice[0]], totals.argmin(axis=1)
            gains = here - totals.min(axis=1)
            if gains.max() <= EQUAL * abs(here):
                break
            site = int(gains.argmax())
            alone = (*choice[:site], int(best[site]), *choice[site + 1 :])
            together = tuple(int(own) for own in np.where(gains > EQUAL * abs(here), best, choice))
            choice = together if space.totals(prices, [together])[0] < totals.min() else alone
        return choice

    def smallest_within(self, cost: float) -> Choice:
        """The smallest choice that is expected to cost no more, within the memory for codecs."""
        choice = self._priced(lambda choice: self.of(choice) > cost, dearer_if_true=False)
        # One price reaches the hull only; what is left up to the cost is spent site by site.
        return self._moved_on(choice, 1, lambda moved: self.of(moved) <= cost)

    def cheapest_within(self, size: float) -> Choice:
        """The choice that is expected to cost the least and takes no more bytes, within the memory for codecs."""
        choice = self._priced(lambda choice: self.space.size(choice) > size, dearer_if_true=True)
        return self._moved_on(choice, -1, lambda moved: self.space.size(moved) <= size)

    def _moved_on(self, choice: Choice, by: int, is_allowed: Callable[[Choice], bool]) -> Choice:
        """The choice with one site after another a level coarser (1) or finer (-1), best first, as far as allowed."""
        space, stuck = self.space, set[int]()
        while len(stuck) < len(choice):
            moves = {site: space.moved(choice, [site], by) for site in range(len(choice)) if site not in stuck}
            changes = (space.totals(table, [choice, *moves.values()]) for table in (self._costs, space.sizes))
            costs, sizes = (numbers[1:] - numbers[0] for numbers in changes)
            slopes = {}
            for (site, moved), cost, size in zip(moves.items(), costs, sizes, strict=True):
                # Its last option, or one that saves nothing, or mends nothing.
                if moved == choice or (size >= 0 if by > 0 else cost >= 0):
                    stuck.add(site)
                else:
                    slopes[site] = cost / size if size > 0 or by > 0 else -math.inf  # nats a byte
            if not slopes:
                break
            # The fewest nats to give, or the most to get.
            site = (max if by > 0 else min)(slopes, key=lambda each: (slopes[each], each))
            moved = moves[site]
            if is_allowed(moved) and space.codec_bytes(moved) <= space.max_codec_bytes:
                choice = moved
            else:
                stuck.add(site)
        return choice

    def _priced(self, beyond: Callable[[Choice], bool], dearer_if_true: bool) -> Choice:
        """The choice at the price where `beyond` changes, on the side where it is not true."""

        def choice_at(codec_price: float) -> Choice:
            tried: dict[float, Choice] = {}

            def at(price: float) -> Choice:
                if price not in tried:  # from the nearest one that was tried
                    nearest = min(tried, key=lambda other: abs(math.log(other / price)), default=None)
                    tried[price] = self.at_price(price, codec_price, tried[nearest] if nearest else None)
                return tried[price]

            # Prices below: `beyond` as it is at the least price; above: the other.
            low, high = _bisected(lambda price: beyond(at(price)) is dearer_if_true)
            return at(high if dearer_if_true else low)

        free = choice_at(0.0)
        if self.space.codec_bytes(free) <= self.space.max_codec_bytes:
            return free
        _, high = _bisected(
            lambda codec_price: self.space.codec_bytes(choice_at(codec_price)) > self.space.max_codec_bytes
        )
        return choice_at(high)


def _bisected(is_low: Callable[[float], bool]) -> tuple[float, float]:
    """Two prices next to each other between which `is_low` changes from true to false."""
    low, high = PRICES
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        if is_low(math.exp(middle)):
            low = middle
        else:
            high = middle
    return math.exp(low), math.exp(high)


def waterfill(
    path: Path, start: Choice, contributions: Contributions, wanted: float, max_evaluations: float, rounds: int = 2
) -> tuple[Measured, Prediction]:
    """The smallest choice that costs `wanted` nats a token or less, as far as predictions lead to it.

    Args:
        path: measures.
        start: a choice to begin at, whose cost is of the size that is wanted.
        contributions: of a choice's sites.
        wanted: nats a token.
        max_evaluations: full evaluations that may be spent.
        rounds: how often contributions are taken anew, each time at the best choice so far.

    Returns:
        The smallest measured step within `wanted` (the cheapest one where none is), and what choices are expected to
        cost around it.
    """
    first = path.evaluations
    best = path.record(start, "waterfill", "start")
    prediction = Prediction(path.space, start, contributions(start, 0), best.cost)
    for round_ in range(rounds):
        if round_:
            known = contributions(best.choice, round_)
            prediction = Prediction(path.space, best.choice, known, best.cost, prediction)
        aim = wanted
        tried: list[tuple[float, float]] = []
        for _ in range(TRIES):
            choice = prediction.smallest_within(aim)
            if path.evaluations - first + 1 > max_evaluations:
                return best, prediction
            predicted = prediction.of(choice)
            here = path.record(choice, "waterfill", f"slope {round_ + 1}", predicted)
            best = best_within(path.steps, wanted)
            if abs(here.cost / wanted - 1) < CLOSE_ENOUGH or (tried and tried[-1][1] == here.cost):
                break  # close enough, or there is nothing between two options
            tried.append((aim, max(here.cost, 1e-9)))
            aim = min(max(_next_aim(tried, wanted), wanted / 8), wanted * 8)
    return best, prediction


def _next_aim(tried: Sequence[tuple[float, float]], wanted: float) -> float:
    """What to aim at so that `wanted` comes out, from aims and what came out.

    Between two that came out on both sides, as a power law through the nearest of each; else what was missed by some
    factor is taken to be missed by as much nearby.
    """
    below = max((pair for pair in tried if pair[1] <= wanted), key=lambda pair: pair[1], default=None)
    above = min((pair for pair in tried if pair[1] > wanted), key=lambda pair: pair[1], default=None)
    if below is None or above is None or below[1] == above[1]:
        aim, cost = min(tried, key=lambda pair: abs(math.log(pair[1] / wanted)))
        return aim * wanted / cost
    share = math.log(wanted / below[1]) / math.log(above[1] / below[1])
    return below[0] * (above[0] / below[0]) ** share


def fill_to_size(
    path: Path, start: Choice, contributions: Contributions, size: float, rounds: int = 3
) -> tuple[Measured, Prediction]:
    """The choice of no more than `size` bytes that costs the least, as far as predictions lead to it.

    Args:
        path: measures.
        start: a choice to begin at, of about that size.
        contributions: of a choice's sites.
        size: bytes.
        rounds: how often contributions are taken, each time at the last choice.

    Returns:
        The cheapest measured step of no more bytes (the smallest one where none is), and the last prediction.
    """
    here, prediction = path.record(start, "waterfill", "start"), None
    for round_ in range(rounds):
        known = contributions(here.choice, round_)
        prediction = Prediction(path.space, here.choice, known, here.cost, prediction)
        choice = prediction.cheapest_within(size)
        here = path.record(choice, "waterfill", f"round {round_ + 1}", prediction.of(choice))
    assert prediction is not None
    return cheapest_within(path.steps, size), prediction


def cheapest_within(steps: Sequence[Measured], size: float) -> Measured:
    """The allowed step that costs the least of those no larger than `size`; where none is, the smallest."""
    allowed = [step for step in steps if step.is_allowed] or list(steps)
    within = [step for step in allowed if step.size <= size]
    return min(within, key=lambda step: step.cost) if within else min(allowed, key=lambda step: step.size)


def best_within(steps: Sequence[Measured], cost: float) -> Measured:
    """The smallest allowed step within a cost; where none is, the one that costs the least."""
    allowed = [step for step in steps if step.is_allowed] or list(steps)
    within = [step for step in allowed if step.cost <= cost]
    return min(within, key=lambda step: step.size) if within else min(allowed, key=lambda step: step.cost)

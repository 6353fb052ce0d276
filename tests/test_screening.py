"""Screening: honest intervals, few measurements, exact where it matters."""

import math
from collections.abc import Sequence

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leankv.search.statistics import t_interval
from leankv.search.successive_halving import FIRST_BLOCKS, Estimate, estimates_of, screen


def true_costs(seed: int, layers: int) -> numpy.ndarray:
    """Means over all text, over orders of magnitude, as sweeps show them."""
    return numpy.exp(numpy.random.default_rng(seed).normal(-2.5, 0.9, layers))


def made_up(seed: int, layers: int, blocks: int) -> numpy.ndarray:
    """Differences `[layers, blocks]` drawn about the true costs, spread in proportion; some blocks are hard."""
    rng = numpy.random.default_rng([seed, 1])
    spread = 0.3 * numpy.exp(rng.normal(0, 0.3, layers))
    noise = rng.normal(0, 0.15, blocks) + spread[:, None] * rng.normal(size=(layers, blocks))
    return true_costs(seed, layers)[:, None] * (1 + noise)


def holds(estimate: Estimate, cost: float) -> bool:
    assert estimate.interval is not None
    return estimate.interval[0] <= cost <= estimate.interval[1]


@pytest.mark.parametrize("seen", [2, 6, 21])
def test_intervals_hold_the_true_cost_at_their_rate(seen: int) -> None:
    """95 % intervals of the mean over text, from 2 to 21 of 22 blocks, 100 sweeps of 30 layers."""
    inside = []
    for seed in range(100):
        estimates = estimates_of({layer: list(row[:seen]) for layer, row in enumerate(made_up(seed, 30, 22))}, 22)
        inside += [holds(estimates[layer], cost) for layer, cost in enumerate(true_costs(seed, 30))]
    assert 0.92 <= numpy.mean(inside) <= 0.98


def test_intervals_after_screening_hold_the_true_cost_at_their_rate() -> None:
    """Although screening looks at the costs to see which layers to measure more."""
    inside = []
    for seed in range(100):
        table = made_up(seed, 30, 22)
        estimates = screen(range(30), 22, lambda layer, first, end, table=table: list(table[layer, first:end]))
        inside += [holds(estimates[layer], cost) for layer, cost in enumerate(true_costs(seed, 30))]
    assert 0.91 <= numpy.mean(inside) <= 0.98


def test_screening_measures_a_quarter_and_finds_the_cheapest_layer() -> None:
    found = []
    for seed in range(50):
        table = made_up(seed, 30, 22)
        measured = 0

        def measure(layer: int, first: int, end: int, table: numpy.ndarray = table) -> Sequence[float]:
            nonlocal measured
            measured += end - first
            return list(table[layer, first:end])

        estimates = screen(range(30), 22, measure)
        assert measured <= 30 * 22 / 4
        best = min(estimates, key=lambda layer: estimates[layer].mean)
        found.append(best == table.mean(axis=1).argmin())
    assert numpy.mean(found) >= 0.9


def test_a_layer_that_saw_every_block_has_its_exact_cost_and_interval() -> None:
    table = made_up(0, 9, 8)
    estimates = screen(range(9), 8, lambda layer, first, end: list(table[layer, first:end]))
    whole = [layer for layer, estimate in estimates.items() if len(estimate.differences) == 8]
    assert len(whole) >= 2
    for layer in whole:
        assert estimates[layer].mean == pytest.approx(table[layer].mean())
        assert estimates[layer].interval == t_interval(list(table[layer]))


def test_one_block_has_no_interval() -> None:
    (estimate,) = screen(["only"], 1, lambda *_: [0.5]).values()
    assert (estimate.mean, estimate.interval) == (0.5, None)


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 5))
def test_no_block_is_asked_for_twice_and_every_layer_gets_some(layers: int, blocks: int, seed: int) -> None:
    table = made_up(seed, layers, blocks)
    asked: dict[int, list[int]] = {layer: [] for layer in range(layers)}

    def measure(layer: int, first: int, end: int) -> Sequence[float]:
        asked[layer] += range(first, end)
        return list(table[layer, first:end])

    estimates = screen(range(layers), blocks, measure)
    for layer, numbers in asked.items():
        assert numbers == list(range(len(numbers)))
        assert len(numbers) >= min(FIRST_BLOCKS, blocks)
        if blocks > 1:
            low, high = estimates[layer].interval or (math.nan, math.nan)
            assert -math.inf < low <= estimates[layer].mean <= high < math.inf


@given(st.lists(st.lists(st.just(0.0), min_size=2, max_size=3), min_size=1, max_size=4))
def test_codecs_that_cost_nothing_give_intervals_of_nothing(rows: list[list[float]]) -> None:
    for estimate in estimates_of(dict(enumerate(rows)), 10).values():
        assert estimate.interval == (0.0, 0.0)

"""Screening: honest intervals, few measurements, exact where it matters."""

import math
from collections.abc import Sequence

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leankv.screening import FIRST_BLOCKS, intervals, screen


def made_up(seed: int, layers: int, blocks: int) -> numpy.ndarray:
    """Differences `[layers, blocks]` as sweeps show them: costs over orders of magnitude, spread in proportion."""
    rng = numpy.random.default_rng(seed)
    costs = numpy.exp(rng.normal(-2.5, 0.9, layers))
    spread = 0.3 * numpy.exp(rng.normal(0, 0.3, layers))
    return costs[:, None] * (1 + rng.normal(0, 0.15, blocks) + spread[:, None] * rng.normal(size=(layers, blocks)))


def test_intervals_hold_the_exact_cost_at_their_rate() -> None:
    """95 % intervals from 2 to 11 of 22 blocks, 200 sweeps of 30 layers."""
    inside = []
    for seed in range(200):
        table = made_up(seed, 30, 22)
        seen = [2, 4, 11][seed % 3]
        estimates = intervals({layer: list(row[:seen]) for layer, row in enumerate(table)}, 22)
        exact = table.mean(axis=1)
        inside += [estimates[layer].low <= exact[layer] <= estimates[layer].high for layer in range(30)]
    assert 0.92 <= numpy.mean(inside) <= 0.98


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


def test_a_layer_that_saw_every_block_has_its_exact_cost() -> None:
    table = made_up(0, 9, 8)
    estimates = screen(range(9), 8, lambda layer, first, end: list(table[layer, first:end]))
    whole = [layer for layer, estimate in estimates.items() if len(estimate.differences) == 8]
    assert len(whole) >= 2
    for layer in whole:
        assert estimates[layer].low == estimates[layer].high == pytest.approx(table[layer].mean())


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
        assert estimates[layer].low <= estimates[layer].mean <= estimates[layer].high
        assert all(math.isfinite(end) for end in (estimates[layer].low, estimates[layer].high))


@given(st.lists(st.lists(st.just(0.0), min_size=2, max_size=3), min_size=1, max_size=4))
def test_codecs_that_cost_nothing_give_intervals_of_nothing(rows: list[list[float]]) -> None:
    for estimate in intervals(dict(enumerate(rows)), 10).values():
        assert (estimate.low, estimate.high) == (0.0, 0.0)

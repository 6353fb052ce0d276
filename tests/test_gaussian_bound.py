"""Reverse water-filling, against its definition and its known properties."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leankv.evaluation.rate_distortion import decibels_over_bound, least_error

SPECTRA = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40)
BITS = st.floats(0, 300)
a_few_times = settings(max_examples=40)


def by_bisection(variances: list[float], bits: float) -> float:
    """The slow twin: the level is found by halving an interval of its logarithm."""
    low, high = math.log2(min(variances)) - 2 * bits - 1, math.log2(max(variances))
    for _ in range(200):
        middle = (low + high) / 2
        if sum(max(0.0, math.log2(variance) - middle) / 2 for variance in variances) > bits:
            low = middle
        else:
            high = middle
    return math.fsum(min(2.0**high, variance) for variance in variances)


@a_few_times
@given(SPECTRA, BITS)
def test_it_is_what_bisection_finds(variances: list[float], bits: float) -> None:
    assert least_error(variances, bits) == pytest.approx(by_bisection(variances, bits), rel=1e-9)


@a_few_times
@given(SPECTRA)
def test_no_bits_leave_all_the_variance(variances: list[float]) -> None:
    assert least_error(variances, 0) == pytest.approx(math.fsum(variances), rel=1e-12)


@a_few_times
@given(SPECTRA, BITS, st.floats(0, 50))
def test_it_falls_and_is_convex(variances: list[float], bits: float, more: float) -> None:
    first, middle, last = (least_error(variances, bits + step * more) for step in (0, 1, 2))
    slack = 1e-9 * first
    assert first >= middle - slack
    assert first - middle >= middle - last - slack


@a_few_times
@given(st.integers(1, 64), st.floats(1e-3, 1e3), BITS)
def test_equal_variances_share_the_bits_alike(width: int, variance: float, bits: float) -> None:
    assert least_error([variance] * width, bits) == pytest.approx(width * variance * 2 ** (-2 * bits / width), rel=1e-9)


@a_few_times
@given(SPECTRA, BITS, st.floats(1e-3, 1e3))
def test_it_scales_with_the_variances(variances: list[float], bits: float, scale: float) -> None:
    scaled = least_error([scale * variance for variance in variances], bits)
    assert scaled == pytest.approx(scale * least_error(variances, bits), rel=1e-9)


@a_few_times
@given(SPECTRA, BITS)
def test_components_that_do_not_vary_change_nothing(variances: list[float], bits: float) -> None:
    assert least_error([0.0, *variances, -1e-12], bits) == least_error(variances, bits)


def test_a_hand_worked_example() -> None:
    """Two bits: one for each halving of the larger component to the smaller one's 1; then half a bit each."""
    assert least_error([4.0, 1.0], 1) == pytest.approx(2)
    assert least_error([4.0, 1.0], 2) == pytest.approx(1)


def test_distance_in_decibels() -> None:
    assert decibels_over_bound(2.0, [4.0, 1.0], 1) == pytest.approx(0)
    assert decibels_over_bound(20.0, [4.0, 1.0], 1) == pytest.approx(10)
    assert decibels_over_bound(1.0, [4.0, 1.0], 1) == pytest.approx(-10 * math.log10(2))


def test_no_distance_where_there_is_no_error() -> None:
    assert decibels_over_bound(0.0, [1.0], 16) is None
    assert decibels_over_bound(1.0, [0.0, 0.0], 1) is None

"""The betting test: how often it is wrong, how soon it is right, and what its bound is chosen by."""

import math
from collections.abc import Callable

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leankv.search.betting import (
    BettingTest,
    choose_clip,
    documents_needed,
    least_documents,
    log_wealth_paths,
)

ALPHA = 0.05
Draw = Callable[[numpy.random.Generator, tuple[int, int]], numpy.ndarray]

COST, DEVIATION = 0.018, 0.0099
"""Of `resid(share:-2,transform:s0.02)` on 81 WikiText-2 articles, in nats a token."""


def costs_of_articles(generator: numpy.random.Generator, shape: tuple[int, ...]) -> numpy.ndarray:
    """Like those: skewed, from near zero up."""
    return generator.gamma((COST / DEVIATION) ** 2, DEVIATION**2 / COST, shape)


def won(values: numpy.ndarray, clip: float, alpha: float = ALPHA) -> numpy.ndarray:
    """Which sequences ever reject."""
    rejected: numpy.ndarray = (log_wealth_paths(values, clip, alpha) >= math.log(1 / alpha)).any(axis=-1)
    return rejected


def run(values: numpy.ndarray | list[float], clip: float, alpha: float = ALPHA) -> BettingTest:
    test = BettingTest(clip, alpha)
    for value in values:
        test.add(float(value))
    return test


# -- how often it is wrong ---------------------------------------------------------------------------------------------

# Each with mean zero, the last case that is to be rejected seldom, and within a bound of 1.
AT_THE_BORDER: dict[str, Draw] = {
    "as often 1 as -1": lambda generator, shape: generator.choice([-1.0, 1.0], shape),
    "often -0.1, seldom 1": lambda generator, shape: numpy.where(generator.random(shape) < 1 / 11, 1.0, -0.1),
    "very often -0.02, very seldom 1": lambda generator, shape: numpy.where(generator.random(shape) < 1 / 51, 1, -0.02),
    "often 0.1, seldom -1": lambda generator, shape: numpy.where(generator.random(shape) < 1 / 11, -1.0, 0.1),
    "heavy tails": lambda generator, shape: numpy.tanh(generator.standard_t(2, shape)),
    "little spread": lambda generator, shape: generator.uniform(-0.1, 0.1, shape),
}


@pytest.mark.parametrize("name", AT_THE_BORDER)
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_what_is_at_the_border_is_rejected_at_most_alpha_of_the_time_however_long_one_looks(
    name: str, alpha: float
) -> None:
    sequences = 4000
    values = AT_THE_BORDER[name](numpy.random.default_rng(0), (sequences, 300))
    error = math.sqrt(alpha * (1 - alpha) / sequences)
    assert won(values, 1.0, alpha).mean() <= alpha + 3 * error


def test_the_level_is_used_where_losses_are_rare() -> None:
    """The test above could not fail for a test that never rejects."""
    values = AT_THE_BORDER["very often -0.02, very seldom 1"](numpy.random.default_rng(0), (4000, 300))
    assert won(values, 1.0).mean() > ALPHA / 5


def test_values_beyond_the_bound_count_as_the_bound_and_those_above_are_counted() -> None:
    beyond, within = run([-3.0, 2.5, 9.0, 1.0], 1.0), run([-1.0, 1.0, 1.0, 1.0], 1.0)
    assert beyond.wealth == within.wealth
    assert (beyond.n_clipped, within.n_clipped) == (2, 0)


# -- how soon it is right ----------------------------------------------------------------------------------------------

# Budget in percent, bound in nats -> articles that these bets took at a largest stake of a half, measured.
ARTICLES = {
    (7, 0.5): 64,
    (7, 0.2): 27,
    (7, 0.1): 15,
    (5, 0.2): 42,
    (3, 0.5): 265,
    (3, 0.2): 108,
    (3, 0.1): 56,
    (3, 0.05): 30,
    (2.5, 0.05): 52,
}


@pytest.mark.parametrize(("budget", "clip"), ARTICLES)
def test_it_takes_fewer_documents_than_were_measured_at_half_the_stake(budget: float, clip: float) -> None:
    values = costs_of_articles(numpy.random.default_rng(1), (400,)) - math.log1p(budget / 100)
    needed = documents_needed(values.tolist(), clip, ALPHA)
    assert needed is not None
    assert 0.4 * ARTICLES[budget, clip] < needed < 0.8 * ARTICLES[budget, clip]


def test_the_least_number_is_what_a_plan_without_any_cost_takes() -> None:
    for budget, clip in [(7, 0.5), (7, 0.05), (1, 0.1), (0.1, 0.01)]:
        allowed = math.log1p(budget / 100)
        least = least_documents(allowed, clip, ALPHA)
        assert not run([-allowed] * (least - 1), clip).rejected
        assert run([-allowed] * least, clip).rejected


def test_no_number_is_told_for_what_costs_as_much_as_is_allowed() -> None:
    assert documents_needed([0.01, -0.01, 0.02, -0.02], 0.1, ALPHA) is None
    assert documents_needed([0.01, 0.02], 0.1, ALPHA) is None


def test_what_was_rejected_stays_so() -> None:
    test = run([-1.0] * 10 + [1.0] * 10, 1.0)
    assert test.rejected
    assert test.wealth < 1


# -- giving up ---------------------------------------------------------------------------------------------------------


def given_up_after(values: numpy.ndarray, clip: float) -> int | None:
    """How many of these values it takes to give up; None where it never does."""
    test = BettingTest(clip, ALPHA)
    for number, value in enumerate(values, 1):
        test.add(float(value))
        if test.is_hopeless(len(values) - number):
            return number
    return None


def test_a_plan_far_over_its_budget_is_given_up_after_few_documents() -> None:
    values = costs_of_articles(numpy.random.default_rng(2), (200,)) - math.log1p(0.01)
    after = given_up_after(values, 0.1)
    assert after is not None
    assert after < 20


def test_what_would_have_been_certified_is_seldom_given_up() -> None:
    values = costs_of_articles(numpy.random.default_rng(3), (300, 80)) - math.log1p(0.03)
    would = won(values, 0.1)
    assert would.mean() > 0.9
    lost = [row for row in values[would] if (after := given_up_after(row, 0.1)) and not run(row[:after], 0.1).rejected]
    assert len(lost) < 0.02 * would.sum()


def test_too_few_that_are_left_make_it_hopeless_and_enough_do_not() -> None:
    test = run([-0.05] * 10, 1.0)
    needed = math.log(1 / ALPHA / test.wealth) / math.log1p(0.9 * 0.05)
    assert test.is_hopeless(math.floor(needed))
    assert not test.is_hopeless(math.ceil(needed))


# -- properties --------------------------------------------------------------------------------------------------------

VALUES = st.lists(st.floats(-5, 5), min_size=1, max_size=60)
SCALES = st.sampled_from([2.0**power for power in range(-20, 21)])  # exact in floats


@given(VALUES, st.floats(0.01, 10), st.floats(0.001, 0.5))
def test_wealth_is_above_zero_and_the_same_one_by_one_as_all_at_once(
    values: list[float], clip: float, alpha: float
) -> None:
    test = BettingTest(clip, alpha)
    path = log_wealth_paths(numpy.array(values), clip, alpha)
    for value, log in zip(values, path, strict=True):
        test.add(value)
        assert test.wealth > 0
        assert math.log(test.wealth) == pytest.approx(min(log, 700), abs=1e-9)
    assert test.count == len(values)


@given(VALUES, SCALES)
def test_the_unit_of_values_and_bound_does_not_matter(values: list[float], scale: float) -> None:
    one, other = run(values, 1.0), run([scale * value for value in values], scale)
    assert (one.wealth, one.rejected, one.n_clipped) == (other.wealth, other.rejected, other.n_clipped)


@given(VALUES, st.integers(0, 59), st.floats(0, 3))
def test_no_stake_depends_on_the_value_that_it_is_put_on(values: list[float], place: int, less: float) -> None:
    """Its own wealth only moves the way the value does: a smaller value never leaves less."""
    place %= len(values)
    before = run(values[:place], 1.0)
    assert run([*values[:place], values[place] - less], 1.0).wealth >= run(values[: place + 1], 1.0).wealth
    if values[place] <= 0:
        assert run(values[: place + 1], 1.0).wealth >= before.wealth


# -- the bound ---------------------------------------------------------------------------------------------------------

DIFFERENCES = st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=40)


@given(DIFFERENCES, SCALES)
def test_the_bound_has_the_unit_of_the_differences(differences: list[float], scale: float) -> None:
    scaled = choose_clip([scale * difference for difference in differences], scale * 0.05)
    assert scaled == pytest.approx(scale * choose_clip(differences, 0.05))


@given(DIFFERENCES)
def test_no_selection_document_of_a_plan_within_its_budget_is_cut(differences: list[float]) -> None:
    mean = math.fsum(differences) / len(differences)
    allowed = max(mean, 0.01)
    assert all(difference - allowed <= choose_clip(differences, allowed) for difference in differences)


def test_fewer_selection_blocks_make_it_wider() -> None:
    pattern = [0.01, 0.03]
    clips = [choose_clip(pattern * times, 0.001) for times in (2, 4, 8, 16)]
    assert clips == pytest.approx([0.06, 0.06 / math.sqrt(2), 0.03, 0.03])


@pytest.mark.parametrize("blocks", [4, 16])
def test_with_bounds_chosen_on_selection_text_heavy_tails_do_not_break_the_level(blocks: int) -> None:
    """A plan that costs just what is allowed, and differs between documents as lognormal numbers do, cut or not."""
    generator, cost, sequences = numpy.random.default_rng(4), 0.03, 2000
    spread = math.sqrt((math.e - 1) * math.e)
    costs = cost + 0.01 * (generator.lognormal(0, 1, (sequences, blocks + 100)) - math.exp(0.5)) / spread
    clips = [choose_clip(own[:blocks].tolist(), cost) for own in costs]
    values = (costs[:, blocks:] - cost) / numpy.array(clips)[:, None]
    assert (values > 1).any(), "some are cut, or this shows nothing"
    assert won(values, 1.0).mean() <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / sequences)

"""Choosing layers, budgets and lists of layers."""

import itertools
import random
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leankv.config.notation import Budget, parse_layers
from leankv.errors import UserError
from leankv.search.greedy import select_layers

pytestmark = pytest.mark.whole_runs

Measure = Callable[[tuple[int, ...]], float]

# Whole numbers, so that sums are exact and ties happen.
costs_alone = st.dictionaries(st.integers(0, 30), st.integers(-3, 12).map(float), max_size=8)
budgets = st.integers(0, 30).map(float)


@st.composite
def situations(draw: st.DrawFn) -> tuple[dict[int, float], float, dict[tuple[int, ...], float]]:
    """Costs alone, a budget, and a joint cost for every set of layers: any numbers at all."""
    costs = draw(st.dictionaries(st.integers(0, 30), st.integers(-3, 12).map(float), max_size=6))
    sets = [s for size in range(1, len(costs) + 1) for s in itertools.combinations(sorted(costs), size)]
    joint = draw(st.lists(st.integers(-3, 25).map(float), min_size=len(sets), max_size=len(sets)))
    return costs, draw(budgets), dict(zip(sets, joint, strict=True))


def additive(costs: dict[int, float]) -> Measure:
    return lambda layers: sum(costs[layer] for layer in layers)


def obvious_choice(costs: dict[int, float], budget: float, joint: dict[tuple[int, ...], float]) -> set[int]:
    """The rule, written for reading: cheapest first, the lower layer first on ties, keep what fits."""
    left, chosen = set(costs), set[int]()
    while left:
        cheapest = min(costs[layer] for layer in left)
        layer = min(layer for layer in left if costs[layer] == cheapest)
        left.remove(layer)
        if costs[layer] <= budget and joint[tuple(sorted(chosen | {layer}))] <= budget:
            chosen.add(layer)
    return chosen


@given(situations())
def test_the_choice_is_the_obvious_one(
    situation: tuple[dict[int, float], float, dict[tuple[int, ...], float]],
) -> None:
    costs, budget, joint = situation
    chosen, _ = select_layers(costs, budget, joint.__getitem__)
    assert set(chosen) == obvious_choice(costs, budget, joint)
    assert list(chosen) == sorted(chosen)


@given(situations())
def test_a_choice_is_always_within_the_budget_as_measured(
    situation: tuple[dict[int, float], float, dict[tuple[int, ...], float]],
) -> None:
    costs, budget, joint = situation
    chosen, _ = select_layers(costs, budget, joint.__getitem__)
    assert not chosen or joint[chosen] <= budget


@given(situations())
def test_the_steps_tell_what_was_measured(
    situation: tuple[dict[int, float], float, dict[tuple[int, ...], float]],
) -> None:
    """Each layer is one step; each measured set is measured once, and its step holds what was returned."""
    costs, budget, joint = situation
    measured: list[tuple[int, ...]] = []

    def measure(layers: tuple[int, ...]) -> float:
        measured.append(layers)
        return joint[layers]

    chosen, steps = select_layers(costs, budget, measure)
    assert sorted(step.layer for step in steps) == sorted(costs)
    assert [step.layers for step in steps if step.joint_cost is not None] == measured
    assert len(set(measured)) == len(measured)
    so_far: set[int] = set()
    for step in steps:
        assert step.cost == costs[step.layer]
        assert step.layers == tuple(sorted(so_far | {step.layer}))
        assert step.predicted == sum(costs[layer] for layer in step.layers)
        if step.verdict == "over budget alone":
            assert step.joint_cost is None
            assert step.cost > budget
        else:
            assert step.joint_cost == joint[step.layers]
            assert (step.joint_cost <= budget) == (step.verdict == "kept")
        if step.verdict == "kept":
            so_far.add(step.layer)
    assert so_far == set(chosen)


@given(situations())
def test_layers_over_budget_alone_are_never_measured(
    situation: tuple[dict[int, float], float, dict[tuple[int, ...], float]],
) -> None:
    costs, budget, joint = situation
    dear = {layer for layer, cost in costs.items() if cost > budget}

    def measure(layers: tuple[int, ...]) -> float:
        assert not dear & set(layers)
        return joint[layers]

    select_layers(costs, budget, measure)


@given(costs_alone.map(lambda costs: {layer: abs(cost) for layer, cost in costs.items()}), budgets)
def test_where_costs_add_up_the_cheapest_layers_are_taken_until_the_budget_is_spent(
    costs: dict[int, float], budget: float
) -> None:
    chosen, _ = select_layers(costs, budget, additive(costs))
    in_order = sorted(costs, key=lambda layer: (costs[layer], layer))
    assert set(chosen) == set(in_order[: len(chosen)])
    assert sum(costs[layer] for layer in in_order[: len(chosen) + 1]) > budget or len(chosen) == len(costs)


@given(costs_alone, budgets, st.randoms(use_true_random=False))
def test_the_order_in_which_costs_are_given_does_not_matter(
    costs: dict[int, float], budget: float, rng: random.Random
) -> None:
    shuffled = list(costs.items())
    rng.shuffle(shuffled)
    assert select_layers(dict(shuffled), budget, additive(costs)) == select_layers(costs, budget, additive(costs))


def test_ties_go_to_the_lower_layer() -> None:
    costs = {7: 1.0, 2: 1.0, 5: 1.0}
    assert select_layers(costs, 2, additive(costs))[0] == (2, 5)


def test_a_layer_that_breaks_the_budget_is_left_out_and_later_ones_are_tried() -> None:
    """Layer 1 does badly beside layer 0, layer 2 does well: costs do not add up."""
    joint = {(0,): 0.5, (0, 1): 9.0, (0, 2): 1.5}
    chosen, steps = select_layers({0: 0.5, 1: 0.6, 2: 0.7}, 2.0, joint.__getitem__)
    assert chosen == (0, 2)
    assert [step.verdict for step in steps] == ["kept", "over budget", "kept"]


def test_a_cost_of_exactly_the_budget_is_allowed() -> None:
    assert select_layers({3: 2.5}, 2.5, lambda layers: 2.5)[0] == (3,)


def test_nothing_is_chosen_when_nothing_fits() -> None:
    def measure(layers: tuple[int, ...]) -> float:
        raise AssertionError("nothing is worth measuring")

    chosen, steps = select_layers({0: 3.0, 1: 4.0}, 2.5, measure)
    assert chosen == ()
    assert [step.verdict for step in steps] == ["over budget alone"] * 2
    assert select_layers({}, 2.5, measure) == ((), [])


def test_a_joint_cost_that_is_not_a_number_is_not_within_budget() -> None:
    assert select_layers({0: 1.0}, 2.5, lambda layers: float("nan"))[0] == ()


# -- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "amount", "percent"),
    [("2.5", 2.5, False), ("7%", 7, True), (" 7 % ", 7, True), ("0.05", 0.05, False), ("1e-2%", 0.01, True)],
)
def test_budgets_are_points_or_percent(text: str, amount: float, percent: bool) -> None:
    assert Budget.parse(text) == Budget(amount, percent)


@pytest.mark.parametrize("text", ["abc", "-1", "-7%", "nan", "nan%", "inf", "-inf", "1e999", "0", "0%", "%", "", "7%%"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(repr(text))):
        Budget.parse(text)


def test_percent_are_of_the_base_perplexity() -> None:
    assert Budget.parse("7%").points(20.0) == pytest.approx(1.4)
    assert Budget.parse("2.5").points(20.0) == 2.5


@given(st.integers(1, 10**5), st.booleans())
def test_a_budget_prints_as_it_is_read(hundredths: int, percent: bool) -> None:
    budget = Budget(hundredths / 100, percent)
    assert Budget.parse(str(budget)) == budget


# -- lists of layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "layers"),
    [("12", (12,)), ("3-5", (3, 4, 5)), ("7-7", (7,)), ("4,0,4", (0, 4)), (" 0 , 2 - 3,1", (0, 1, 2, 3))],
)
def test_layers_are_numbers_and_ranges(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers
    assert parse_layers(text, 80) == layers


def test_the_seeds_layers() -> None:
    assert parse_layers("40-63", 80) == tuple(range(40, 64))
    assert parse_layers("all", 80) == tuple(range(80))


@pytest.mark.parametrize("text", ["", ",", "a", "-1", "1-", "1--2", "1-2-3", "1.5", "0,,1", "1 2", "²", "ALL"])
def test_what_is_no_list_of_layers_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(repr(text))):
        parse_layers(text)


def test_a_range_that_runs_backwards_is_refused_with_the_way_round_it() -> None:
    with pytest.raises(UserError, match="write 3-5"):
        parse_layers("5-3")


@pytest.mark.parametrize("text", ["4", "0-4", "0,99"])
def test_layers_that_the_model_does_not_have_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="last layer, which is 3"):
        parse_layers(text, 4)


@given(st.sets(st.integers(0, 50), min_size=1))
def test_any_set_of_layers_can_be_written(layers: set[int]) -> None:
    assert parse_layers(",".join(map(str, layers))) == tuple(sorted(layers))

"""Searches over plans, on made-up costs whose best choice is known."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leankv.search.evolution import evolve
from leankv.search.local_search import refine
from leankv.search.path import Path, frontier
from leankv.search.plan_space import Option, PlanSpace, ladder
from leankv.search.water_filling import SHARED, Prediction, waterfill

BLOCKS = 8


def rates(site: int, levels: int = 6, size: float = 100.0) -> tuple[Option, ...]:
    """A ladder whose error quarters with every step of its size, as at high rates."""
    return tuple(Option(f"s{site}.{level}", (size * (levels - level),), 10.0, (4.0**level,)) for level in range(levels))


def space_of(sites: int, **limits) -> PlanSpace:
    return PlanSpace(tuple(range(sites)), tuple(rates(site) for site in range(sites)), 50.0, 10000.0, **limits)


def quadratic(space: PlanSpace, weights):
    """Costs that are the weighted errors, on blocks that differ."""

    def cost(choice) -> float:
        return float(np.dot(weights, space.at(space.errors, choice)))

    def measure(choice, first, end):
        return [cost(choice) * (1 + 0.3 * math.sin(block)) for block in range(first, end)]

    def contributions(choice, time=0):
        return dict(zip(space.sites, weights * space.at(space.errors, choice), strict=True))

    return cost, measure, contributions


@given(st.lists(st.tuples(st.floats(1, 1000), st.floats(0, 1000)), min_size=1, max_size=12), st.floats(1e-3, 1e3))
def test_a_ladder_holds_the_best_option_at_every_price(pairs, price):
    options = [Option(str(number), (size,), 0, (error,)) for number, (size, error) in enumerate(pairs)]
    best = min(option.error + price * option.size for option in options)
    kept = ladder(options)
    assert min(option.error + price * option.size for option in kept) == pytest.approx(best)
    assert [option.size for option in kept] == sorted((option.size for option in kept), reverse=True)
    assert all(later.error > former.error for former, later in itertools.pairwise(kept))


def chain_of(sites: int, tax: float, seed: int = 0) -> PlanSpace:
    """Sites in a row, each predicted from the two before it: behind coarse ones it takes up to `tax` more, and errs."""
    rng = random.Random(seed)
    options = []
    for site in range(sites):
        grown = [1.0, 1 + tax * rng.uniform(0.2, 0.5), 1 + tax]
        options.append(
            tuple(
                Option(
                    f"s{site}.{level}",
                    tuple(by * 100.0 * (6 - level) for by in grown),
                    10.0,
                    tuple((1 + 0.1 * by) * 4.0**level for by in grown),
                    tuple(min(2.0, level * 0.35 + beside * 0.2) for beside in range(3)),
                )
                for level in range(6)
            )
        )
    contexts = tuple((site - 1 if site else None, site - 2 if site > 1 else None) for site in range(sites))
    return PlanSpace(tuple(range(sites)), tuple(options), 50.0, 10000.0, contexts=contexts)


choices = st.lists(st.integers(0, 5), min_size=5, max_size=5).map(tuple)


@given(choices, st.integers(0, 4), st.floats(0, 2))
def test_numbers_are_read_off_between_the_levels_of_what_a_site_is_predicted_from(choice, site, tax):
    space = chain_of(5, tax)
    sizes, errors, left = [], [], []
    for number, index in enumerate(choice):
        level = sum(left[number - back] for back in (1, 2) if number >= back) / 2
        option = space.options[number][index]
        size, error, own = (
            float(np.interp(level, [0, 1, 2], each)) for each in (option.sizes, option.errors, option.levels)
        )
        sizes.append(size)
        errors.append(error)
        left.append(own)
    assert space.size(choice) == pytest.approx(50.0 + sum(sizes), rel=1e-3)
    assert space.at(space.errors, choice) == pytest.approx(np.array(errors), rel=1e-3)
    changed = [(*choice[:site], index, *choice[site + 1 :]) for index in range(6)]
    assert 50.0 + space.totals(space.sizes, changed) == pytest.approx(np.array([space.size(each) for each in changed]))


@settings(max_examples=10)
@given(st.lists(st.floats(3e-3, 1e-1), min_size=4, max_size=4), st.floats(1e-6, 1e-2), st.floats(0, 1.5))
def test_at_a_price_no_site_alone_can_do_better_in_a_chain(weights, price, tax):
    space = chain_of(4, tax)
    cost, _, contributions = quadratic(space, weights)
    prediction = Prediction(space, (2,) * 4, contributions((2,) * 4), cost((2,) * 4), shared=0)

    def total(choice):
        return cost(choice) + price * space.size(choice)

    found = prediction.at_price(price)
    for site, index in itertools.product(range(4), range(6)):
        assert total(found) <= total((*found[:site], index, *found[site + 1 :])) + 1e-9
    every = min(map(total, itertools.product(range(6), repeat=4)))
    assert total(found) <= 1.1 * every


def test_bytes_that_others_pay_are_paid_in_a_chain():
    """What a coarse site costs its readers is weighed: the same costs, fewer bytes than where it is not."""
    space, rng = chain_of(20, 3.0), random.Random(4)
    weights = [10 ** rng.uniform(-5, -2) for _ in space.sites]
    cost, measure, contributions = quadratic(space, weights)
    start, wanted = (2,) * 20, 0.1
    blind = replace(space, contexts=())
    found, unaware = (
        Prediction(each, start, contributions(start), cost(start), shared=0).smallest_within(wanted)
        for each in (space, blind)
    )
    assert cost(found) <= wanted
    assert space.size(found) < 0.97 * space.size(unaware)
    path = Path(space, measure, BLOCKS)
    best, _ = waterfill(path, start, contributions, wanted, 12)
    assert best.size <= space.size(found) * 1.01


@settings(max_examples=30)
@given(st.lists(st.floats(1e-4, 1e-1), min_size=3, max_size=4), st.floats(0.01, 10.0))
def test_water_filling_is_as_good_as_trying_every_choice_on_the_hull(weights, wanted):
    space = space_of(len(weights))
    cost, _, contributions = quadratic(space, weights)
    start = (2,) * len(weights)
    prediction = Prediction(space, start, contributions(start), cost(start), shared=0)
    found = prediction.smallest_within(wanted)
    every = list(itertools.product(range(6), repeat=len(weights)))
    within = [choice for choice in every if cost(choice) <= wanted]
    if not within:
        assert found == (0,) * len(weights)
        return
    assert cost(found) <= wanted * (1 + 1e-9)
    # One level of one site; sites of the same slope take a level together, at one price.
    slopes = [weight * 4**level for weight in weights for level in range(-6, 7)]
    together = max(sum(math.isclose(each, slope, rel_tol=1e-6) for each in slopes) for slope in slopes)
    assert space.size(found) <= min(map(space.size, within)) + 100.0 * together


def test_a_site_that_seems_to_cost_nothing_is_not_taken_for_free():
    space = space_of(3)
    prediction = Prediction(space, (2,) * 3, {0: 0.0, 1: 0.01, 2: -0.004}, 0.01)
    assert prediction.of((2,) * 3) == pytest.approx(0.01)
    assert prediction.of((3, 2, 2)) > 0.0105
    assert prediction.of((2, 2, 3)) > 0.0105


def test_what_two_texts_say_counts_alike():
    space, at = space_of(2), (2, 2)
    first = Prediction(space, at, {0: 0.03, 1: 0.01}, 0.04, shared=0)
    both = Prediction(space, at, {0: 0.01, 1: 0.03}, 0.04, first, shared=0)
    assert both.of(at) == pytest.approx(0.04)
    assert both.of((3, 2)) == pytest.approx(both.of((2, 3)))


def test_plans_for_some_text_cost_other_text_less_where_contributions_are_shared():
    """Blocks say different things of a site; what one says too little of is dear on others."""
    space, rng = space_of(20), random.Random(5)
    start, wanted = (2,) * 20, space_of(20).size((3,) * 20)
    costs: dict[float, list[float]] = {0.0: [], SHARED: []}
    for _ in range(20):
        truth = [10 ** rng.gauss(-4, 0.5) for _ in space.sites]
        seen = [sum(rng.gammavariate(0.3, weight / 0.3) for _ in range(4)) / 4 for weight in truth]
        cost, _, _ = quadratic(space, truth)
        _, _, contributions = quadratic(space, seen)
        for shared, found in costs.items():
            prediction = Prediction(space, start, contributions(start), 1.0, shared=shared)
            found.append(cost(prediction.cheapest_within(wanted)) / cost((3,) * 20))
    assert np.mean(costs[SHARED]) < np.mean(costs[0.0]) - 0.02


def test_waterfill_finds_the_cost_that_is_wanted_though_predictions_miss():
    space, rng = space_of(20), random.Random(1)
    weights = [10 ** rng.uniform(-5, -3) for _ in space.sites]
    _, measure, contributions = quadratic(space, weights)

    def half_of_it(choice, time):  # a prediction that is off by a factor which depends on the site
        return {site: value * (0.5 + site % 3) for site, value in contributions(choice).items()}

    path = Path(space, lambda *asked: [1.7 * x for x in measure(*asked)], BLOCKS)
    wanted = 0.05 * 1.7
    best, _ = waterfill(path, (3,) * 20, half_of_it, wanted, 12)
    assert path.evaluations <= 12
    assert best.cost <= wanted
    assert best.cost > 0.7 * wanted
    uniform = [
        step for step in (path.record((level,) * 20, "uniform", "") for level in range(6)) if step.cost <= wanted
    ]
    assert best.size < min(step.size for step in uniform)


def test_waterfill_comes_close_where_costs_rise_twice_as_fast_as_predictions():
    space, rng = space_of(40), random.Random(2)
    weights = [10 ** rng.uniform(-5, -3) for _ in space.sites]
    cost, _, contributions = quadratic(space, weights)
    path = Path(space, lambda choice, first, end: [40 * cost(choice) ** 2] * (end - first), BLOCKS)
    wanted = 0.05
    best, _ = waterfill(path, (4,) * 40, contributions, wanted, 12)
    assert 0.9 * wanted < best.cost <= wanted
    assert path.evaluations <= 12


def test_refine_mends_sensitivities_that_are_wrong_for_a_group():
    space = space_of(12)
    truth = [1e-3] * 6 + [1e-4] * 6
    _, measure, _ = quadratic(space, truth)
    _, _, wrong = quadratic(space, [1e-4] * 6 + [1e-3] * 6)
    path = Path(space, measure, BLOCKS)
    start, prediction = waterfill(path, (3,) * 12, wrong, 0.3, 6)
    before = path.evaluations
    best, _ = refine(path, start, prediction, [range(6), range(6, 12)], 30)
    assert path.evaluations - before <= 30
    assert best.size <= start.size
    assert best.cost < 0.8 * start.cost


def test_evolve_keeps_bytes_and_never_gets_worse():
    space, rng = space_of(10), random.Random(3)
    weights = [10 ** rng.uniform(-5, -2) for _ in space.sites]
    _, measure, _ = quadratic(space, weights)
    path = Path(space, measure, BLOCKS)
    start = path.record((3,) * 10, "uniform", "")
    best = evolve(path, start, 60, seed=0)
    assert path.evaluations <= 61
    assert best.size <= start.size
    assert best.cost < 0.7 * start.cost
    costs = [step.cost for step in path.steps]
    assert costs == sorted(costs, reverse=True)


def test_evolve_ends_where_all_plans_nearby_are_known():
    """What is known costs no evaluation, so their number alone would not end it."""
    space = space_of(3)
    _, measure, _ = quadratic(space, [1e-3, 2e-3, 3e-3])
    path = Path(space, measure, BLOCKS)
    start = path.record((3,) * 3, "uniform", "")
    best = evolve(path, start, 10_000, seed=0)
    assert path.evaluations < 6**3
    assert best.cost <= start.cost


def test_memory_for_codecs_is_a_limit():
    heavy = tuple(Option(f"h{level}", (60.0 * (6 - level),), 100.0, (4.0**level,)) for level in range(6))
    light = tuple(Option(f"l{level}", (100.0 * (6 - level),), 1.0, (4.0**level,)) for level in range(6))
    options = ladder([*heavy, *light]) + light  # the hull has heavy ones only
    limited = PlanSpace(tuple(range(5)), (options,) * 5, 0.0, 10000.0, max_codec_bytes=250)
    prediction = Prediction(limited, (0,) * 5, dict.fromkeys(range(5), 1e-3), 5e-3)
    for wanted in (0.02, 0.2, 1.0):
        choice = prediction.smallest_within(wanted)
        assert limited.codec_bytes(choice) <= 250
        assert prediction.of(choice) <= wanted


def test_a_frontier_has_only_what_no_other_beats():
    space = space_of(2)
    _, measure, _ = quadratic(space, [1e-3, 1e-3])
    path = Path(space, measure, BLOCKS)
    for choice in itertools.product(range(6), repeat=2):
        path.record(choice, "all", "")
    kept = frontier(path.steps)
    for step in path.steps:
        assert any(own.cost <= step.cost and own.size <= step.size for own in kept)
    for former, later in itertools.pairwise(kept):
        assert former.cost < later.cost
        assert former.size > later.size


def test_a_part_of_an_evaluation_counts_as_a_part_and_nothing_is_measured_twice():
    space = space_of(2)
    calls = []

    def measure(choice, first, end):
        calls.append((choice, first, end))
        return [1.0] * (end - first)

    path = Path(space, measure, BLOCKS)
    path.cost((0, 0), 2)
    path.cost((0, 0))
    path.cost((0, 0), 4)
    path.record((0, 0), "x", "")
    assert path.evaluations == pytest.approx(1)
    assert calls == [((0, 0), 0, 2), ((0, 0), 2, 8)]

"""Certificates, and which of several plans gets one: in order, to the first that fails, as MAPIE's test has it."""

import dataclasses
import json
import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapie.risk_control import control_fwer
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

from leankv.errors import UserError
from leankv.search.betting import log_wealth_paths
from leankv.search.certificate import Certificate, fixed_sequence

ALPHA = 0.05

CERTIFICATE = Certificate(
    certified=True,
    confidence=0.95,
    budget_percent=7.0,
    source="wikitext-2",
    documents=15,
    documents_available=51,
    documents_left_out=3,
    least_tokens=256,
    block_length=1024,
    tokens=15345,
    cost_percent=1.8,
    deviation=0.0099,
    clip=0.1,
    share_clipped=0.0,
    wealth=21.3,
    documents_needed=None,
)


# -- fixed sequences ---------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=12))
def test_plans_are_tested_in_order_and_none_behind_the_first_that_fails(passes: list[bool]) -> None:
    tested: list[int] = []

    def test(plan: int) -> bool:
        tested.append(plan)
        return passes[plan]

    last = fixed_sequence(range(len(passes)), test)
    n_passed = passes.index(False) if False in passes else len(passes)
    assert tested == list(range(min(n_passed + 1, len(passes))))
    assert last == (n_passed - 1 if n_passed else None)


def test_a_false_certificate_for_any_plan_is_as_rare_as_for_one() -> None:
    """Ten plans, all but the first just at the border: each alone would be passed now and then."""
    generator, runs = numpy.random.default_rng(0), 2000
    values = numpy.where(generator.random((runs, 10, 200)) < 1 / 11, 1.0, -0.1)
    values[:, 0] -= 0.5
    passes = (log_wealth_paths(values, 1.0, ALPHA) >= math.log(1 / ALPHA)).any(axis=-1)
    shipped = [fixed_sequence(range(10), own.__getitem__) for own in passes]
    assert all(plan is not None for plan in shipped)
    wrong = sum(bool(plan) for plan in shipped) / runs
    assert wrong <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)


# -- beside MAPIE ------------------------------------------------------------------------------------------------------


def passed_by_mapie(losses: numpy.ndarray, allowed: float, binary: bool) -> int:
    """How many plans its fixed-sequence test passes; losses in `[0, 1]`, `[plans, documents]`."""
    p_values = compute_hoeffding_bentkus_p_value(losses.mean(axis=1), losses.shape[1], allowed, binary=binary)
    return len(control_fwer(p_values[:, 0], ALPHA, "fixed_sequence"))


def passed_by_us(losses: numpy.ndarray, allowed: float) -> int:
    """The same by bets; a loss less what is allowed is at most `1 - allowed`."""

    def test(plan: int) -> bool:
        path = log_wealth_paths(losses[plan] - allowed, max(allowed, 1 - allowed), ALPHA)
        return bool((path >= math.log(1 / ALPHA)).any())

    last = fixed_sequence(range(len(losses)), test)
    return 0 if last is None else last + 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("rates", "n_passed"),
    [([0.01, 0.05, 0.1, 0.75, 0.05], 3), ([0.75, 0.01], 0), ([0.02, 0.04, 0.08], 3), ([0.05, 0.7, 0.8], 1)],
)
def test_on_binary_losses_the_same_plans_pass_where_it_is_clear(rates: list[float], n_passed: int, seed: int) -> None:
    generator = numpy.random.default_rng(seed)
    losses = (generator.random((len(rates), 400)) < numpy.array(rates)[:, None]).astype(float)
    for allowed in (0.3, 0.4):
        assert passed_by_mapie(losses, allowed, binary=True) == n_passed
        assert passed_by_us(losses, allowed) == n_passed


@pytest.mark.parametrize("seed", range(5))
def test_on_losses_that_vary_little_it_passes_no_fewer_and_often_more(seed: int) -> None:
    """Costs of documents, as a share of a bound: where a test that uses the variance is the tighter one."""
    generator = numpy.random.default_rng(seed)
    means = numpy.linspace(0.3, 0.5, 21)
    losses = numpy.clip(means[:, None] + 0.05 * generator.standard_normal((21, 60)), 0, 1)
    ours, theirs = passed_by_us(losses, 0.5), passed_by_mapie(losses, 0.5, binary=False)
    assert ours > theirs > 0
    assert means[ours - 1] < 0.5


# -- what a certificate says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"certified": False, "deviation": None, "documents_needed": 120}])
def test_a_certificate_is_the_same_when_it_is_read_back(changes: dict[str, object]) -> None:
    certificate = dataclasses.replace(CERTIFICATE, **changes)  # type: ignore[arg-type]
    assert Certificate.from_json(json.loads(json.dumps(certificate.to_json()))) == certificate


@pytest.mark.parametrize("values", [None, {}, {**CERTIFICATE.to_json(), "more": 1}])
def test_what_is_no_certificate_is_refused(values: object) -> None:
    with pytest.raises(UserError, match="certify the plan again"):
        Certificate.from_json(values)


def test_it_says_what_it_claims_of_which_text_and_on_what() -> None:
    words = CERTIFICATE.sentence()
    for part in ("at most +7 %", "95 % confidence", "first 1024 tokens", "wikitext-2", "15 documents", "0% clipped"):
        assert part in words
    failed = dataclasses.replace(CERTIFICATE, certified=False, documents_needed=120)
    assert failed.sentence().startswith("not certified for +7 %")
    assert "about 120 documents" in failed.sentence()
    assert "no number" in dataclasses.replace(failed, documents_needed=None).sentence()

"""What people write in one word: amounts of memory, sites, budgets."""

import pytest

from leankv.config.notation import Budget, parse_budgets, parse_bytes, parse_sites
from leankv.errors import UserError


@pytest.mark.parametrize(("text", "expected"), [("16MB", 16_000_000), ("1.5 gb", 1_500_000_000), ("700", 700)])
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "16 miles"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="amount of memory"):
        parse_bytes(text)


def test_sites_are_parts_with_layers() -> None:
    assert parse_sites("k:0-1,3,v:2", 4, ("k", "v")) == {(0, "k"), (1, "k"), (3, "k"), (2, "v")}
    assert len(parse_sites("all", 4, ("k", "v"))) == 8


def test_a_budget_in_points_is_a_rise_of_the_base_perplexity() -> None:
    assert Budget.parse("2").percent_of(20.0) == 10
    assert Budget.parse("7%").percent_of(20.0) == 7
    assert [str(budget) for budget in parse_budgets("1%,2.5")] == ["1%", "2.5"]

"""The peak of a piece of work, against examples counted by hand."""

from typing import Any

import pytest
import torch

from leankv.evaluation.step_peak import peak_bytes, watched

CPU = torch.device("cpu")


def test_what_is_alive_at_once_counts() -> None:
    def work() -> None:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(300)
        del second, third

    assert peak_bytes(work, CPU) == 4 * (1000 + 500)


def test_temporaries_count_and_work_in_place_does_not() -> None:
    held, other = torch.ones(1000), torch.ones(1000)
    assert peak_bytes(lambda: held.add_(other), CPU) == 0
    assert peak_bytes(lambda: held.add_(other.mul(held).neg()), CPU) == 2 * 4000
    assert peak_bytes(lambda: held.add_(other.mul(held).neg_()), CPU) == 4000


def test_views_and_nothing_take_nothing() -> None:
    held = torch.ones(1000)
    assert peak_bytes(lambda: held[10:].reshape(2, -1), CPU) == 0
    assert peak_bytes(lambda: None, CPU) == 0


def test_what_was_there_before_makes_room_when_it_is_freed() -> None:
    """As in a cache that is copied to grow: old and new of one layer are alive at once, not old and new of all."""
    with watched(CPU):
        held: list[Any] = [torch.empty(1000) for _ in range(4)]

    def grow() -> None:
        for index, own in enumerate(held):
            held[index] = torch.cat([own, own[:1]])

    # Each copy is 4 bytes more than what it takes the place of; the last stands beside three of those.
    assert peak_bytes(grow, CPU) == 3 * 4 + 4004


def test_temporaries_inside_of_operations_count() -> None:
    held = torch.arange(1000.0)
    inside = peak_bytes(lambda: held.sort(descending=True), CPU)
    assert inside >= 4000 + 8000  # values and places


def test_an_error_ends_the_measurement_and_the_next_one_is_right() -> None:
    def fails() -> None:
        torch.empty(100)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        peak_bytes(fails, CPU)
    assert peak_bytes(lambda: torch.empty(250), CPU) == 1000

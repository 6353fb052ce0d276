"""Selection: which layers to compress together under a budget. Knows numbers only; `measure` is handed in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["kept", "over budget", "over budget alone"]


@dataclass(frozen=True)
class Step:
    """One layer considered.

    Attributes:
        layer: which.
        cost: its own cost, in perplexity points.
        layers: the set with it, sorted.
        joint_cost: measured cost of that set; None when it was not measured (`over budget alone`).
        predicted: sum of the set's single costs: a prediction, and costs do not add up.
        verdict: `kept`; `over budget` (the set with it is); `over budget alone` (its own cost is: adding others to it
            is not tried).
    """

    layer: int
    cost: float
    layers: tuple[int, ...]
    joint_cost: float | None
    predicted: float
    verdict: Verdict


def select_layers(
    costs: Mapping[int, float], budget: float, measure: Callable[[tuple[int, ...]], float]
) -> tuple[tuple[int, ...], list[Step]]:
    """Add layers in order of cost while the set's measured joint cost stays within the budget.

    After each addition the whole set is measured again. A layer that would break the budget is left out, and the next
    one is tried; so the search ends when none fits.

    Args:
        costs: layer -> its cost alone, in perplexity points.
        budget: joint cost allowed, in perplexity points.
        measure: sorted layers -> joint cost, in perplexity points.

    Returns:
        The chosen layers, sorted, and every step.
    """
    chosen: tuple[int, ...] = ()
    steps: list[Step] = []
    for layer in sorted(costs, key=lambda layer: (costs[layer], layer)):
        candidate = tuple(sorted((*chosen, layer)))
        predicted = sum(costs[member] for member in candidate)
        if costs[layer] > budget:
            steps.append(Step(layer, costs[layer], candidate, None, predicted, "over budget alone"))
            continue
        joint_cost = measure(candidate)
        fits = joint_cost <= budget
        steps.append(Step(layer, costs[layer], candidate, joint_cost, predicted, "kept" if fits else "over budget"))
        if fits:
            chosen = candidate
    return chosen, steps

"""`refine`: measured changes around a plan, each at the same number of bytes, until none pays.

Sites are taken in groups (keys or values of neighbouring layers), since what one site more or less coarse changes is
near the noise of a measurement. A move makes one group coarser, or finer, and lets all others pay for it: their rates
follow from the prediction at the slope that gives the same bytes. Each move is measured on few blocks beside the plan
it starts from, the same blocks for all; what seems to pay there is measured on all. What pays is kept, and the
prediction remembers it; a round in which nothing pays halves the moves, and the search ends when they are small.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from leankv.search.path import Measured, Path
from leankv.search.water_filling import Prediction

FIRST_TILT, LEAST_TILT = 4.0, 1.4  # factors of a group's predicted cost; a step twice as long has four times the energy
LARGEST_TILT = 64.0  # where levels lie far apart, less may change nothing
FEW = 4  # a move is first measured on one block in so many
PAYS = 2e-3  # of the cost: less is not worth a plan of its own


@dataclass
class _State:
    here: Measured
    prediction: Prediction


def refine(
    path: Path,
    start: Measured,
    prediction: Prediction,
    groups: Sequence[Sequence[int]],
    max_evaluations: float,
) -> tuple[Measured, Prediction]:
    """Lower the cost of a plan at its number of bytes.

    Args:
        path: measures.
        start: the plan to begin at.
        prediction: what choices around it are expected to cost.
        groups: numbers of the sites that move together.
        max_evaluations: full evaluations that may be spent.

    Returns:
        The best step, and the prediction as its moves have corrected it.
    """
    first, state = path.evaluations, _State(start, prediction)
    tilt, few = FIRST_TILT, max(1, path.n_blocks // FEW)
    while tilt >= LEAST_TILT:
        paid = False
        for group in groups:
            for factor in (tilt, 1 / tilt):
                if path.evaluations - first + 1 + few / path.n_blocks > max_evaluations:
                    return state.here, state.prediction
                if _tried(path, state, dict.fromkeys(group, factor), few):
                    paid = True
                    break  # the other direction was just left
        if not paid:
            tilt = tilt**0.5
    return state.here, state.prediction


def _tried(path: Path, state: _State, factors: Mapping[int, float], few: int) -> bool:
    """Whether a move pays; then it is made."""
    choice = state.here.choice
    while choice == state.here.choice and max(*factors.values(), *(1 / f for f in factors.values())) <= LARGEST_TILT:
        tilted = state.prediction.tilted(factors)
        choice = tilted.cheapest_within(state.here.size)
        factors = {site: factor**2 for site, factor in factors.items()}
    if choice == state.here.choice:
        return False
    if path.cost(choice, few) >= path.cost(state.here.choice, few):
        return False
    if path.cost(choice) >= (1 - PAYS) * state.here.cost:
        return False
    state.here = path.record(choice, "refine", _named(path, factors), state.prediction.of(choice))
    state.prediction = tilted
    return True


def _named(path: Path, factors: Mapping[int, float]) -> str:
    sites, factor = list(factors), next(iter(factors.values()))
    names = f"{path.space.sites[sites[0]]} to {path.space.sites[sites[-1]]}"
    return f"{names} {'finer' if factor > 1 else 'coarser'}"

"""`evolve`: level switches that keep the total of bytes, the fittest of each generation surviving.

EvoPress (Sieberling, Kuznedelev, Kurtic and Alistarh, 2024, arXiv 2410.14649, algorithm 1): one parent; its offspring
differ by a few switches, each making one site a level coarser and others finer for as many bytes; they are measured on
few tokens, the best of them on more, and the last few on all beside the parent, who stays unless one of them is better.
"""

import random
from collections.abc import Sequence

from leankv.search.path import Measured, Path
from leankv.search.plan_space import Choice, PlanSpace

OFFSPRING = 16
STAGES = ((8, 4), (2, 1))
"""One block in so many, and how many survive it. EvoPress' own stages have token counts of a GPU; these keep the share
of a generation that is spent on all blocks at two of its five full evaluations."""
SWITCHES = 3  # at most; the paper draws min of two uniform numbers, so that few are the likeliest
TRIES = 64
IDLE = 8  # generations that change and measure nothing, after which there is nothing left nearby (assumption)


def evolve(path: Path, start: Measured, max_evaluations: float, seed: int) -> Measured:
    """Lower the cost of a plan at no more than its bytes.

    Args:
        path: measures.
        start: the plan to begin at.
        max_evaluations: full evaluations that may be spent.
        seed: of what is drawn.

    Returns:
        The last parent.
    """
    first, rng, parent = path.evaluations, random.Random(seed), start
    generation, idle = 0, 0
    while idle < IDLE:
        offspring = _offspring(path.space, parent.choice, start.size, rng)
        needed = _evaluations(len(offspring), path.n_blocks)
        if not offspring or path.evaluations - first + needed > max_evaluations:
            break
        generation += 1
        before = path.evaluations
        for one_in, survivors in STAGES:
            blocks = max(1, path.n_blocks // one_in)
            offspring = sorted(offspring, key=lambda choice: path.cost(choice, blocks))[:survivors]
        if path.cost(offspring[0]) < parent.cost:
            parent = path.record(offspring[0], "evolve", f"generation {generation}")
            idle = 0
        else:  # what is known already costs nothing, so the limit alone would not end a small space
            idle = idle + 1 if path.evaluations == before else 0
    return parent


def _evaluations(offspring: int, n_blocks: int) -> float:
    """Full evaluations that a generation takes at most."""
    total, alive = 1.0, offspring
    for one_in, survivors in STAGES:
        total += alive * max(1, n_blocks // one_in) / n_blocks
        alive = min(alive, survivors)
    return total


def _offspring(space: PlanSpace, parent: Choice, size: float, rng: random.Random) -> list[Choice]:
    """Choices a few switches from the parent, no larger than `size`."""
    found: dict[Choice, None] = {}
    for _ in range(TRIES * OFFSPRING):
        choice = parent
        for _ in range(min(rng.randint(1, SWITCHES), rng.randint(1, SWITCHES))):
            choice = _switched(space, choice, size, rng)
        if choice != parent and space.codec_bytes(choice) <= space.max_codec_bytes:
            found[choice] = None
        if len(found) == OFFSPRING:
            break
    return list(found)


def _switched(space: PlanSpace, choice: Choice, size: float, rng: random.Random) -> Choice:
    """One site finer, and others coarser until the bytes are no more than `size`."""
    finer = rng.randrange(len(choice))
    switched = space.moved(choice, [finer], -1)
    others: Sequence[int] = [site for site in range(len(choice)) if site != finer]
    for site in rng.sample(others, len(others)):
        if space.size(switched) <= size:
            return switched
        switched = space.moved(switched, [site], 1)
    return switched if space.size(switched) <= size else choice

"""Costs by screening: a run's candidates measured on as many selection blocks as the choice depends on."""

import random
from collections.abc import Callable, Sequence

from leankv.evaluation.perplexity import BlockNats, Comparison, comparison_of
from leankv.search.successive_halving import Candidate, screen
from leankv.studies.plan_evaluator import PlanEvaluator


def screened_costs(
    evaluator: PlanEvaluator,
    candidates: Sequence[Candidate],
    measure: Callable[[Candidate, Sequence[int]], BlockNats],
    title: str,
) -> dict[Candidate, tuple[Comparison, float]]:
    """Each candidate's cost as far as the choice depends on it, and the seconds it took.

    See `leankv.search.successive_halving`.

    Args:
        evaluator: has the base perplexity and the seed of the blocks' order.
        candidates: what may be compressed: layers, or parts of layers.
        measure: candidate, numbers of selection blocks -> nats of these blocks with it compressed.
        title: of the progress bar.
    """
    base = evaluator.base()
    order = list(range(len(base.nats)))
    random.Random(evaluator.workspace.experiment.seed).shuffle(order)
    seconds = dict.fromkeys(candidates, 0.0)
    with evaluator.workspace.progress.stage(title, len(candidates)) as step:

        def differences(candidate: Candidate, first: int, end: int) -> list[float]:
            numbers = order[first:end]
            measured = measure(candidate, numbers)
            seconds[candidate] += measured.seconds
            if first == 0:  # each candidate counts once, however often it is measured
                step()
            return [
                (nats - base.nats[number]) / base.tokens_per_block
                for number, nats in zip(numbers, measured.nats, strict=True)
            ]

        estimates = screen(candidates, len(order), differences)
    return {
        candidate: (
            comparison_of(base, estimate.mean, estimate.interval, len(estimate.differences)),
            seconds[candidate],
        )
        for candidate, estimate in estimates.items()
    }

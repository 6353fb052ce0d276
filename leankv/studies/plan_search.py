"""Searching plans: the strategies of `leankv.search` at work on a workspace's codecs, text and model."""

import math
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from leankv.cache.plan import PlanSpec, Site
from leankv.calibration.sensitivity import site_contributions
from leankv.codecs import Recipe
from leankv.codecs.trainable import require_trainable
from leankv.config.experiment import SelectionConfig
from leankv.config.plan_table import EXACT
from leankv.data.blocks import Blocks
from leankv.evaluation.perplexity import compare, feeding_of
from leankv.search.evolution import evolve
from leankv.search.local_search import refine
from leankv.search.path import Measured, Path, frontier
from leankv.search.plan_space import Choice, PlanSpace
from leankv.search.water_filling import Prediction, best_within, cheapest_within, fill_to_size, waterfill
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.plan_options import (
    plan_of,
    plan_space,
    reference_recipes,
    same_everywhere,
    search_recipes,
    search_sites,
)
from leankv.studies.stored_bytes import bytes_of_plan

MOST_EVALUATIONS = {"waterfill": 12, "refine": 60, "evolve": 200}
"""Full evaluations that a strategy may spend."""

CONTRIBUTION_BLOCKS = 8  # each time; contributions of 60 sites are then known to 18 % (log of 2026-11-30)

CONTRIBUTION_REVISION = 1
"""Raised when the contributions of a plan's sites change."""

LARGEST_FACTOR = 4.0  # assumption: a factor beyond this between two lengths of text is noise of a cost near nothing

BANDS = 5  # assumption: keys and values of a fifth of the layers move together in `refine`

FRONTIER = (0.35, 0.5, 0.65, 0.8, 0.9)
"""Parts of the wanted cost at which a plan is measured too: a certificate may ask for one that costs less."""


@dataclass(frozen=True)
class Found:
    """What one search came to.

    Attributes:
        steps: every plan that was measured on all blocks, in order.
        plans: the steps' plans.
        best: the smallest step within the wanted cost, or the cheapest.
        evaluations: strategy -> full evaluations that it spent.
        seconds: strategy -> what it took.
    """

    steps: tuple[Measured, ...]
    plans: tuple[PlanSpec, ...]
    best: Measured
    evaluations: Mapping[str, float]
    seconds: Mapping[str, float]

    def frontier(self) -> list[tuple[Measured, PlanSpec]]:
        """The plans that no other beats, from the cheapest (and largest) to the dearest."""
        plans = dict(zip((step.choice for step in self.steps), self.plans, strict=True))
        return [(step, plans[step.choice]) for step in frontier(self.steps)]


class PlanSearch:
    """One search: what it may choose from, and how that is measured.

    Attributes:
        evaluator: fits to the middle reference plan (`CodecStore.with_reference`), and measures.
        unreferenced: the same, fitting each plan's codecs to what the plan itself leaves.
        space: the choices.
        path: what was measured.
    """

    def __init__(self, evaluator: PlanEvaluator, selection: SelectionConfig):
        """
        Args:
            evaluator: of the workspace, with the protocol that costs are wanted under.
            selection: what is wanted.

        Raises:
            UserError: recipes or sites do not suit the model, or limits contradict each other.
        """
        workspace = evaluator.workspace
        self.recipes = search_recipes(selection.recipes, workspace.experiment.fit.error_metric)
        for recipe in self.recipes:
            workspace.checked(PlanSpec.uniform(recipe))
            if selection.refit == "distill":
                require_trainable(recipe)
        self._sites = search_sites(workspace, selection)
        # Those that predict, where any do.
        rates = [recipe for recipe in self.recipes if recipe.n_context_layers] or self.recipes
        references = reference_recipes(rates)
        fitting = {recipe: evaluator.with_reference(same_everywhere(self._sites, recipe)) for recipe in references}
        for each in fitting.values():
            each.codecs.fit([same_everywhere(self._sites, recipe) for recipe in self.recipes])
        # From fine to coarse, whatever the order they were named in.
        self._rates = self._by_error(fitting[references[len(references) // 2]], rates)
        references.sort(key=self._rates.index)
        own = [fitting[recipe] for recipe in references]
        middle = len(references) // 2
        self.reference, self.evaluator = same_everywhere(self._sites, references[middle]), own[middle]
        self.unreferenced = evaluator
        # What a decoding step takes depends little on rates: the reference plan stands for all.
        peak = peak_of(self.long, self.reference, selection.minimize)
        self.space: PlanSpace = plan_space(own, selection, self._sites, self.recipes, references, peak)
        blocks = workspace.blocks("selection")
        self.order = random.Random(workspace.experiment.seed).sample(range(len(blocks)), len(blocks))
        self._base = self.evaluator.base()
        self.path = Path(self.space, self._measure, len(self.order))

    def _by_error(self, evaluator: PlanEvaluator, recipes: Sequence[Recipe]) -> list[Recipe]:
        """Recipes by their error at the last site, which has all layers to predict from."""
        last = self._sites[-1:]
        errors = {
            recipe: evaluator.codecs.codecs(same_everywhere(last, recipe))[last[0]].error or 0.0 for recipe in recipes
        }
        return sorted(recipes, key=errors.__getitem__)

    def plan(self, choice: Choice) -> PlanSpec:
        """The plan of a choice."""
        names: dict[Any, str] = self.space.names(choice)
        return plan_of(names)

    def _measure(self, choice: Choice, first: int, end: int) -> Sequence[float]:
        ids = self.order[first:end]
        title = f"a plan at a ratio of {self.space.ratio(choice):.1f}"
        compressed = self.evaluator.nats_by_batch(self.plan(choice), title, ids)
        base = [self._base.nats[number] for number in ids]
        return [(c - b) / self._base.tokens_per_block for b, c in zip(base, compressed.nats, strict=True)]

    def contributions(self, choice: Choice, round_: int) -> Mapping[Hashable, float]:
        """What each site contributes to a choice's cost, nats a token; looked up where it was measured before.

        Args:
            choice: the plan.
            round_: how often contributions were asked for before: each time other blocks are read, as far as they go.
        """
        spec, workspace = self.plan(choice), self.evaluator.workspace
        n_blocks = min(CONTRIBUTION_BLOCKS, len(self.order))
        places = [(round_ * n_blocks + place) % len(self.order) for place in range(n_blocks)]
        blocks = [workspace.blocks("selection").take([self.order[place]]) for place in places]
        feeding = feeding_of(self.evaluator.protocol, blocks[0].tokens.shape[1])

        def of_block(block: Blocks, step: Callable[[], None]) -> dict[str, float]:
            model, protocol = workspace.loaded.model, self.evaluator.protocol
            cache = self.evaluator.new_cache(spec, decode_once=True)
            found = site_contributions(model, block.tokens, feeding, cache.fresh, protocol.coded_after, step)
            return {f"{site.layer}.{site.part}": value for site, value in found.items()}

        # A block a cell, so that workers share them, and a killed run loses one.
        with workspace.progress.stage("contributions of all sites", len(blocks)) as step:
            asked = [
                (
                    {"revision": CONTRIBUTION_REVISION, **self.evaluator.depends_on(spec, block)},
                    partial(of_block, block, step),
                )
                for block in blocks
            ]
            found = list(workspace.cells.in_order("contributions", asked))
        means = {name: math.fsum(own[name] for own in found) / len(found) for name in found[0]}
        return {Site(int(name.split(".")[0]), name.split(".")[1]): value for name, value in means.items()}

    def start(self, wanted: float) -> Choice:
        """A uniform choice whose cost is about what is wanted: rates are tried on few blocks, from the middle one on.

        Args:
            wanted: nats a token.
        """
        rungs = self._rungs()
        place, few = len(rungs) // 2, max(1, self.path.n_blocks // 4)
        tried: dict[int, float] = {}
        while 0 <= place < len(rungs) and place not in tried:
            tried[place] = self.path.cost(rungs[place], few)
            place += 1 if tried[place] < wanted else -1
        return rungs[min(tried, key=lambda each: abs(tried[each] - wanted))]

    def start_at_size(self, size: float) -> Choice:
        """The uniform choice whose size is the nearest."""
        return min(self._rungs(), key=lambda choice: abs(math.log(self.space.size(choice) / size)))

    def _rungs(self) -> list[Choice]:
        """The uniform choices, from fine to coarse."""
        return [self._nearest(recipe) for recipe in self._rates]

    def length_factor(self, wanted: float) -> float:
        """How many times as much a plan costs in blocks as long as those of reports, as in the search's own.

        Longer texts have a smaller share of exact tokens. Seen at one uniform plan, that of `start(wanted)`.
        """
        experiment = self.evaluator.workspace.experiment
        if experiment.length_of("selection") == experiment.measured_length:
            return 1.0
        choice = self.start(wanted)
        cost = compare(self.long.base(), self.long.nats_by_batch(self.plan(choice), "selection text in long blocks"))
        factor = math.log1p(cost.delta_percent / 100) / max(self.path.cost(choice), 1e-9)
        return min(max(factor, 1 / LARGEST_FACTOR), LARGEST_FACTOR)

    @cached_property
    def long(self) -> PlanEvaluator:
        """Measures on selection blocks as long as those of reports, with the codecs of the search."""
        return self.evaluator.with_long_blocks()

    @cached_property
    def long_refitted(self) -> PlanEvaluator:
        """The same with codecs that are fitted to each plan."""
        return self.unreferenced.with_long_blocks()

    @cached_property
    def long_distilled(self) -> PlanEvaluator:
        """The same with codecs that are trained together, for each plan."""
        return self.evaluator.with_distilled_codecs().with_long_blocks()

    def _nearest(self, recipe: Recipe) -> Choice:
        """Every site at this recipe; where it is no option of a site, at the one with the error that is nearest."""
        stored = self.evaluator.codecs.codecs(same_everywhere(self._sites, recipe))
        choice = []
        for site, options in zip(self._sites, self.space.options, strict=True):
            names = [option.name for option in options]
            if recipe.text in names:
                choice.append(names.index(recipe.text))
                continue
            error = stored[site].error or 0.0
            coded = [index for index, name in enumerate(names) if name != EXACT] or [0]  # nothing may be worth coding
            choice.append(min(coded, key=lambda index: abs(options[index].error - error)))
        return tuple(choice)

    def groups(self) -> list[list[int]]:
        """Sites that move together: keys or values of neighbouring layers."""
        n_layers = self.evaluator.workspace.n_layers
        groups: dict[tuple[str, int], list[int]] = {}
        for number, site in enumerate(self._sites):
            groups.setdefault((site.part, site.layer * BANDS // n_layers), []).append(number)
        return list(groups.values())


def peak_of(evaluator: PlanEvaluator, spec: PlanSpec, minimize: str) -> int:
    """Bytes that a decoding step takes over what is held under a plan, on a real cache; 0 where they do not count."""
    return bytes_of_plan(evaluator, "selection", spec).peak_step if minimize == "all-in" else 0


def search(own: PlanSearch, strategies: Sequence[str], wanted: float, target_ratio: float | None = None) -> Found:
    """Run strategies one after another, each from what the one before found.

    Args:
        own: what to search.
        strategies: `waterfill` first.
        wanted: nats a token that the plan may cost in blocks as long as those of reports.
        target_ratio: given, the cost is made least at this ratio of bytes instead.
    """
    path, progress = own.path, own.evaluator.workspace.progress
    size = None if target_ratio is None else own.space.base / target_ratio
    evaluations = path.evaluations  # what it takes to find a uniform plan to begin at counts as the first strategy's
    wanted /= own.length_factor(wanted)
    spent: dict[str, float] = {}
    seconds: dict[str, float] = {}
    best: Measured | None = None
    prediction: Prediction | None = None
    for strategy in strategies:
        started = time.monotonic()
        most = MOST_EVALUATIONS[strategy]
        if strategy == "waterfill" and size is not None:
            best, prediction = fill_to_size(path, own.start_at_size(size), own.contributions, size)
        elif strategy == "waterfill":
            start = own.start(wanted)
            left = most - (path.evaluations - evaluations) - len(FRONTIER) - 1
            best, prediction = waterfill(path, start, own.contributions, wanted, left)
        elif strategy == "refine":
            assert best is not None
            assert prediction is not None
            best, prediction = refine(path, best, prediction, own.groups(), most - len(FRONTIER) - 1)
        else:
            assert best is not None
            best = evolve(path, best, most, own.evaluator.workspace.experiment.seed)
        if size is None and strategy != "evolve":
            assert prediction is not None
            # Refined, the plan costs less at its bytes: what is left of the budget buys bytes. And others for less.
            for part in (1.0, *reversed(FRONTIER)):
                choice = prediction.smallest_within(wanted * part)
                path.record(choice, strategy, f"{part:.0%} of the budget", prediction.of(choice))
        # Also of what searches under other budgets have measured.
        best = best_within(path.steps, wanted) if size is None else cheapest_within(path.steps, size)
        spent[strategy], seconds[strategy] = path.evaluations - evaluations, time.monotonic() - started
        evaluations = path.evaluations
        progress.say(f"{strategy}: {best.percent:+.2f} % at a ratio of {best.ratio:.1f}")
    assert best is not None
    steps = tuple(path.steps)
    return Found(steps, tuple(own.plan(step.choice) for step in steps), best, spent, seconds)

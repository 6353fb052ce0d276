"""From a model to the best certified plan under a budget: search, certify, measure on report text, write the bundle."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from leankv.cache.plan import PlanSpec
from leankv.config.experiment import Experiment, SelectionConfig
from leankv.config.notation import Budget, parse_budgets, parse_windows
from leankv.errors import NoPlanError, UserError
from leankv.evaluation.perplexity import compare
from leankv.report import run_files
from leankv.report.plans import write_plans_report
from leankv.report.summary import Summary
from leankv.search.certificate import Certificate
from leankv.search.path import Measured
from leankv.storage.files import read_json, write_json
from leankv.storage.locks import locked
from leankv.studies.activation_store import remove_captures
from leankv.studies.certify import certify_candidates, check_certifiable
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.plan_options import Claim, claim_of
from leankv.studies.plan_search import Found, PlanSearch, peak_of, search
from leankv.studies.run_folder import claim_folder
from leankv.studies.select import run_folder, save_bundle, write_manifest
from leankv.studies.summarize import Choosing, summarize

TESTED = (0.35, 0.6, 0.8, 1.0)
"""Of the cost that the best plan has on selection text: the smallest plans within these parts of it are tested.
Assumption: other text shows the same plan at up to twice the cost (log of 2026-11-26), so the first has room for it."""

NEAR_TARGET = 0.98
"""A plan reaches a target ratio from this part of it on: sites go from option to option, and fitted anew a plan takes
some percent more or less (assumption)."""


@dataclass(frozen=True)
class Candidate:
    """A plan of a search's frontier, as it goes to certification.

    Attributes:
        evaluator: measures it, at the length of report blocks and with its own window.
        spec: the plan.
        claim: its bytes, as its own codecs claim them: those that it is certified and shipped with.
        ratio: the bytes that ratios are counted against, over these.
        cost: nats a token that it adds on selection text, in blocks as long as those of reports.
    """

    evaluator: PlanEvaluator
    spec: PlanSpec
    claim: Claim
    ratio: float
    cost: float


def select_plans(evaluator: PlanEvaluator) -> list[Summary]:
    """Search, certify and write a plan for each budget that the experiment names.

    Returns:
        A summary a budget; `summary.json` holds the last one, `plans.json` and `plans.csv` all, and `plan.json` the
        plan, as `--plan` reads it.

    Raises:
        UserError: no plan meets a budget or a ratio (the sentence names the nearest, and other budgets are searched
            first), recipes, sites, windows and limits do not suit the model or each other, or there is too little text
            to certify anything by.
    """
    workspace = evaluator.workspace
    selection, folder = workspace.experiment.selection, run_folder(workspace)
    budgets = parse_budgets(selection.budget)
    windows = parse_windows(selection.windows) if selection.windows else (evaluator.protocol.window,)
    _check_windows(workspace.experiment, windows)
    # What takes hours is not begun where nothing could be certified at its end.
    # Points are percent of a perplexity that takes a pass to know.
    base_ppl = math.nan if all(budget.percent for budget in budgets) else evaluator.base().perplexity
    check_certifiable(evaluator.with_long_blocks(), [budget.percent_of(base_ppl) for budget in budgets])
    claim_folder(workspace.experiment)
    workspace.begin()
    searches = [own for window in windows for own in _searches_of(evaluator, selection, window)]
    summaries, refused = [], []
    for budget in budgets:
        try:
            summaries.append(_select(evaluator, searches, budget, folder, len(budgets) == 1))
        except NoPlanError as error:  # told when the other budgets have had their turn
            refused.append(str(error))
    if refused:
        raise UserError("; ".join(dict.fromkeys(refused)))
    remove_captures(folder)
    write_manifest(workspace)
    return summaries


def _check_windows(experiment: Experiment, windows: Sequence[int]) -> None:
    """Refuse an exact window that leaves nothing of a block to be coded.

    Raises:
        UserError: names the window and the block.
    """
    protocol = experiment.protocol
    lengths = {
        "selection": protocol.coded_after or experiment.length_of("selection"),
        "report": experiment.counted_length,
    }
    for window in windows:
        for split, length in lengths.items():
            if protocol.sinks + window >= length:
                raise UserError(
                    f"{protocol.sinks} sinks and a window of {window} keep every token of {split} blocks of {length} "
                    "exact, so no plan changes anything; give a shorter --window (or --windows), or longer blocks "
                    "(data.block_length, data.selection_block_length)"
                )


def read_selections(folder: Path, experiment: Experiment) -> list[Summary]:
    """What finished selections of an experiment came to, a summary a budget, from its folder.

    Raises:
        UserError: one is not finished.
    """
    path = folder / run_files.PLANS
    kept: list[dict[str, Any]] = read_json(path) if path.is_file() else []
    summaries = []
    for budget in parse_budgets(experiment.selection.budget):
        asked = _asked(budget, experiment)
        own = [entry for entry in kept if all(entry.get(name) == value for name, value in asked.items())]
        if not own:
            raise UserError(f"{folder} holds no finished selection under +{budget}; run leankv select again")
        summaries.append(Summary.from_json(own[0]["summary"]))
    return summaries


def _asked(budget: Budget, experiment: Experiment) -> dict[str, Any]:
    """What tells one selection in a folder from another."""
    selection, protocol = experiment.selection, experiment.protocol
    others = {name: value for name, value in asdict(selection).items() if name != "budget"}
    return {
        "budget": str(budget),
        "strategy": ",".join(_strategies(selection)),
        "minimize": selection.minimize,
        "refit": selection.refit,
        "protocol": protocol.kind,
        "sinks": protocol.sinks,
        "window": protocol.window,
        "settings": {"selection": others, "certification": asdict(experiment.certification)},
    }


def _strategies(selection: SelectionConfig) -> list[str]:
    return [name.strip() for name in selection.strategy.split(",")]


def bundle_name(budget: Budget, is_only: bool) -> str:
    """The folder of a budget's bundle in a run's."""
    return f"bundle{_of_budget(budget, is_only)}"


def _of_budget(budget: Budget, is_only: bool) -> str:
    """What tells files of one budget from those of others."""
    return "" if is_only else f"-{str(budget).replace('%', 'pct')}"


def _searches_of(evaluator: PlanEvaluator, selection: SelectionConfig, window: int) -> list[PlanSearch]:
    """The searches that one window takes: one, or two where a step's peak counts and some recipes predict."""
    own = evaluator if window == evaluator.protocol.window else evaluator.with_window(window)
    searches = [PlanSearch(own, selection)]
    recipes = searches[0].recipes
    alone = [recipe.text for recipe in recipes if not recipe.n_context_layers]
    # A step's peak jumps with the first site that predicts, since what it reads is decoded beside it. Going from site
    # to site, a search would not see that peak go with the last one.
    if selection.minimize == "all-in" and 0 < len(alone) < len(recipes):
        searches.append(PlanSearch(own, replace(selection, recipes=",".join(alone))))
    return searches


def _select(
    evaluator: PlanEvaluator, searches: Sequence[PlanSearch], budget: Budget, folder: Path, is_only: bool
) -> Summary:
    workspace = evaluator.workspace
    selection, started = workspace.experiment.selection, time.monotonic()
    base_ppl = evaluator.base().perplexity
    percent = budget.percent_of(base_ppl)
    wanted = math.log1p(percent / 100)
    strategies = _strategies(selection)
    searches, found = _found(searches, strategies, wanted, selection.target_ratio)
    candidates = _candidates(searches, found, wanted, selection)
    seconds = {f"search, {name}": sum(each.seconds[name] for each in found) for name in strategies}
    seconds["long blocks"] = time.monotonic() - started - sum(seconds.values())
    place, certificates = certify_candidates([(each.evaluator, each.spec) for each in candidates], percent)
    seconds["certify"] = time.monotonic() - started - sum(seconds.values())
    # Where none is certified the safest is shipped all the same, and says so; the bolder ones were not tested.
    chosen, certificate = candidates[place or 0], certificates[place or 0]
    how = Choosing(
        strategy=",".join(strategies),
        minimize=selection.minimize,
        refit=selection.refit,
        evaluations=sum(sum(each.evaluations.values()) for each in found),
        certificate=certificate,
        seconds=seconds,
    )
    # Workers that searched together write the same, one after another.
    with locked(folder / "cells", "selection"):
        summary = summarize(chosen.evaluator, chosen.spec, budget, base_ppl, how)
        save_bundle(chosen.evaluator, chosen.spec, summary, folder / bundle_name(budget, is_only))
        write_json(folder / f"plan{_of_budget(budget, is_only)}.json", chosen.spec.table())
        _keep(folder, budget, summary, chosen, candidates, certificates, found)
        write_json(folder / run_files.SUMMARY, summary.to_json())
        write_plans_report(folder)
    return summary


def _found(
    searches: Sequence[PlanSearch], strategies: Sequence[str], wanted: float, target_ratio: float | None
) -> tuple[list[PlanSearch], list[Found]]:
    """Run searches, for what blocks as long as those of reports shall cost: those that came to something, and to what.

    Raises:
        UserError: none reaches the ratio that is wanted.
    """
    found = [search(own, strategies, wanted, target_ratio) for own in searches]
    if target_ratio is None:
        return list(searches), found
    reached = [place for place, each in enumerate(found) if each.best.ratio >= NEAR_TARGET * target_ratio]
    if not reached:
        largest = max(step.ratio for each in found for step in each.steps if step.is_allowed)
        limit = searches[0].evaluator.workspace.experiment.selection.max_codec_memory
        within = f" with codecs within {limit}" if limit else ""
        raise NoPlanError(
            f"no plan reaches a ratio of {target_ratio:g}{within}: the best has {largest:.1f}; allow coarser recipes, "
            f"a shorter window, {'more memory for codecs, ' if limit else ''}or a lower selection.target_ratio"
        )
    return [searches[place] for place in reached], [found[place] for place in reached]


def _candidates(
    searches: Sequence[PlanSearch], found: Sequence[Found], wanted: float, selection: SelectionConfig
) -> list[Candidate]:
    """The plans to certify, from safe to bold, by their cost on selection text at the length of report blocks.

    Raises:
        UserError: none is within the budget; names the nearest.
    """
    frontier: list[tuple[PlanSearch, Measured, PlanSpec]] = []
    for own, each in zip(searches, found, strict=True):
        for part in TESTED if selection.target_ratio is None else (1.0,):
            inside = [(own, step, spec) for step, spec in each.frontier() if step.cost <= part * each.best.cost]
            frontier += [last for last in inside[-1:] if last not in frontier]
    candidates = []
    for own, step, spec in frontier:
        evaluator = _refitted(own, selection.refit)
        title = f"selection text in long blocks, {step.ratio:.1f}x"
        cost = compare(evaluator.base(), evaluator.nats_by_batch(spec, title))
        peak = peak_of(evaluator, spec, selection.minimize)
        claim = claim_of(evaluator, spec, selection.minimize, peak)
        if claim.codec_bytes > own.space.max_codec_bytes:
            continue  # codecs that were fitted anew may take more memory than the search's
        ratio = own.space.base / claim.size
        candidates.append(Candidate(evaluator, spec, claim, ratio, math.log1p(cost.delta_percent / 100)))
    if not candidates:
        raise NoPlanError(
            "fitted anew, the codecs of every plan take more memory than selection.max_codec_memory allows; ask for a "
            "little less of them, or for selection.refit none"
        )
    return in_order(candidates, wanted, selection.target_ratio)


def in_order(candidates: Sequence[Candidate], wanted: float, target_ratio: float | None) -> list[Candidate]:
    """Those that are worth testing, from safe to bold.

    Args:
        candidates: from all searches.
        wanted: nats a token that a plan may cost.
        target_ratio: given, one alone is tested: the cheapest of those that reach it, or of all where none does any
            more once it is fitted anew.

    Raises:
        UserError: none is within the budget; names the nearest.
    """
    candidates = sorted(candidates, key=lambda each: each.cost)
    if target_ratio is not None:
        near = [each for each in candidates if each.ratio >= NEAR_TARGET * target_ratio]
        candidates = (near or candidates)[:1]
    smaller: list[Candidate] = []
    for candidate in candidates:  # what costs more and saves no more than another is none
        if not smaller or candidate.claim.size < smaller[-1].claim.size:
            smaller.append(candidate)
    within = [candidate for candidate in smaller if candidate.cost <= wanted]
    if not within:
        nearest = min(candidates, key=lambda each: each.cost)
        raise NoPlanError(
            f"no plan keeps within +{100 * math.expm1(wanted):.3g} %: the nearest costs "
            f"{100 * math.expm1(nearest.cost):+.2f} % at a ratio of {nearest.ratio:.1f}; raise the budget, or "
            "allow finer recipes"
        )
    return within


def _refitted(own: PlanSearch, refit: str) -> PlanEvaluator:
    """Measures a search's plans in long blocks, with the codecs that are asked for."""
    if refit == "sequential":
        return own.long_refitted
    return own.long_distilled if refit == "distill" else own.long


def _keep(
    folder: Path,
    budget: Budget,
    summary: Summary,
    chosen: Candidate,
    candidates: Sequence[Candidate],
    certificates: Sequence[Certificate],
    found: Sequence[Found],
) -> None:
    """Put what one selection came to into `plans.json`, in place of an earlier one that was asked the same."""
    path = folder / run_files.PLANS
    kept: list[dict[str, Any]] = read_json(path) if path.is_file() else []
    asked = _asked(budget, chosen.evaluator.workspace.experiment)
    entry = {
        **asked,
        "summary": summary.to_json(),
        "plan": chosen.spec.table(),
        "candidates": [
            {
                "ratio": each.ratio,
                "cost_percent": 100 * math.expm1(each.cost),
                "window": each.evaluator.protocol.window,
                "certificate": certificate.to_json() if certificate else None,
            }
            for each, certificate in zip_longest(candidates, certificates)
        ],
        "steps": [
            {**asdict(step), "choice": list(step.choice), "plan": plan.table(), "percent": step.percent}
            for each in found
            for step, plan in zip(each.steps, each.plans, strict=True)
        ],
        "evaluations": {name: sum(each.evaluations[name] for each in found) for name in found[0].evaluations},
    }
    others = [own for own in kept if any(own.get(name) != value for name, value in asked.items())]
    write_json(path, [*others, entry])

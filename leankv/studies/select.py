"""From a finished sweep to a plan under the budget, its report and its bundle."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from leankv.cache.bundle import CONFIG_FILE, Bundle
from leankv.cache.plan import PlanSpec
from leankv.config.experiment import Experiment
from leankv.config.loading import load_experiment
from leankv.config.notation import Budget, format_layers, parse_layers
from leankv.config.plan_table import EXACT, PARTS
from leankv.errors import UserError
from leankv.evaluation.perplexity import compare
from leankv.models.loading import describe
from leankv.report import run_files
from leankv.report.columns import read_sweep
from leankv.report.model_card import model_card
from leankv.report.summary import Summary
from leankv.search.greedy import Step, select_layers
from leankv.storage.files import read_json, write_json
from leankv.studies.activation_store import remove_captures
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.summarize import Choosing, summarize
from leankv.studies.sweep_origin import difference
from leankv.studies.workspace import Workspace
from leankv.version import __version__


def select(evaluator: PlanEvaluator) -> Summary:
    """Choose layers on the selection split, measure the set on the report split, write selection, summary and bundle.

    Returns:
        What stands in `summary.json`.

    Raises:
        UserError: there is no finished sweep of the layers that may be chosen.
    """
    workspace = evaluator.workspace
    experiment, folder = workspace.experiment, run_folder(workspace)
    costs = _costs(evaluator)
    workspace.begin()
    budget = Budget.parse(experiment.selection.budget)
    base = evaluator.base()
    points = budget.points(base.perplexity)
    affordable = sum(cost <= points for cost in costs.values())
    with workspace.progress.stage(f"selecting under +{points:.2f} points", affordable) as progressed:
        measured: list[tuple[int, ...]] = []

        def measure(layers: tuple[int, ...]) -> float:
            cost = compare(base, evaluator.nats(workspace.plan.only(layers), extends_to_supersets=True)).delta_ppl
            if any(recipe.n_context_layers for recipe in workspace.plan.recipes()):
                # Every set has codecs of its own then; only those that later sets may grow from stay in memory.
                parts = [each for each in measured if set(each) < set(layers)]
                evaluator.codecs.forget(workspace.plan.only(each) for each in (*parts[-1:], layers))
                measured.append(layers)
            progressed(f"{len(layers)} layers: {cost:+.3f}")
            return cost

        chosen, steps = select_layers(costs, points, measure)
    write_json(
        folder / run_files.SELECTION,
        {
            "budget": str(budget),
            "budget_points": points,
            "base_ppl": base.perplexity,
            "split": "selection",
            "selected_layers": list(chosen),
            "steps": [asdict(step) for step in steps],
        },
    )
    summary = _summary(evaluator, budget, chosen, steps)
    write_json(folder / run_files.SUMMARY, summary.to_json())
    save_bundle(evaluator, workspace.plan.only(chosen), summary, folder / "bundle")
    remove_captures(folder)
    write_manifest(workspace)
    return summary


def save_bundle(evaluator: PlanEvaluator, spec: PlanSpec, summary: Summary, folder: Path) -> None:
    """Write a plan's bundle with its model card; where nothing is compressed, remove an earlier choice's."""
    workspace, protocol = evaluator.workspace, evaluator.protocol
    # The protocol that the plan was measured under: a search of windows leaves another one than it began with.
    made_with = asdict(replace(workspace.experiment, protocol=protocol))
    completion, said_by = run_folder(workspace) / run_files.COMPLETION, _codes_of(folder)
    if not spec.sites(workspace.n_layers):
        shutil.rmtree(folder, ignore_errors=True)
        completion.unlink(missing_ok=True)
        return
    bundle = Bundle(
        evaluator.codecs.plan(spec),
        protocol.sinks,
        protocol.window,
        workspace.rotation,
        workspace.loaded.model.config,
        describe(workspace.loaded),
        made_with,
        summary.to_json(),
    )
    bundle.save(folder, model_card(summary, made_with))
    if _codes_of(folder) != said_by:  # else what an earlier bundle said would pass for what this one says
        completion.unlink(missing_ok=True)


def _codes_of(folder: Path) -> list[Any]:
    """What of a saved bundle decides what is generated with it; nothing where there is no bundle."""
    path = folder / CONFIG_FILE
    config = read_json(path) if path.is_file() else {}
    return [config.get(name) for name in ("files", "key_space", "sinks", "window")]


def run_folder(workspace: Workspace) -> Path:
    """The folder that a selection reads from and writes to."""
    assert workspace.folder is not None, "a selection reads a sweep's files and writes a bundle"
    return workspace.folder


def _costs(evaluator: PlanEvaluator) -> dict[int, float]:
    """layer -> cost, of the finished sweep's layers that may be chosen."""
    workspace = evaluator.workspace
    folder = run_folder(workspace)
    table = read_sweep(folder)
    allowed = set(parse_layers(workspace.experiment.selection.layers, workspace.n_layers))
    for _, row in table[table["layer"] < workspace.n_layers].iterrows():
        recipes = [workspace.plan[int(row["layer"]), part] for part in PARTS]
        asked = [EXACT if recipe is None else recipe.text for recipe in recipes]
        asked += [workspace.key_space, evaluator.protocol.kind]
        done = list(row[["codec_k", "codec_v", "key_space", "protocol"]])
        if asked != done:
            raise UserError(
                f"the sweep in {folder} is of {' '.join(done)}, not of {' '.join(asked)}; run leankv sweep with those"
            )
    if differs := difference(evaluator, float(table["base_ppl"].iloc[0])):
        raise UserError(f"the sweep in {folder} {differs}; ask for what it was made with, or run leankv sweep again")
    compressed = {site.layer for site in workspace.plan.sites(workspace.n_layers)}
    swept = set(workspace.layers) & allowed & compressed
    if missing := swept - set(table["layer"]):
        raise UserError(
            f"the sweep in {folder} lacks layers {format_layers(sorted(missing))}; run leankv sweep for them"
        )
    return {
        int(layer): float(cost)
        for layer, cost in zip(table["layer"], table["delta_ppl"], strict=True)
        if layer in swept
    }


def _summary(evaluator: PlanEvaluator, budget: Budget, chosen: tuple[int, ...], steps: list[Step]) -> Summary:
    """The figures a person or program wants first; perplexities are those of the report split."""
    plan, folder = evaluator.workspace.plan, run_folder(evaluator.workspace)
    seconds = {
        "capture": _capture_seconds(folder),
        "fit": _fit_seconds(evaluator),
        "sweep": float(read_sweep(folder)["seconds"].sum()) + evaluator.base().seconds,
        "select": sum(evaluator.nats(plan.only(step.layers)).seconds for step in steps if _joint(step)),
    }
    return summarize(evaluator, plan.only(chosen), budget, evaluator.base().perplexity, Choosing(seconds=seconds))


def _joint(step: Step) -> bool:
    """Whether the selection measured this step itself; a single layer's cost comes from the sweep."""
    return step.joint_cost is not None and len(step.layers) > 1


def _capture_seconds(folder: Path) -> float:
    return sum(read_json(path)["result"]["seconds"] for path in sorted((folder / "cells").glob("capture-*.json")))


def _fit_seconds(evaluator: PlanEvaluator) -> float:
    """What fitting the sweep's codecs took: each layer's, as it is compressed alone."""
    plan = evaluator.workspace.plan
    alone = [evaluator.codecs.codecs(plan.only([layer])) for layer in evaluator.workspace.layers]
    return sum(stored.seconds for own in alone for stored in own.values())


def write_manifest(workspace: Workspace) -> None:
    """`manifest.json`: what made the results. Written last, so its presence means that the run is complete."""
    experiment = workspace.experiment
    write_json(
        run_folder(workspace) / run_files.MANIFEST,
        {
            "leankv": __version__,
            "model": describe(workspace.loaded),
            "data": {split: workspace.blocks(split).hash for split in ("calibration", "selection", "report")},
            "seed": experiment.seed,
            "experiment": asdict(experiment),
        },
    )


def experiment_of(config: Path | None, overrides: dict[str, Any]) -> Experiment:
    """The experiment that a file names; where none is named, the one that its output folder was begun with, if any."""
    if config is not None:
        return load_experiment(config, overrides)
    own = Path(str(overrides.get("output_dir", Experiment().output_dir))) / run_files.EXPERIMENT
    return load_experiment(own if own.is_file() else None, {"output_dir": str(own.parent), **overrides})

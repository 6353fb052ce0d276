"""From a finished sweep to a plan under the budget, its report and its bundle."""

import resource
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import leankv
from leankv.accounting import CONTEXT_LENGTHS, Footprint
from leankv.bundle import save_bundle
from leankv.cache_bytes import bytes_of_plan
from leankv.divergence import divergence_columns
from leankv.errors import UserError
from leankv.experiment import Experiment, load_experiment
from leankv.model import describe
from leankv.model_card import model_card
from leankv.notation import Budget, parse_layers
from leankv.perplexity import compare
from leankv.run import Run
from leankv.selection import Step, select_layers
from leankv.store import read_json, write_json
from leankv.sweep_origin import difference
from leankv.sweep_table import read_sweep
from leankv.workplace import remove_captures


def select(run: Run) -> dict[str, Any]:
    """Choose layers on the selection split, measure the set on the report split, write selection, summary and bundle.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        UserError: there is no finished sweep of the layers that may be chosen.
    """
    experiment = run.experiment
    costs = _costs(run)
    run.begin()
    budget = Budget.parse(experiment.selection.budget)
    base = run.measure("selection", [], "base perplexity, selection split")
    points = budget.points(base.perplexity)
    affordable = sum(cost <= points for cost in costs.values())
    with run.progress.stage(f"selecting under +{points:.2f} points", affordable) as progressed:

        def measure(layers: tuple[int, ...]) -> float:
            cost = compare(base, run.measure("selection", layers, may_grow=True)).delta_ppl
            progressed(f"{len(layers)} layers: {cost:+.3f}")
            return cost

        chosen, steps = select_layers(costs, points, measure)
    write_json(
        run.folder / "selection.json",
        {
            "budget": str(budget),
            "budget_points": points,
            "base_ppl": base.perplexity,
            "split": "selection",
            "selected_layers": list(chosen),
            "steps": [asdict(step) for step in steps],
        },
    )
    summary = _summary(run, budget, chosen, steps)
    write_json(run.folder / "summary.json", summary)
    if chosen:
        save_bundle(
            run.folder / "bundle",
            run.plan(chosen),
            experiment.protocol.sinks,
            experiment.protocol.window,
            run.key_space,
            describe(run.loaded),
            asdict(experiment),
            summary,
            model_card(summary, asdict(experiment)),
        )
    else:
        shutil.rmtree(run.folder / "bundle", ignore_errors=True)  # an earlier choice's
    remove_captures(run.folder)
    write_manifest(run)
    return summary


def _costs(run: Run) -> dict[int, float]:
    """layer -> cost, of the finished sweep's layers that may be chosen."""
    table = read_sweep(run.folder)
    allowed = set(parse_layers(run.experiment.selection.layers, len(run.loaded.geometry.layers)))
    asked = (run.experiment.codec.k, run.experiment.codec.v, run.key_space, run.experiment.protocol.kind)
    done = tuple(table.iloc[0][["codec_k", "codec_v", "key_space", "protocol"]])
    if asked != done:
        raise UserError(
            f"the sweep in {run.folder} is of {' '.join(done)}, not of {' '.join(asked)}; run leankv sweep with those"
        )
    if differs := difference(run, float(table["base_ppl"].iloc[0])):
        raise UserError(
            f"the sweep in {run.folder} {differs}; ask for what it was made with, or run leankv sweep again"
        )
    swept = set(run.layers) & allowed
    if missing := swept - set(table["layer"]):
        raise UserError(
            f"the sweep in {run.folder} lacks layers {', '.join(map(str, sorted(missing)))}; run leankv sweep for them"
        )
    return {
        int(layer): float(cost)
        for layer, cost in zip(table["layer"], table["delta_ppl"], strict=True)
        if layer in swept
    }


def _summary(run: Run, budget: Budget, chosen: tuple[int, ...], steps: list[Step]) -> dict[str, Any]:
    """The figures a person or program wants first; perplexities are those of the report split."""
    experiment, loaded = run.experiment, run.loaded
    pair = run.measure_pair("report", chosen, "joint cost and divergence, report split")
    joint = compare(pair.base, pair.compressed)
    plan = run.plan(chosen)
    measured_bytes = bytes_of_plan(run, "report", chosen)
    bits = {layer: {part: codec.bits_per_token for part, codec in own.items()} for layer, own in plan.items()}
    footprint = Footprint(loaded.geometry, bits, experiment.protocol.sinks, experiment.protocol.window)
    sweep_seconds = float(read_sweep(run.folder)["seconds"].sum())
    return {
        "model": loaded.name,
        "n_layers": len(loaded.geometry.layers),
        "width": loaded.geometry.width,
        "codec": codec_name(experiment),
        "key_space": run.key_space,
        "weighting": experiment.fit.weighting,
        "protocol": experiment.protocol.kind,
        "sinks": experiment.protocol.sinks,
        "window": experiment.protocol.window,
        "dataset": experiment.data.dataset,
        "split": "report",
        "tokens": joint.tokens,
        "budget": str(budget),
        "budget_points": budget.points(joint.base_ppl),
        "base_ppl": joint.base_ppl,
        "selected_layers": list(chosen),
        "ppl": joint.ppl,
        "delta_ppl": joint.delta_ppl,
        "delta_ppl_interval": joint.interval,
        "delta_percent": joint.delta_percent,
        "within_budget": joint.delta_ppl <= budget.points(joint.base_ppl),
        **divergence_columns(pair.divergence),
        "context": measured_bytes.context,
        "code_ratio": measured_bytes.code_ratio_live,
        "code_ratio_stored": measured_bytes.code_ratio_stored,
        "cache_ratio": measured_bytes.cache_ratio,
        "all_in_ratio": measured_bytes.all_in_ratio,
        "base_bytes": measured_bytes.base,
        "held_bytes": measured_bytes.held,
        "stored_bytes": measured_bytes.stored,
        "peak_step_bytes": measured_bytes.peak_step,
        "claimed_cache_ratio": {str(tokens): footprint.cache_ratio(tokens) for tokens in CONTEXT_LENGTHS},
        "codec_parameters": sum(codec.n_parameters for own in plan.values() for codec in own.values()),
        "codec_bytes": sum(codec.nbytes for own in plan.values() for codec in own.values()),
        "codec_bytes_memory": measured_bytes.codecs,
        "seconds": {
            "capture": _capture_seconds(run.folder),
            "fit": sum(stored.seconds for stored in run.fitted(run.layers).values()),
            "sweep": sweep_seconds + run.measure("selection", []).seconds,
            "select": sum(run.measure("selection", step.layers).seconds for step in steps if _joint(step)),
            "report": pair.seconds,
        },
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": loaded.numerics["device"],
        "dtype": loaded.numerics["dtype"],
    }


def _joint(step: Step) -> bool:
    """Whether the selection measured this step itself; a single layer's cost comes from the sweep."""
    return step.joint_cost is not None and len(step.layers) > 1


def _capture_seconds(folder: Path) -> float:
    return sum(read_json(path)["result"]["seconds"] for path in sorted((folder / "cells").glob("capture-*.json")))


def codec_name(experiment: Experiment) -> str:
    """One name for the pair of specs: `ae:4`, or `k=none v=ae:4` where they differ."""
    k, v = experiment.codec.k, experiment.codec.v
    return k if k == v else f"k={k} v={v}"


def write_manifest(run: Run) -> None:
    """`manifest.json`: what made the results. Written last, so its presence means that the run is complete."""
    experiment = run.experiment
    write_json(
        run.folder / "manifest.json",
        {
            "leankv": leankv.__version__,
            "model": describe(run.loaded),
            "data": {split: run.blocks(split).hash for split in ("calibration", "selection", "report")},
            "seed": experiment.seed,
            "experiment": asdict(experiment),
        },
    )


def experiment_of(folder: Path, config: Path | None, overrides: dict[str, Any]) -> Experiment:
    """The experiment of a run in `folder`: its own `experiment.yaml` where there is one and no other is named."""
    own = folder / "experiment.yaml"
    return load_experiment(own if config is None and own.is_file() else config, overrides)

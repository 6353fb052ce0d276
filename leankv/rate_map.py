"""The map: what every layer's keys and values cost under each of several codecs, and how far each is from the bound."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from leankv.codecs import parse_spec
from leankv.errors import UserError
from leankv.experiment import PARTS
from leankv.fit import Problem
from leankv.gaussian_bound import decibels_over_bound
from leankv.map_report import write_map_report
from leankv.map_table import COLUMNS
from leankv.notation import parse_layers
from leankv.perplexity import BlockNats, Comparison, compare
from leankv.run import Run, StoredCodec
from leankv.screened_costs import screened_costs
from leankv.spectra import spectra
from leankv.store import write_text
from leankv.workplace import remove_captures


def check_specs(texts: Sequence[str]) -> list[str]:
    """The specs of a map or a comparison, each once.

    Raises:
        UserError: one is not understood, or says that nothing is compressed.
    """
    if "none" in texts:
        raise UserError("there is no row for 'none', where nothing is compressed; leave it out, or write identity")
    specs = [parse_spec(text) for text in texts]
    return [spec.text for index, spec in enumerate(specs) if spec not in specs[:index]]


def check_measure(text: str) -> None:
    """Refuse what does not say which layers to measure, before a model is loaded.

    Raises:
        UserError: neither `all` nor `none` nor layer numbers.
    """
    if text not in ("all", "none"):
        parse_layers(text, option="--measure")


def map_rates(run: Run, specs: Sequence[str], measure: str) -> pd.DataFrame:
    """Fit every codec to every layer and part of the run, and measure each alone; write the table and its report.

    Errors are plain squared errors, whatever metric the codecs were fitted under.

    Args:
        run: its own codecs play no part. Where it screens (`sweep.screen`), every layer and part is measured on some
            selection blocks and the cheapest ones under each codec on all; see `leankv.screening`.
        specs: as `check_specs` gives them; each is used for K and for V.
        measure: layers whose cost in perplexity is measured: `all`, `none`, or numbers such as `0,4,40-63`. Of the
            others the error is told.

    Returns:
        The table, as `leankv.map_table` describes it.

    Raises:
        UserError: the model has no such layer, or a spec does not suit it.
    """
    n_layers = len(run.loaded.geometry.layers)
    asked = () if measure == "none" else parse_layers(measure, n_layers, "--measure")
    measured = [layer for layer in run.layers if layer in asked]
    for spec in specs:
        run.with_codecs(spec, spec)  # what does not suit the model is refused before anything is fitted
    if measured:
        run.measure("selection", [], "base perplexity, selection split")
    variances = spectra(run, run.layers)
    rows: list[dict[str, Any]] = []
    for spec in specs:
        # One spec after the other, so that the codecs of one only are in memory.
        rows += _rows_of_spec(run.with_codecs(spec, spec), spec, measured, variances)
    table = pd.DataFrame(rows, columns=list(COLUMNS)).sort_values(["layer", "part"], kind="stable", ignore_index=True)
    write_text(run.folder / "map.csv", table.to_csv(index=False))
    write_map_report(run.folder)
    remove_captures(run.folder)
    return table


def _rows_of_spec(
    run: Run, spec: str, measured: Sequence[int], variances: dict[Problem, list[float]]
) -> list[dict[str, Any]]:
    codecs = run.fitted(run.layers)
    costs: dict[Problem, dict[str, Any]] = {}
    if measured:
        problems = [(layer, part) for layer in measured for part in PARTS]
        measure = _screened_part_costs if run.experiment.sweep.screen else _part_costs
        costs = {problem: cost_columns(cost) for problem, cost in measure(run, spec, problems).items()}
    experiment = run.experiment
    return [
        {
            "layer": layer,
            "part": part,
            "codec": spec,
            "key_space": run.key_space,
            "weighting": experiment.fit.weighting,
            "protocol": experiment.protocol.kind,
            "sinks": experiment.protocol.sinks,
            "window": experiment.protocol.window,
            **errors_of(stored, variances[layer, part]),
            "measured": "perplexity" if (layer, part) in costs else "error",
            **costs.get((layer, part), {}),
        }
        for (layer, part), stored in codecs.items()
    ]


def _part_costs(run: Run, spec: str, problems: Sequence[Problem]) -> dict[Problem, Comparison]:
    """The cost of each layer's keys or values alone compressed, on all selection blocks."""
    base = run.measure("selection", [])
    costs = {}
    with run.progress.stage(f"costs of {spec}", len(problems)) as step:
        for layer, part in problems:
            cost = costs[layer, part] = compare(base, run.measure("selection", [layer], parts=[part]))
            step(f"layer {layer} {part.upper()}: {cost.delta_ppl:+.3f}")
    return costs


def _screened_part_costs(run: Run, spec: str, problems: Sequence[Problem]) -> dict[Problem, Comparison]:
    """The same, on all selection blocks for the cheapest only."""

    def measure(problem: Problem, numbers: Sequence[int]) -> BlockNats:
        layer, part = problem
        return run.measure("selection", [layer], parts=[part], only=numbers)

    costs = screened_costs(run, problems, measure, f"screening with {spec}")
    return {problem: cost for problem, (cost, _) in costs.items()}


def cost_columns(cost: Comparison) -> dict[str, Any]:
    """The perplexity columns of a row."""
    low, high = cost.interval or (None, None)
    return {
        "delta_ppl": cost.delta_ppl,
        "delta_ppl_low": low,
        "delta_ppl_high": high,
        "base_ppl": cost.base_ppl,
        "tokens": cost.tokens,
    }


def errors_of(stored: StoredCodec, variances: Sequence[float]) -> dict[str, Any]:
    """A codec's bits, its error on held-out text, and the distance of that from the least at the same bits.

    Args:
        stored: the fitted codec.
        variances: of the principal components of the same held-out vectors.
    """
    codec = stored.codec
    live, parked = float(codec.bits_per_token), float(codec.stored_bits_per_token)
    error = stored.fvu * sum(variances)
    return {
        "width": codec.width,
        "bits_per_token": live,
        "stored_bits_per_token": parked,
        "fvu": stored.fvu,
        "error_db_over_bound": decibels_over_bound(error, variances, live),
        "stored_error_db_over_bound": decibels_over_bound(error, variances, parked),
    }

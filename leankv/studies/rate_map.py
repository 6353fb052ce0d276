"""The map: what every layer's keys and values cost under each of several codecs, and how far each is from the bound."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from leankv.cache.plan import PlanSpec, Site
from leankv.codecs import Recipe, parse_recipe
from leankv.config.notation import parse_layers
from leankv.config.plan_table import PARTS
from leankv.errors import UserError
from leankv.evaluation.perplexity import BlockNats, Comparison, compare
from leankv.evaluation.rate_distortion import decibels_over_bound
from leankv.report import run_files
from leankv.report.columns import MAP_COLUMNS, SPECTRA_COLUMNS
from leankv.report.rate_map import write_map_report
from leankv.storage.files import write_text
from leankv.studies.activation_store import remove_captures
from leankv.studies.codec_store import StoredCodec
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.screened_costs import screened_costs
from leankv.studies.spectra import spectra


def parse_recipes(texts: Sequence[str]) -> list[Recipe]:
    """The recipes of a map or a comparison, each once.

    Raises:
        UserError: one is not understood, or says that nothing is compressed.
    """
    if "none" in texts:
        raise UserError("there is no row for 'none', where nothing is compressed; leave it out, or write identity")
    return list(dict.fromkeys(parse_recipe(text) for text in texts))


def check_measure(text: str) -> None:
    """Refuse what does not say which layers to measure, before a model is loaded.

    Raises:
        UserError: neither `all` nor `none` nor layer numbers.
    """
    if text not in ("all", "none"):
        parse_layers(text, option="--measure")


def map_rates(evaluator: PlanEvaluator, recipes: Sequence[Recipe], measure: str) -> pd.DataFrame:
    """Fit every recipe to every site of the workspace, and measure each alone; write the table and its report.

    Errors are plain squared errors, whatever error metric the codecs were fitted under.

    Args:
        evaluator: the workspace's own plan plays no part. Where it screens (`sweep.screen`), every site is measured on
            some selection blocks and the cheapest ones under each recipe on all; see
            `leankv.search.successive_halving`.
        recipes: each is used for K and for V.
        measure: layers whose cost in perplexity is measured: `all`, `none`, or numbers such as `0,4,40-63`. Of the
            others the error is told.

    Returns:
        The table, as `leankv.report.columns.MAP_COLUMNS` describes it.

    Raises:
        UserError: the model has no such layer, or a recipe does not suit it.
    """
    workspace = evaluator.workspace
    asked = () if measure == "none" else parse_layers(measure, workspace.n_layers, "--measure")
    measured = [layer for layer in workspace.layers if layer in asked]
    for recipe in recipes:
        workspace.checked(PlanSpec.uniform(recipe))  # what does not suit the model is refused before anything is fitted
    if measured:
        evaluator.base()
    variances = spectra(evaluator, workspace.layers)
    rows: list[dict[str, Any]] = []
    for recipe in recipes:
        rows += _rows_of_recipe(evaluator, recipe, measured, variances)
        evaluator.codecs.forget()
    table = pd.DataFrame(rows, columns=list(MAP_COLUMNS))
    table = table.sort_values(["layer", "part"], kind="stable", ignore_index=True)
    if workspace.folder is not None:
        write_text(workspace.folder / run_files.SPECTRA, _spectra_table(variances).to_csv(index=False))
        write_text(workspace.folder / run_files.MAP, table.to_csv(index=False))
        write_map_report(workspace.folder)
        remove_captures(workspace.folder)
    return table


def _spectra_table(variances: Mapping[Site, list[float]]) -> pd.DataFrame:
    rows = [
        (site.layer, site.part, component, variance)
        for site, own in variances.items()
        for component, variance in enumerate(own, start=1)
    ]
    return pd.DataFrame(rows, columns=list(SPECTRA_COLUMNS))


def _rows_of_recipe(
    evaluator: PlanEvaluator, recipe: Recipe, measured: Sequence[int], variances: Mapping[Site, list[float]]
) -> list[dict[str, Any]]:
    workspace, protocol = evaluator.workspace, evaluator.protocol
    alone = {
        Site(layer, part): PlanSpec().with_sites({Site(layer, part): recipe})
        for layer in workspace.layers
        for part in PARTS
    }
    evaluator.codecs.fit(alone.values())
    costs: dict[Site, dict[str, Any]] = {}
    if measured:
        plans = {site: plan for site, plan in alone.items() if site.layer in measured}
        measure = _screened_costs if workspace.experiment.sweep.screen else _costs
        costs = {site: cost_columns(cost) for site, cost in measure(evaluator, recipe, plans).items()}
    return [
        {
            "layer": site.layer,
            "part": site.part,
            "codec": recipe.text,
            "key_space": workspace.key_space,
            "error_metric": workspace.experiment.fit.error_metric,
            "protocol": protocol.kind,
            "sinks": protocol.sinks,
            "window": protocol.window,
            **errors_of(evaluator.codecs.codecs(plan)[site], variances[site]),
            "measured": "perplexity" if site in costs else "error",
            **costs.get(site, {}),
        }
        for site, plan in alone.items()
    ]


def _costs(evaluator: PlanEvaluator, recipe: Recipe, plans: Mapping[Site, PlanSpec]) -> dict[Site, Comparison]:
    """The cost of each site alone compressed, on all selection blocks."""
    base = evaluator.base()
    costs = {}
    with evaluator.workspace.progress.stage(f"costs of {recipe.text}", len(plans)) as step:
        for site, plan in plans.items():
            cost = costs[site] = compare(base, evaluator.nats(plan))
            step(f"layer {site.layer} {site.part.upper()}: {cost.delta_ppl:+.3f}")
    return costs


def _screened_costs(evaluator: PlanEvaluator, recipe: Recipe, plans: Mapping[Site, PlanSpec]) -> dict[Site, Comparison]:
    """The same, on all selection blocks for the cheapest only."""

    def measure(site: Site, block_ids: Sequence[int]) -> BlockNats:
        return evaluator.nats(plans[site], block_ids=block_ids)

    costs = screened_costs(evaluator, list(plans), measure, f"screening with {recipe.text}")
    return {site: cost for site, (cost, _) in costs.items()}


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
    live, serialized = float(codec.bits_per_token), float(codec.stored_bits_per_token)
    error = stored.fvu * sum(variances)
    return {
        "width": codec.width,
        "bits_per_token": live,
        "stored_bits_per_token": serialized,
        "fvu": stored.fvu,
        "error_db_over_bound": decibels_over_bound(error, variances, live),
        "stored_error_db_over_bound": decibels_over_bound(error, variances, serialized),
    }

"""Commands that set codecs side by side: `map`, `compare`."""

from pathlib import Path
from typing import Annotated

import typer

from leankv.cli.app import OUT, Json, command, print_table_json
from leankv.cli.options import MEASURE, PREFIX, PROTOCOL, TEXT, Asked
from leankv.cli.tracking import tracked
from leankv.config.presets import COMPARE_SETTINGS, COMPARE_SPECS, MAP_SPECS
from leankv.progress import Progress


@command("map", "layers", "screen", "memory_budget", "key_space", "error_metric", "epochs", *TEXT, *PROTOCOL)
@tracked
def map_command(
    asked: Asked,
    recipes: Annotated[
        list[str] | None,
        typer.Argument(
            help="Codecs, each for K and for V; with parentheses in quotes: 'resid(pca:8,int:2)'. "
            f"Unless given: {' '.join(MAP_SPECS)}.",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[
        str,
        typer.Option(
            help="Layers whose cost in perplexity is measured: all, none or 0,4,40-63. Of the rest the error is told.",
            rich_help_panel=MEASURE,
        ),
    ] = "all",
    blocks: Annotated[
        int | None,
        typer.Option(help="Blocks of selection text to measure on.", rich_help_panel=MEASURE, show_default=False),
    ] = None,
    json_: Json = False,
) -> Path:
    """What each layer's keys or values alone cost under several codecs, and how far each is from the bound.

    Example: leankv map int:2 transform:1 --dataset wikipedia-sample --screen -o results/map
    """
    from leankv.config.loading import load_experiment
    from leankv.report.rate_map import map_summary
    from leankv.studies.plan_evaluator import PlanEvaluator
    from leankv.studies.rate_map import check_measure, map_rates, parse_recipes
    from leankv.studies.workspace import Workspace

    wanted = parse_recipes(recipes or MAP_SPECS)
    check_measure(measure)
    extra = {} if blocks is None else {"data.selection_blocks": blocks}
    workspace = Workspace.beside(load_experiment(asked.config, asked.overrides(extra)), Progress())
    table = map_rates(PlanEvaluator(workspace), wanted, measure)
    if json_:
        print_table_json(table)
        return Path(workspace.experiment.output_dir)
    OUT.print(map_summary(table))
    OUT.print(f"written to {workspace.folder}/map.csv, map.md, figures", highlight=False, soft_wrap=True)
    return Path(workspace.experiment.output_dir)


@command("compare", "memory_budget", "key_space", "error_metric", "epochs", *TEXT, "protocol", "sinks", *PREFIX)
@tracked
def compare_command(
    asked: Asked,
    recipes: Annotated[
        list[str] | None,
        typer.Argument(
            help="Codecs, each for K and V of all layers; with parentheses in quotes. "
            f"Unless given: {' '.join(COMPARE_SPECS)}.",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON file of a plan, a row of its own; again for more.", rich_help_panel=MEASURE, show_default=False
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="Whose cache to measure too (again for more): all, hqq:4, quanto:2, turboquant:safe, module:factory.",
            rich_help_panel=MEASURE,
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(
            help="Latest tokens kept exact (stream, decode); again for a row of its own: --window 128 --window 0.",
            rich_help_panel=MEASURE,
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help="Text to measure on: selection to choose with, report to report, certification.",
            rich_help_panel=MEASURE,
        ),
    ] = "report",
    blocks: Annotated[
        int | None,
        typer.Option(help="Blocks of that text to measure on.", rich_help_panel=MEASURE, show_default=False),
    ] = None,
    json_: Json = False,
) -> Path:
    """Whole caches, ours and those of others: perplexity against the bytes that they really hold.

    Example: leankv compare int:4 transform:s0.01 --baseline hqq:4 --dataset wikipedia-sample -o results/compare
    """
    from leankv.cache.plan import read_plan
    from leankv.config.experiment import SPLITS
    from leankv.config.loading import load_experiment
    from leankv.errors import UserError
    from leankv.evaluation.baselines import find_baselines
    from leankv.report.compare import compare_summary
    from leankv.studies.compare import compare_caches, plans_of
    from leankv.studies.plan_evaluator import PlanEvaluator
    from leankv.studies.rate_map import parse_recipes
    from leankv.studies.workspace import Workspace

    named = {str(path): read_plan(path) for path in plan or []}
    wanted = parse_recipes(recipes or (() if named else COMPARE_SPECS))
    baselines = find_baselines(baseline or [])
    splits = [name for name in SPLITS if name != "calibration"]  # costs on text that codecs were fitted to say nothing
    if split not in splits:
        raise UserError(f"--split must be one of {', '.join(splits)}, not {split!r}")
    extra = {} if blocks is None else {f"data.{split}_blocks": blocks}
    if window:
        extra["protocol.window"] = max(window)  # whatever order they were given in, the folder is the same run's
    overrides = asked.overrides(extra)
    if asked.config is None:
        overrides = {**COMPARE_SETTINGS, **overrides}
    if not window:
        overrides = asked.without_window_if_none_can_be(overrides)
    workspace = Workspace.open(load_experiment(asked.config, overrides), Progress())
    table = compare_caches(PlanEvaluator(workspace), plans_of(wanted) | named, baselines, split, window or ())
    if json_:
        print_table_json(table)
        return Path(workspace.experiment.output_dir)
    OUT.print(compare_summary(table))
    OUT.print(f"written to {workspace.folder}/compare.csv, compare.md, figures", highlight=False, soft_wrap=True)
    return Path(workspace.experiment.output_dir)

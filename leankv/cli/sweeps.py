"""Commands from a sweep of single layers to a bundle: `run`, `train-layer`, `sweep`, `select`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from leankv.cli.app import OUT, Json, command, print_json, print_piece, print_table_json
from leankv.cli.options import FITTING, PROTOCOL, SEARCH, WORKERS, Asked
from leankv.cli.tracking import tracked
from leankv.config.presets import SEARCH_SETTINGS
from leankv.progress import Progress
from leankv.report import run_files

NEW_TOKENS = 40  # of the completion at the end of a run, behind what a cache holds exact

Prompt = Annotated[str, typer.Option(help="Completed at the end with the bundle.")]
Executor = Annotated[
    str | None, typer.Option(help="Start workers: local, ray or slurm.", rich_help_panel=WORKERS, show_default=False)
]
Workers = Annotated[
    int | None, typer.Option(help="So many, 2 unless given.", min=1, rich_help_panel=WORKERS, show_default=False)
]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster, or Slurm partition.", rich_help_panel=WORKERS, show_default=False)
]


@command("run", "layers", "budget", "screen", "predict", "memory_budget", *FITTING, *PROTOCOL)
@tracked
def run_command(
    asked: Asked,
    config: Annotated[Path, typer.Argument(help="An experiment, e.g. experiments/smollm2-135m.yaml.")],
    prompt: Prompt = "The city of",
    json_: Json = False,
) -> Path:
    """Everything that an experiment asks for: sweep and selection, or a search; tables, figures, bundle, a completion.

    Example: leankv run experiments/demo.yaml
    """
    from leankv.config.loading import load_experiment

    experiment = load_experiment(config, asked.overrides())
    from leankv.report.selection import write_reports
    from leankv.report.sweep import sweep_table
    from leankv.studies.plan_evaluator import PlanEvaluator
    from leankv.studies.select import select
    from leankv.studies.sweep import sweep
    from leankv.studies.workspace import Workspace

    if experiment.selection.strategy != "greedy":
        return _search(experiment, prompt, json_)
    workspace = Workspace.open(experiment, Progress())
    evaluator = PlanEvaluator(workspace)
    folder, loaded = Path(experiment.output_dir), workspace.loaded
    table = sweep(evaluator)
    if not json_:
        OUT.print(sweep_table(table))
    summary = select(evaluator)
    write_reports(folder)
    if json_:
        print_json(summary.to_json())
        return folder
    _print_selection(folder, summary)
    if summary.selected_layers:
        _complete(folder, "bundle", loaded, prompt, workspace.experiment.seed)
    else:
        OUT.print("no layer fits the budget, so there is no bundle", highlight=False)
    OUT.print(f"written to {folder}", highlight=False, soft_wrap=True)
    return folder


@command("train-layer", *FITTING, *PROTOCOL)
def train_layer_command(
    asked: Asked,
    layer: Annotated[int, typer.Argument(help="The layer, counted from 0.")],
    json_: Json = False,
) -> None:
    """Fit one layer's codecs, and print their reconstruction error and the layer's perplexity cost.

    Example: leankv train-layer 12 --codec ae:4 --dataset wikipedia-sample
    """
    import pandas as pd

    from leankv.config.loading import load_experiment
    from leankv.report.sweep import sweep_table
    from leankv.studies.activation_store import remove_captures
    from leankv.studies.plan_evaluator import PlanEvaluator
    from leankv.studies.sweep import layer_cost, layer_row
    from leankv.studies.workspace import Workspace

    experiment = load_experiment(asked.config, asked.overrides({"layers": str(layer)}))
    evaluator = PlanEvaluator(Workspace.beside(experiment, Progress()))
    folder = Path(experiment.output_dir)
    evaluator.base()
    row = layer_row(evaluator, layer, *layer_cost(evaluator, layer))
    remove_captures(folder)
    if json_:
        print_json(row)
    else:
        OUT.print(sweep_table(pd.DataFrame([row])))
        OUT.print(f"codecs in {folder / 'codecs'}", highlight=False, soft_wrap=True)


@command("sweep", "layers", "screen", "predict", "memory_budget", *FITTING, *PROTOCOL)
@tracked
def sweep_command(
    asked: Asked,
    shard: Annotated[
        str | None,
        typer.Option(help="Only this part of the layers, e.g. 2/8.", rich_help_panel=WORKERS, show_default=False),
    ] = None,
    gather: Annotated[
        bool, typer.Option("--gather", help="Only write the tables of finished shards.", rich_help_panel=WORKERS)
    ] = False,
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    json_: Json = False,
) -> Path:
    """Fit and measure every layer alone; print and write the table.

    Example: leankv sweep --codec ae:4 --layers 0-9 --dataset wikipedia-sample -o results/sweep
    """
    from leankv.executors.dispatch import SweepOptions, sweep_as_asked
    from leankv.report.sweep import format_prediction, sweep_table

    options = SweepOptions(executor, workers, address, shard, gather)
    swept = sweep_as_asked(asked.config, asked.overrides(), options, Progress())
    if json_:
        print_table_json(swept.table)
        return swept.folder
    if len(swept.table):
        OUT.print(sweep_table(swept.table))
        cheapest = swept.table.sort_values("delta_ppl", kind="stable")["layer"].astype(str)
        OUT.print("cheapest first: " + " ".join(cheapest), highlight=False)
    if text := format_prediction(swept.table):
        OUT.print(text, highlight=False)
    if swept.missing:
        missing = " ".join(map(str, swept.missing))
        OUT.print(f"shard {shard} is done; other shards have yet to do layers {missing}", highlight=False)
    else:
        OUT.print(f"written to {swept.folder}/sweep.csv, sweep.md", highlight=False, soft_wrap=True)
    return swept.folder


@command("select", "layers", "budget", *SEARCH, "memory_budget", *FITTING, *PROTOCOL)
@tracked
def select_command(
    asked: Asked,
    prompt: Prompt = "The city of",
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    json_: Json = False,
) -> Path:
    """Search the best plan under a budget, certify it on text nobody looked at, and write its bundle.

    With --strategy greedy: LeanLlama's way, whole layers in order of cost, from the finished sweep in --output-dir.
    With --executor, workers share the measurements of plans and documents.

    Example: leankv select --budget 7% --minimize stored -o results/plan
    """
    from leankv.errors import UserError
    from leankv.executors.dispatch import WorkerOptions, select_with_workers
    from leankv.report.columns import read_sweep
    from leankv.report.selection import write_reports
    from leankv.studies.plan_evaluator import PlanEvaluator
    from leankv.studies.select import experiment_of, select
    from leankv.studies.workspace import Workspace

    options = WorkerOptions(executor, workers, address)
    overrides = asked.overrides()
    named = Path(str(overrides.get("output_dir", _default_output_dir())))
    begun = asked.config is not None or (named / run_files.EXPERIMENT).is_file()
    as_used = overrides if begun else asked.without_window_if_none_can_be({**SEARCH_SETTINGS, **overrides})
    experiment = experiment_of(asked.config, as_used)
    folder = Path(experiment.output_dir)
    if experiment.selection.strategy != "greedy":
        if options.executor is None:
            return _search(experiment, prompt, json_)
        select_with_workers(experiment, options, Progress())
        _print_plans(experiment, json_)
        return folder
    if options.executor is not None:
        raise UserError("--executor shares out a search; --strategy greedy has its costs from leankv sweep --executor")
    if "layers" in overrides:  # of the swept layers, those that may be chosen
        overrides["selection.layers"] = overrides.pop("layers")
    read_sweep(folder)
    experiment = experiment_of(asked.config, overrides)
    summary = select(PlanEvaluator(Workspace.open(experiment, Progress())))
    write_reports(folder)
    if json_:
        print_json(summary.to_json())
        return folder
    _print_selection(folder, summary)
    OUT.print(f"written to {folder}", highlight=False, soft_wrap=True)
    return folder


def _print_selection(folder: Path, summary: Any) -> None:
    from leankv.report.selection import selection_table, summary_table
    from leankv.storage.files import read_json

    OUT.print(selection_table(read_json(folder / run_files.SELECTION)))
    OUT.print(summary_table(summary))


def _search(experiment: Any, prompt: str, json_: bool) -> Path:
    """Search plans for all budgets, print what came out, complete a prompt with the last bundle; give the folder."""
    from leankv.config.notation import parse_budgets
    from leankv.studies.plan_evaluator import PlanEvaluator
    from leankv.studies.select_plan import bundle_name, select_plans
    from leankv.studies.workspace import Workspace

    workspace, folder = Workspace.load(experiment, Progress()), Path(experiment.output_dir)
    summaries = select_plans(PlanEvaluator(workspace))
    _print_plans(experiment, json_)
    if summaries[-1].selected_layers and not json_:
        bundle = bundle_name(parse_budgets(experiment.selection.budget)[-1], len(summaries) == 1)
        _complete(folder, bundle, workspace.loaded, prompt, experiment.seed)
    return folder


def _print_plans(experiment: Any, json_: bool) -> None:
    """What the finished selections in a folder came to."""
    from leankv.report.plans import plans_table
    from leankv.report.selection import summary_table
    from leankv.storage.files import read_json
    from leankv.studies.select_plan import read_selections

    folder = Path(experiment.output_dir)
    summaries = read_selections(folder, experiment)
    if json_:
        print_json([summary.to_json() for summary in summaries])
        return
    for summary in summaries:
        OUT.print(summary_table(summary))
    OUT.print(plans_table(read_json(folder / run_files.PLANS)))
    OUT.print(f"written to {folder}", highlight=False, soft_wrap=True)


def _complete(folder: Path, bundle: str, loaded: Any, prompt: str, seed: int) -> None:
    """Complete a prompt with a run's bundle, on the screen and in its folder, there beside what the base model says."""
    from leankv.cache.bundle import load_bundle
    from leankv.evaluation.generation import base_text, complete, encoded, format_completion
    from leankv.storage.files import write_json

    cache = load_bundle(folder / bundle, loaded.model).new_cache()
    OUT.print(prompt, end="", style="bold", highlight=False)
    length = NEW_TOKENS + cache.sinks + cache.window
    ids = encoded(loaded, prompt, False)
    completion = complete(loaded, cache, ids, length, 0.0, seed, print_piece)
    OUT.print("\n" + format_completion(completion, loaded.numerics["dtype"]), highlight=False, soft_wrap=True)
    base = base_text(loaded, ids, length)
    write_json(folder / run_files.COMPLETION, {"prompt": prompt, "base_text": base, **completion.to_json()})


def _default_output_dir() -> str:
    from leankv.config.experiment import Experiment

    return Experiment().output_dir

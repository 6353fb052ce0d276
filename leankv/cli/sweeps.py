"""Commands from a sweep of single layers to a bundle: `run`, `train-layer`, `sweep`, `select`."""

from pathlib import Path
from typing import Annotated

import typer

from leankv.cli.app import OUT, Json, command, print_json, print_piece, print_table_json
from leankv.cli.options import FITTING, PROTOCOL, WORKERS, Asked
from leankv.progress import Progress


@command("run", "layers", "budget", "screen", "predict", "memory_budget", *FITTING, *PROTOCOL)
def run_command(
    asked: Asked,
    config: Annotated[Path, typer.Argument(help="An experiment, e.g. experiments/smollm2-135m.yaml.")],
    prompt: Annotated[str, typer.Option(help="Completed at the end with the bundle.")] = "The city of",
    json_: Json = False,
) -> None:
    """Everything: sweep, selection, tables, figure, bundle, and a short completion with it."""
    from leankv.assemble import select
    from leankv.cache import LeanCache
    from leankv.experiment import load_experiment
    from leankv.generate import complete, memory_words
    from leankv.report import selection_table, summary_table, sweep_table, write_reports
    from leankv.run import Run
    from leankv.store import read_json
    from leankv.sweep import sweep

    run = Run(load_experiment(config, asked.overrides()), Progress())
    table = sweep(run)
    if not json_:
        OUT.print(sweep_table(table))
    summary = select(run)
    write_reports(run.folder)
    if json_:
        print_json(summary)
        return
    OUT.print(selection_table(read_json(run.folder / "selection.json")))
    OUT.print(summary_table(summary))
    if summary["selected_layers"]:
        cache = LeanCache.from_pretrained(run.folder / "bundle", run.loaded.model)
        OUT.print(f"[bold]{prompt}[/bold]", end="", highlight=False)
        completion = complete(run.loaded, cache, prompt, 40, 0.0, False, run.experiment.seed, print_piece)
        OUT.print("\n" + memory_words(completion, run.loaded.numerics["dtype"]), highlight=False, soft_wrap=True)
    else:
        OUT.print("no layer fits the budget, so there is no bundle", highlight=False)
    OUT.print(f"written to {run.folder}", highlight=False, soft_wrap=True)


@command("train-layer", *FITTING, *PROTOCOL)
def train_layer_command(
    asked: Asked,
    layer: Annotated[int, typer.Argument(help="The layer, counted from 0.")],
    json_: Json = False,
) -> None:
    """Fit one layer's codecs, and print their reconstruction error and the layer's perplexity cost."""
    import pandas as pd

    from leankv.experiment import load_experiment
    from leankv.report import sweep_table
    from leankv.run import Run
    from leankv.sweep import layer_cost, layer_row
    from leankv.workplace import remove_captures

    run = Run(load_experiment(asked.config, asked.overrides({"layers": str(layer)})), Progress())
    run.measure("selection", [], "base perplexity, selection split")
    row = layer_row(run, layer, *layer_cost(run, layer))
    remove_captures(run.folder)
    if json_:
        print_json(row)
    else:
        OUT.print(sweep_table(pd.DataFrame([row])))
        OUT.print(f"codecs in {run.folder / 'codecs'}", highlight=False, soft_wrap=True)


@command("sweep", "layers", "screen", "predict", "memory_budget", *FITTING, *PROTOCOL)
def sweep_command(
    asked: Asked,
    shard: Annotated[
        str | None,
        typer.Option(help="Only this part of the layers, e.g. 2/8.", rich_help_panel=WORKERS, show_default=False),
    ] = None,
    gather: Annotated[
        bool, typer.Option("--gather", help="Only write the tables of finished shards.", rich_help_panel=WORKERS)
    ] = False,
    executor: Annotated[
        str | None,
        typer.Option(help="Start workers: local, ray or slurm.", rich_help_panel=WORKERS, show_default=False),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="So many, 2 unless given.", min=1, rich_help_panel=WORKERS, show_default=False),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster, or Slurm partition.", rich_help_panel=WORKERS, show_default=False),
    ] = None,
    json_: Json = False,
) -> None:
    """Fit and measure every layer alone; print and write the table."""
    from leankv.executors import SweepOptions, sweep_as_asked
    from leankv.report import prediction_words, sweep_table

    options = SweepOptions(shard, gather, executor, workers, address)
    swept = sweep_as_asked(asked.config, asked.overrides(), options, Progress())
    if json_:
        print_table_json(swept.table)
        return
    if len(swept.table):
        OUT.print(sweep_table(swept.table))
        cheapest = swept.table.sort_values("delta_ppl", kind="stable")["layer"].astype(str)
        OUT.print("cheapest first: " + " ".join(cheapest), highlight=False)
    if words := prediction_words(swept.table):
        OUT.print(words, highlight=False)
    if swept.missing:
        missing = " ".join(map(str, swept.missing))
        OUT.print(f"shard {shard} is done; other shards have yet to do layers {missing}", highlight=False)
    else:
        OUT.print(f"written to {swept.folder}/sweep.csv, sweep.md", highlight=False, soft_wrap=True)


@command("select", "layers", "budget")
def select_command(asked: Asked, json_: Json = False) -> None:
    """From a finished sweep: assemble the layers under the budget, measure them jointly, write the bundle."""
    from leankv.assemble import experiment_of, select
    from leankv.report import selection_table, summary_table, write_reports
    from leankv.run import Run
    from leankv.store import read_json
    from leankv.sweep_table import read_sweep

    overrides = asked.overrides()
    if "layers" in overrides:  # of the swept layers, those that may be chosen
        overrides["selection.layers"] = overrides.pop("layers")
    folder = Path(overrides.get("output_dir", _default_output_dir()))
    read_sweep(folder)
    run = Run(experiment_of(folder, asked.config, overrides), Progress())
    summary = select(run)
    write_reports(run.folder)
    if json_:
        print_json(summary)
        return
    OUT.print(selection_table(read_json(run.folder / "selection.json")))
    OUT.print(summary_table(summary))
    OUT.print(f"written to {run.folder}", highlight=False, soft_wrap=True)


def _default_output_dir() -> str:
    from leankv.experiment import Experiment

    return Experiment().output_dir

"""The command line: commands, exit codes, and what is printed. Torch is imported inside commands only."""

import errno
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from leankv import __version__
from leankv.errors import UserError
from leankv.experiment import COMPARE_SETTINGS, COMPARE_SPECS, MAP_SPECS
from leankv.options import FITTING, MEASURE, PROTOCOL, WORKERS, Asked, settings
from leankv.progress import Progress

EXIT_USER_ERROR = 2
PLAIN_WIDTH = 100  # columns of tables when the output is piped

app = typer.Typer(
    name="leankv",
    help="How far can a model's KV cache be compressed, where, and at what price in perplexity?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OUT = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def command(name: str, *setting_names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command with its settings; what a user can mend ends in one sentence and exit code 2."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        with_settings = settings(*setting_names)(function)

        @functools.wraps(with_settings)
        def guarded(**given: Any) -> None:
            try:
                with_settings(**given)
            except UserError as error:
                _fail(f"error: {error}")
            except KeyboardInterrupt:
                _fail("interrupted: what was finished is kept, and the same command goes on from there")
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
                    raise
                _fail("error: the device ran out of memory; use shorter blocks, --device-map auto or --load-in-4bit")
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                    raise
                _fail(f"error: {error.filename or 'the disk'}: {error.strerror}; mend that and run the command again")

        guarded.__signature__ = with_settings.__signature__  # type: ignore[attr-defined]
        del guarded.__wrapped__
        return app.command(name)(guarded)

    return decorate


def _fail(sentence: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(sentence, markup=False, style="red")
    raise typer.Exit(EXIT_USER_ERROR)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _version(wanted: bool) -> None:
    if wanted:
        OUT.print(f"leankv {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """How far can a model's KV cache be compressed, where, and at what price in perplexity?"""


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
        _print_json(summary)
        return
    OUT.print(selection_table(read_json(run.folder / "selection.json")))
    OUT.print(summary_table(summary))
    if summary["selected_layers"]:
        cache = LeanCache.from_pretrained(run.folder / "bundle", run.loaded.model)
        OUT.print(f"[bold]{prompt}[/bold]", end="", highlight=False)
        completion = complete(run.loaded, cache, prompt, 40, 0.0, False, run.experiment.seed, _print_piece)
        OUT.print("\n" + memory_words(completion, run.loaded.numerics["dtype"]), highlight=False, soft_wrap=True)
    else:
        OUT.print("no layer fits the budget, so there is no bundle", highlight=False)
    OUT.print(f"written to {run.folder}", highlight=False, soft_wrap=True)


@command("capture", "layers", "block_length")
def capture_command(
    asked: Asked,
    blocks: Annotated[int | None, typer.Option(help="Blocks of calibration text.", show_default=False)] = None,
    json_: Json = False,
) -> None:
    """Write the keys and values of the calibration text to a folder, one safetensors file a layer."""
    from leankv.capture import capture
    from leankv.data import TextSource
    from leankv.experiment import load_experiment, parse_layers
    from leankv.model import describe, load_model
    from leankv.store import check_output_dir

    extra = {} if blocks is None else {"data.calibration_blocks": blocks}
    experiment = load_experiment(asked.config, asked.overrides(extra))
    folder = Path(experiment.output_dir) / "activations"
    check_output_dir(folder)
    source = TextSource(experiment.data)
    progress = Progress()
    progress.say(f"loading {experiment.model.name}")
    loaded = load_model(experiment.model)
    layers = parse_layers(experiment.layers, len(loaded.geometry.layers))
    data = experiment.data
    text = source.blocks("calibration", loaded.tokenizer, data.calibration_blocks, data.block_length)
    made_by = {"model": describe(loaded), "dataset": data.dataset, "blocks": text.hash}
    activations = capture(loaded, text, folder, layers, experiment.protocol.batch_size, made_by, progress)
    if json_:
        _print_json({"folder": str(folder), **activations.manifest})
    else:
        size = sum(file.stat().st_size for file in folder.iterdir())
        OUT.print(
            f"keys and values of {len(layers)} layers, {text.tokens.numel()} tokens, {size / 1e6:.1f} MB: {folder}",
            highlight=False,
            soft_wrap=True,
        )


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
    from leankv.run import Run, remove_captures
    from leankv.sweep import layer_cost, layer_row

    run = Run(load_experiment(asked.config, asked.overrides({"layers": str(layer)})), Progress())
    run.measure("selection", [], "base perplexity, selection split")
    row = layer_row(run, layer, *layer_cost(run, layer))
    remove_captures(run.folder)
    if json_:
        _print_json(row)
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
        _print_json(json.loads(swept.table.to_json(orient="records", double_precision=15)))
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


@command("map", "layers", "memory_budget", "key_space", "weighting", "epochs", "block_length", *PROTOCOL)
def map_command(
    asked: Asked,
    specs: Annotated[
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
) -> None:
    """What each layer's keys or values alone cost under several codecs, and how far each is from the bound."""
    from leankv.experiment import load_experiment
    from leankv.map_report import map_summary
    from leankv.rate_map import check_measure, check_specs, map_rates
    from leankv.run import Run

    wanted = check_specs(specs or MAP_SPECS)
    check_measure(measure)
    extra = {} if blocks is None else {"data.selection_blocks": blocks}
    run = Run(load_experiment(asked.config, asked.overrides(extra)), Progress())
    table = map_rates(run, wanted, measure)
    if json_:
        _print_json(json.loads(table.to_json(orient="records", double_precision=15)))
        return
    OUT.print(map_summary(table))
    OUT.print(f"written to {run.folder}/map.csv, map.md, figures", highlight=False, soft_wrap=True)


@command("compare", "memory_budget", "key_space", "weighting", "epochs", "block_length", *PROTOCOL)
def compare_command(
    asked: Asked,
    specs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Codecs, each for K and V of all layers; with parentheses in quotes. "
            f"Unless given: {' '.join(COMPARE_SPECS)}.",
            show_default=False,
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="A cache of others (again for more): all, hqq:4, quanto:2, turboquant:safe, module:factory.",
            rich_help_panel=MEASURE,
            show_default=False,
        ),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(help="Blocks of report text to measure on.", rich_help_panel=MEASURE, show_default=False),
    ] = None,
    json_: Json = False,
) -> None:
    """Whole caches, ours and those of others: perplexity against the bytes that they really hold."""
    from leankv.compare_caches import compare_caches
    from leankv.compare_report import compare_summary
    from leankv.experiment import load_experiment
    from leankv.peers import find_peers
    from leankv.rate_map import check_specs
    from leankv.run import Run

    wanted, peers = check_specs(specs or COMPARE_SPECS), find_peers(peer or [])
    overrides = asked.overrides({} if blocks is None else {"data.report_blocks": blocks})
    if asked.config is None:
        overrides = {**COMPARE_SETTINGS, **overrides}
    run = Run(load_experiment(asked.config, _without_window_if_strict(asked, overrides)), Progress())
    table = compare_caches(run, wanted, peers)
    if json_:
        _print_json(json.loads(table.to_json(orient="records", double_precision=15)))
        return
    OUT.print(compare_summary(table))
    OUT.print(f"written to {run.folder}/compare.csv, compare.md, figures", highlight=False, soft_wrap=True)


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
        _print_json(summary)
        return
    OUT.print(selection_table(read_json(run.folder / "selection.json")))
    OUT.print(summary_table(summary))
    OUT.print(f"written to {run.folder}", highlight=False, soft_wrap=True)


def _default_output_dir() -> str:
    from leankv.experiment import Experiment

    return Experiment().output_dir


def _with_bundle(asked: Asked, bundle: Path | None, extra: dict[str, Any] | None = None) -> Any:
    """The experiment that a bundle came from (or `--config`, or the defaults), with the options on top."""
    from dataclasses import asdict

    from leankv.bundle import read_bundle_config
    from leankv.experiment import flatten, load_experiment

    overrides = asked.overrides(extra)
    if asked.config is not None:
        overrides = {**flatten(asdict(load_experiment(asked.config, {}))), **overrides}
    elif bundle is not None:
        overrides = {**flatten(read_bundle_config(bundle)["experiment"]), **overrides}
    return load_experiment(None, _without_window_if_strict(asked, overrides))


def _without_window_if_strict(asked: Asked, overrides: dict[str, Any]) -> dict[str, Any]:
    """A strict pass has no window, whatever a bundle was chosen under or a command starts from."""
    if asked.given("protocol") == "strict" and asked.given("window") is None:
        return {**overrides, "protocol.window": 0}
    return overrides


@command("eval-ppl", "block_length", *PROTOCOL)
def eval_ppl_command(
    asked: Asked,
    bundle: Annotated[Path | None, typer.Option(help="Bundle to measure beside the base.", show_default=False)] = None,
    split: Annotated[str, typer.Option(help="report, selection, calibration, or all: unsplit.")] = "report",
    blocks: Annotated[int | None, typer.Option(help="Blocks to measure on.", show_default=False)] = None,
    json_: Json = False,
) -> None:
    """Perplexity of the base model and of a bundle, side by side, with the paired interval."""
    from leankv.evaluate import evaluate
    from leankv.experiment import SPLITS
    from leankv.report import evaluation_table

    if split not in (*SPLITS, "all"):
        raise UserError(f"--split must be one of {', '.join(SPLITS)}, all, not {split!r}")
    if blocks is not None and blocks < 1:
        raise UserError(f"--blocks must be at least 1, not {blocks}")
    experiment = _with_bundle(asked, bundle)
    n_blocks = blocks or (experiment.data.report_blocks if split == "all" else experiment.value(f"data.{split}_blocks"))
    result = evaluate(experiment, bundle, split, n_blocks, Progress())
    if json_:
        _print_json(result)
    else:
        OUT.print(evaluation_table(result))


@command("generate")
def generate_command(
    asked: Asked,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    bundle: Annotated[Path, typer.Option(help="The bundle.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token; else sampled.", min=0.0)] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt in the chat template.")] = False,
    json_: Json = False,
) -> None:
    """Stream a completion through the compressed cache; report the bytes it held and tokens a second."""
    from dataclasses import asdict

    from leankv.bundle import read_bundle_config
    from leankv.cache import LeanCache
    from leankv.generate import complete, memory_words
    from leankv.model import load_model

    read_bundle_config(bundle)
    experiment = _with_bundle(asked, bundle)
    progress = Progress()
    progress.say(f"loading {experiment.model.name}")
    loaded = load_model(experiment.model)
    if not loaded.tokenizer(prompt)["input_ids"]:
        raise UserError("the prompt is empty; give some text to go on from")
    if chat and loaded.tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {experiment.model.name} has no chat template; leave --chat out")
    cache = LeanCache.from_pretrained(bundle, loaded.model)
    show = (lambda text: None) if json_ else _print_piece
    completion = complete(loaded, cache, prompt, max_new_tokens, temperature, chat, experiment.seed, show)
    if json_:
        _print_json(asdict(completion))
    else:
        OUT.print("\n" + memory_words(completion, loaded.numerics["dtype"]), highlight=False, soft_wrap=True)


def _print_piece(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@command("info")
def info_command(
    asked: Asked,
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file, or smollm2-135m.")],
    json_: Json = False,
) -> None:
    """The geometry of a model's cache, the keys' convention, what LeanKV can and cannot do with it."""
    from leankv.experiment import load_experiment
    from leankv.inspect_model import info_rows, inspect_cache
    from leankv.model import load_model
    from leankv.report import name_value_table

    experiment = load_experiment(asked.config, asked.overrides({"model.name": model}))
    info = inspect_cache(load_model(experiment.model))
    if json_:
        _print_json(info)
    else:
        OUT.print(name_value_table(f"The cache of {model}", info_rows(info)))


def main() -> None:
    """Entry point of the `leankv` command."""
    app()

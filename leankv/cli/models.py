"""Commands that look at a model, or at this machine: `info`, `init`, `capture`, `doctor`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from leankv.cli.app import OUT, Json, command, print_json, reading_command
from leankv.cli.options import TEXT, Asked
from leankv.progress import Progress


@command("info")
def info_command(
    asked: Asked,
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file, or smollm2-135m.")],
    json_: Json = False,
) -> None:
    """The geometry of a model's cache, the keys' convention, what LeanKV can and cannot do with it.

    Example: leankv info smollm2-135m
    """
    from leankv.config.loading import load_experiment
    from leankv.models.inspection import info_rows, inspect_cache
    from leankv.models.loading import load_model
    from leankv.report.tables import name_value_table

    experiment = load_experiment(asked.config, asked.overrides({"model.name": model}))
    info = inspect_cache(load_model(experiment.model))
    if json_:
        print_json(asdict(info))
    else:
        OUT.print(name_value_table(f"The cache of {model}", info_rows(info)))


@command("init", *TEXT)
def init_command(
    asked: Asked,
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file, or smollm2-135m.")],
    to: Annotated[Path, typer.Option(help="The file; a new one.")] = Path("experiment.yaml"),
    json_: Json = False,
) -> None:
    """Write a commented experiment for a model, and say what it takes in time, disk and memory, measured on one block.

    Example: leankv init smollm2-135m --dataset wikipedia-sample --to first.yaml
    """
    from leankv.config.loading import load_experiment, settings_named
    from leankv.errors import UserError
    from leankv.models.loading import load_model
    from leankv.report.tables import format_duration, text_table
    from leankv.storage.files import write_text
    from leankv.studies.starting_point import experiment_text, forecast, measure_pace, starting_experiment

    if to.exists():
        raise UserError(f"{to} is there already; name a new file with --to")
    overrides = asked.overrides({"model.name": model})
    progress = Progress()
    progress.say(f"loading {model}")
    base = load_experiment(asked.config, overrides)
    loaded = load_model(base.model)
    named = settings_named(asked.config, overrides)
    settings = starting_experiment(loaded, base, named, f"results/{Path(model).name}")
    write_text(to, experiment_text(settings, loaded))
    experiment = load_experiment(to, {})
    try:
        with progress.stage("timing one block", 4) as step:
            parts = forecast(loaded, experiment, measure_pace(loaded, experiment, step))
    except BaseException:
        to.unlink()  # else it would be in the way of the same command
        raise
    if json_:
        print_json({"file": str(to), "parts": [asdict(part) for part in parts]})
        return
    rows = [
        [part.part, part.how, format_duration(part.seconds), f"{part.disk / 1e9:.2f}", f"{part.memory / 1e9:.1f}"]
        for part in parts
    ]
    whole = format_duration(sum(part.seconds for part in parts))
    disk, memory = sum(part.disk for part in parts) / 1e9, max(part.memory for part in parts) / 1e9
    rows.append(["all", "", whole, f"{disk:.2f}", f"{memory:.1f}"])
    OUT.print(text_table("What it takes here, beside the model", ["part", "of", "time", "disk GB", "memory GB"], rows))
    OUT.print(f"written: {to}; start it with: leankv run {to}", highlight=False, soft_wrap=True)


@command("capture", *TEXT, "layers", "key_space")
def capture_command(
    asked: Asked,
    blocks: Annotated[int | None, typer.Option(help="Blocks of calibration text.", show_default=False)] = None,
    json_: Json = False,
) -> None:
    """Write the keys and values of the calibration text, one safetensors file a layer, for sweeps and maps to use.

    Example: leankv capture --model smollm2-135m --dataset wikipedia-sample -o results/run
    """
    from leankv.config.loading import load_experiment
    from leankv.studies.activation_store import ActivationStore
    from leankv.studies.workspace import Workspace

    extra = {} if blocks is None else {"data.calibration_blocks": blocks}
    workspace = Workspace.load(load_experiment(asked.config, asked.overrides(extra)), Progress())
    activations = ActivationStore(workspace).keep()
    folder, manifest = activations.folder, activations.manifest
    if json_:
        print_json({"folder": str(folder), **manifest})
    else:
        size = sum(file.stat().st_size for file in folder.iterdir())
        tokens = manifest["blocks"] * manifest["block_length"]
        OUT.print(
            f"keys and values of {len(manifest['layers'])} layers, {tokens} tokens, {size / 1e6:.1f} MB: {folder}",
            highlight=False,
            soft_wrap=True,
        )


@reading_command("doctor")
def doctor_command(json_: Json = False) -> None:
    """What is installed here, which extras are missing, and whether CUDA, NF4 and the embedded model work.

    Example: leankv doctor
    """
    from leankv.report.tables import text_table
    from leankv.studies.doctor import BROKEN, examine

    with Progress().stage("looking", 1) as step:
        findings = list(examine(Path()))
        step()
    if json_:
        print_json([asdict(finding) for finding in findings])
    else:
        rows = [[one.name, one.state, one.told, one.remedy or "-"] for one in findings]
        OUT.print(text_table("This installation", ["what", "state", "found", "to mend it"], rows))
    if any(finding.state == BROKEN for finding in findings):
        raise typer.Exit(1)

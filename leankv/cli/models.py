"""Commands that look at a model: `info`, `capture`."""

from pathlib import Path
from typing import Annotated

import typer

from leankv.cli.app import OUT, Json, command, print_json
from leankv.cli.options import Asked
from leankv.progress import Progress


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
        print_json(info)
    else:
        OUT.print(name_value_table(f"The cache of {model}", info_rows(info)))


@command("capture", "layers", "block_length")
def capture_command(
    asked: Asked,
    blocks: Annotated[int | None, typer.Option(help="Blocks of calibration text.", show_default=False)] = None,
    json_: Json = False,
) -> None:
    """Write the keys and values of the calibration text to a folder, one safetensors file a layer."""
    from leankv.capture import capture
    from leankv.data import TextSource
    from leankv.experiment import load_experiment
    from leankv.model import describe, load_model
    from leankv.notation import parse_layers
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
        print_json({"folder": str(folder), **activations.manifest})
    else:
        size = sum(file.stat().st_size for file in folder.iterdir())
        OUT.print(
            f"keys and values of {len(layers)} layers, {text.tokens.numel()} tokens, {size / 1e6:.1f} MB: {folder}",
            highlight=False,
            soft_wrap=True,
        )

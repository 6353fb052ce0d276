"""Commands that look at a model: `info`, `capture`."""

from dataclasses import asdict
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


@command("capture", "layers", "block_length", "key_space")
def capture_command(
    asked: Asked,
    blocks: Annotated[int | None, typer.Option(help="Blocks of calibration text.", show_default=False)] = None,
    json_: Json = False,
) -> None:
    """Write the keys and values of the calibration text, one safetensors file a layer, for sweeps and maps to use."""
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

"""Commands for the hub: `export`, `push`."""

from pathlib import Path
from typing import Annotated

import typer

from leankv.cli.app import OUT, command, reading_command
from leankv.cli.bundles import open_bundle
from leankv.cli.options import Asked


@command("export")
def export_command(
    asked: Asked,
    bundle: Annotated[Path, typer.Option(help="The bundle.", show_default=False)],
    to: Annotated[Path, typer.Option(help="Folder of the repository; a new one.", show_default=False)],
    with_weights: Annotated[
        bool, typer.Option("--with-weights", help="Put the model's weights in it, not only its name.")
    ] = False,
    license: Annotated[
        str | None, typer.Option(help="Of the weights; unless given, what the base's card names.", show_default=False)
    ] = None,
) -> None:
    """Write a Hugging Face repository that loads anywhere, without LeanKV, and generates through the bundle's cache.

    Example: leankv export --bundle results/demo-plan/bundle --to smollm2-lean --with-weights
    """
    from leankv.export.repository import STEPS, local_base, write_repository

    loaded, opened, _, progress = open_bundle(asked, bundle, None)
    with progress.stage("writing the repository", STEPS) as step:
        files = write_repository(to, opened, loaded, with_weights=with_weights, license=license, on_step=step)
    if (base := local_base(to)) is not None:
        progress.say(f"{to} loads on this machine only: its base is the folder {base}; --with-weights puts it inside")
    size = sum((to / name).stat().st_size for name in files) / 1e6
    OUT.print(
        f'{to}: {len(files)} files, {size:.1f} MB; AutoModelForCausalLM.from_pretrained("{to}", '
        "trust_remote_code=True) loads it",
        highlight=False,
        soft_wrap=True,
    )


@reading_command("push")
def push_command(
    folder: Annotated[Path, typer.Argument(help="Folder that `leankv export` wrote.", show_default=False)],
    to: Annotated[str, typer.Option(help="Repository on the hub, USER/NAME.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make it for yourself only.")] = False,
    endpoint: Annotated[str | None, typer.Option(help="Address of another hub.", show_default=False)] = None,
) -> None:
    """Upload an exported repository to the hub, with the token that `hf auth login` keeps.

    Example: leankv push smollm2-lean --to me/smollm2-lean
    """
    from leankv.export.upload import upload

    OUT.print(upload(folder, to, private=private, endpoint=endpoint), highlight=False, soft_wrap=True)

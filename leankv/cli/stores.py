"""Commands that keep caches on disk: `prefix add`, `prefix list`, `prefix drop`, `chat`."""

from pathlib import Path
from typing import Annotated

import typer

from leankv.cli.app import OUT, PANEL_OF, Json, app, command, print_json, print_piece
from leankv.cli.bundles import MaxSize, Register, open_bundle, open_store, text_of, title_of
from leankv.cli.options import Asked
from leankv.errors import UserError

prefix = typer.Typer(name="prefix", help="Prompts kept on disk as codes.", no_args_is_help=True)
app.add_typer(prefix, rich_help_panel=PANEL_OF["prefix"])

BundleFolder = Annotated[Path, typer.Option(help="The bundle.", show_default=False)]
Store = Annotated[Path, typer.Option(help="The store's folder.", show_default=False)]


@command("add", group=prefix)
def add_command(
    asked: Asked,
    file: Annotated[Path, typer.Argument(help="A text file: a system prompt, a document.")],
    bundle: BundleFolder,
    store: Store,
    max_size: MaxSize = None,
    register: Register = None,
    json_: Json = False,
) -> None:
    """Compute a text exactly, once, and keep its keys and values as codes.

    Example: leankv prefix add --bundle results/demo-plan/bundle --store prefixes manual.txt
    """
    from leankv.evaluation.generation import encoded

    text = text_of(file)
    loaded, opened, _, progress = open_bundle(asked, bundle, register)
    kept = open_store(store, opened, loaded, progress, max_size)
    ids = encoded(loaded, text, False)
    with progress.stage("computing and storing", 1) as step:
        pages = kept.add(ids, title_of(file, ""))
        step()
    tokens, stored = kept.stored_tokens(ids), kept.stored_bytes(ids)
    told = {
        "tokens": ids.shape[1],
        "stored_tokens": tokens,
        "new_pages": pages,
        "bytes": stored,
        "uncompressed_bytes": tokens * loaded.geometry.bytes_per_token,
    }
    if json_:
        print_json(told)
    elif not tokens:
        words = f"{file}: {ids.shape[1]} tokens are less than a page, so nothing is stored"
        OUT.print(words, highlight=False, soft_wrap=True)
    else:
        ratio = told["uncompressed_bytes"] / stored
        OUT.print(
            f"{file}: {tokens} of {ids.shape[1]} tokens stored in {stored:,} bytes, {ratio:.1f} times less than the "
            f"16-bit cache; {pages} pages are new",
            highlight=False,
            soft_wrap=True,
        )


@command("list", group=prefix)
def list_command(
    asked: Asked, bundle: BundleFolder, store: Store, register: Register = None, json_: Json = False
) -> None:
    """What a store holds, used last first.

    Example: leankv prefix list --bundle results/demo-plan/bundle --store prefixes
    """
    from dataclasses import asdict

    from rich.table import Table

    loaded, opened, _, progress = open_bundle(asked, bundle, register)
    found = open_store(store, opened, loaded, progress, None).prefixes()
    if json_:
        print_json([asdict(own) for own in found])
        return
    table = Table(title=f"Prefixes in {store}")
    table.add_column("title")
    for name in ("tokens", "shared", "bytes", "ratio"):
        table.add_column(name, justify="right")
    for own in found:
        ratio = own.tokens * loaded.geometry.bytes_per_token / own.nbytes
        table.add_row(own.title, str(own.tokens), str(own.shared), f"{own.nbytes:,}", f"{ratio:.1f}")
    OUT.print(table)


@command("drop", group=prefix)
def drop_command(
    asked: Asked,
    bundle: BundleFolder,
    store: Store,
    file: Annotated[Path | None, typer.Argument(help="The text.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that the folder holds.")] = False,
    register: Register = None,
    json_: Json = False,
) -> None:
    """Remove a text from a store; pages that others begin with stay.

    Example: leankv prefix drop --bundle results/demo-plan/bundle --store prefixes manual.txt
    """
    from leankv.evaluation.generation import encoded

    if (file is None) != everything:
        raise UserError("name the text to drop, or give --all to drop everything; not both")
    text = text_of(file)
    loaded, opened, _, progress = open_bundle(asked, bundle, register)
    kept = open_store(store, opened, loaded, progress, None)
    freed = kept.drop(None if everything else encoded(loaded, text, False))
    if json_:
        print_json({"freed_bytes": freed})
    else:
        OUT.print(f"{freed:,} bytes freed", highlight=False)


@command("chat")
def chat_command(
    asked: Asked,
    bundle: BundleFolder,
    store: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the conversation between runs.", show_default=False),
    ] = None,
    name: Annotated[str, typer.Option(help="Of the conversation.")] = "conversation",
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer, at most.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token; else sampled.", min=0.0)] = 0.0,
    register: Register = None,
) -> None:
    """Talk to a model through its compressed cache. `/new` begins another conversation, `/exit` ends.

    Example: leankv chat --bundle results/demo-plan/bundle --store chats
    """
    from leankv.evaluation.conversation import Conversation
    from leankv.evaluation.generation import format_completion

    if Path(name).name != name or name.startswith("."):
        raise UserError(f"--name {name!r} is no name of a file; take letters, digits and dashes")
    loaded, opened, experiment, progress = open_bundle(asked, bundle, register)
    talk = Conversation(loaded, opened, store, name, progress.say)
    if talk.turns:
        OUT.print(f"{len(talk.turns)} turns, {talk.tokens} tokens read from {store}", highlight=False, soft_wrap=True)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            return
        if said == "/exit":
            return
        if said == "/new":
            talk.begin_anew()
        elif said:
            completion = talk.say(said, max_new_tokens, temperature, experiment.seed, print_piece)
            line = format_completion(completion, loaded.numerics["dtype"])
            OUT.print(f"\n{line}", style="dim", highlight=False, soft_wrap=True)

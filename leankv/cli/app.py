"""The command line's frame: how commands are registered, end and print. Torch is imported inside commands only."""

import functools
import inspect
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

from leankv.cli.options import settings
from leankv.errors import sentence_of
from leankv.version import __version__

EXIT_USER_ERROR = 2
PLAIN_WIDTH = 100  # columns of tables when the output is piped

app = typer.Typer(
    name="leankv",
    help="How far can a model's KV cache be compressed, where, and at what price in perplexity?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

PANELS = {
    "Begin": ("doctor", "info", "init"),
    "Measure": ("run", "capture", "train-layer", "sweep", "map", "compare", "eval-ppl"),
    "Choose, and see": ("select", "report"),
    "Use": ("generate", "chat", "prefix", "eval-tasks"),
    "Share": ("export", "push"),
}
"""How `leankv --help` groups and orders the commands."""

PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OUT = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, markup=False)  # prompts and paths are no markup


def command(
    name: str, *setting_names: str, group: typer.Typer = app
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command with its settings; what a user can mend ends in one sentence and exit code 2."""
    return lambda function: _registered(name, settings(*setting_names)(function), group)


def reading_command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that reads finished files only, and so takes no settings of an experiment."""
    return lambda function: _registered(name, function, app)


def _registered(name: str, function: Callable[..., None], group: typer.Typer) -> Callable[..., None]:
    @functools.wraps(function)
    def guarded(**given: Any) -> None:
        try:
            function(**given)
        except KeyboardInterrupt:
            fail("interrupted: what was finished is kept, and the same command goes on from there")
        except Exception as error:
            if (sentence := sentence_of(error)) is None:
                raise
            fail(f"error: {sentence}")

    guarded.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    del guarded.__wrapped__
    return group.command(name, rich_help_panel=PANEL_OF[name] if group is app else None)(guarded)


def fail(sentence: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(sentence, markup=False, style="red")
    raise typer.Exit(EXIT_USER_ERROR)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_table_json(table: Any) -> None:
    """A DataFrame as a list of rows, at the full precision of its numbers."""
    print_json(table_rows(table))


def table_rows(table: Any) -> Any:
    """The rows of a DataFrame, as JSON has them."""
    return json.loads(table.to_json(orient="records", double_precision=15))


def _version(wanted: bool) -> None:
    if wanted:
        OUT.print(f"leankv {__version__}", highlight=False)
        raise typer.Exit


def print_piece(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """How far can a model's KV cache be compressed, where, and at what price in perplexity?"""

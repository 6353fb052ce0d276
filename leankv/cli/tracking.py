"""The option `--track`, of commands that write a run's folder and return it."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from leankv.progress import Progress

OPTION = Annotated[
    str | None,
    typer.Option("--track", help="Also tell trackio, wandb, mlflow or tensorboard the figures.", show_default=False),
]


def tracked(function: Callable[..., Path]) -> Callable[..., None]:
    """A command that tells a tracker what its folder has, once it is done."""

    @functools.wraps(function)
    def with_tracker(track: str | None = None, **given: Any) -> None:
        if track is None:
            function(**given)
            return
        from leankv.studies.tracking import check_tracker
        from leankv.studies.tracking import track as tell

        check_tracker(track)
        tell(track, function(**given), Progress().say)

    signature = inspect.signature(function)
    parameter = inspect.Parameter("track", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=OPTION)
    with_tracker.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), parameter], return_annotation=None
    )
    del with_tracker.__wrapped__
    return with_tracker

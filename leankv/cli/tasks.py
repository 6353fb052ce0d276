"""Commands that ask tasks: `eval-tasks`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from leankv.cli.app import OUT, Json, command, print_json, table_rows
from leankv.cli.bundles import Register, register_families, with_bundle
from leankv.cli.options import MEASURE, TEXT, Asked
from leankv.config.presets import RULER_OFFLINE
from leankv.errors import UserError
from leankv.progress import Progress

LENGTHS = "1024,2048,4096,8192"


@command("eval-tasks", *TEXT, "sinks", "window")
def eval_tasks_command(
    asked: Asked,
    bundle: Annotated[Path, typer.Option(help="Bundle to ask beside the base.", show_default=False)],
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks of lm-evaluation-harness, or YAML files of them, by commas; ruler-offline needs no hub."
        ),
    ] = RULER_OFFLINE,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Whose cache to ask too (again for more), as in compare.", show_default=False),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of a sample of RULER's tasks.")] = LENGTHS,
    samples: Annotated[int, typer.Option(help="Of each task, the first so many; 0 for all.")] = 50,
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="Examples before each question; unless given, the task's own.", show_default=False),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with task files of your own.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples read together.")] = 1,
    blocks: Annotated[
        int,
        typer.Option(help="Blocks of report text to compare predictions on; 0 for none.", rich_help_panel=MEASURE),
    ] = 8,
    free_run: Annotated[
        int,
        typer.Option(help="Tokens that all write by themselves from half of each block.", rich_help_panel=MEASURE),
    ] = 128,
    register: Register = None,
    json_: Json = False,
) -> None:
    """Task scores of the base model, a bundle and others' caches, side by side in lm-evaluation-harness.

    Every token of prompts, answers and texts whose likelihood is asked is read through the cache. Answers are kept as
    they come; the same command goes on from there.

    Example: leankv eval-tasks --bundle results/demo-plan/bundle --lengths 2048 --baseline hqq:4 -o results/tasks
    """
    for package in ("lm_eval", "wonderwords", "nltk"):
        if find_spec(package) is None:
            raise UserError(f"eval-tasks needs {package}; run: pip install 'leankv[eval]'")
    from leankv.report.task_scores import task_scores_table
    from leankv.studies.eval_tasks import TaskSettings, evaluate_tasks

    for option, value, least in (
        ("samples", samples, 0),
        ("batch-size", batch_size, 1),
        ("blocks", blocks, 0),
        ("free-run", free_run, 1),
        ("num-fewshot", num_fewshot or 0, 0),
    ):
        if value < least:
            raise UserError(f"--{option} must be at least {least}, not {value}")
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path} is no folder; name one with task files")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks {tasks!r} names none; {RULER_OFFLINE} is what needs no hub")
    settings = TaskSettings(
        tasks=names,
        lengths=_lengths(lengths),
        samples=samples or None,
        num_fewshot=num_fewshot,
        include_path=include_path,
        batch_size=batch_size,
        blocks=blocks,
        new_tokens=free_run,
    )
    register_families(register)
    experiment = with_bundle(asked, bundle)
    told = evaluate_tasks(experiment, bundle, baseline or [], settings, Progress())
    if json_:
        print_json({"tasks": table_rows(told.scores), "agreement": table_rows(told.agreement)})
        return
    OUT.print(task_scores_table(told))
    OUT.print(f"written: {experiment.output_dir}/tasks.csv, agreement.csv, tasks.md", highlight=False, soft_wrap=True)


def _lengths(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < LEAST:
        raise UserError(f"--lengths {text!r} is not understood; write token counts of at least {LEAST}: {LENGTHS}")
    return sorted(set(found))


LEAST = 1024
"""Below, some of RULER's own sentences do not fit, and the harness looks for shorter ones without end."""

"""Commands that read what runs left: `report`."""

from pathlib import Path
from typing import Annotated

import typer

from leankv.cli.app import OUT, Json, print_json, reading_command
from leankv.report import run_files


@reading_command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; unfinished ones show what is there.")],
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir",
            "-o",
            help="Write the page there. Where selections are among the runs, plans.csv, plans.md and "
            "figures/frontier.png stand beside it, in which finished comparisons are drawn with them.",
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """One HTML page that says what runs chose, cost and save: report.html, in the first run's folder.

    Charts and tables are in the page; it opens without a network. Several runs stand side by side.

    Example: leankv report results/demo results/demo-plan
    """
    from leankv.report.frontier import write_together
    from leankv.report.page.render import PAGE, write_page
    from leankv.report.runs import runs_table
    from leankv.report.summary import read_summary

    finished = [run for run in runs if (run / run_files.SUMMARY).is_file()]
    if json_:
        print_json({str(run): read_summary(run).to_json() for run in runs})
        return
    page = (output_dir or runs[0]) / PAGE
    write_page(runs, page)
    written = [page, *(write_together(runs, output_dir) if output_dir else ())]
    if output_dir is None and finished:
        OUT.print(runs_table(finished))
    OUT.print(f"written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)

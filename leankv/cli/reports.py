"""Commands that read what runs left: `report`."""

from pathlib import Path
from typing import Annotated

import typer

from leankv.cli.app import OUT, Json, print_json, reading_command


@reading_command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir",
            "-o",
            help="Write plans.csv, plans.md and figures/frontier.png there; finished comparisons among the runs are "
            "drawn beside the selections.",
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Finished runs side by side: what each chose, what it costs, what it saves, and what it says.

    Example: leankv report results/demo results/demo-plan
    """
    from leankv.report.frontier import write_together
    from leankv.report.runs import runs_table
    from leankv.report.summary import read_summary

    if output_dir is not None:
        write_together(runs, output_dir)
        OUT.print(f"written: {output_dir}/plans.csv, plans.md, figures/frontier.png", highlight=False)
        return

    if json_:
        print_json({str(run): read_summary(run).to_json() for run in runs})
    else:
        OUT.print(runs_table(runs))

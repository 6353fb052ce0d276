"""One or several runs as an HTML page: charts, tables and scripts are in it, and nothing is fetched."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from leankv.report.columns import on_report_text
from leankv.report.compare import compare_title
from leankv.report.page import charts, tables
from leankv.report.page.contents import RunContents, read_run
from leankv.report.page.text_difference import parted
from leankv.report.tables import format_budget
from leankv.report.task_scores import note_of
from leankv.storage.files import write_text
from leankv.version import __version__

PAGE = "report.html"
"""What it is called in a folder."""


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Write the report of runs.

    Args:
        folders: of the runs; unfinished ones show what is there.
        path: of the page.

    Raises:
        UserError: there is nothing of a run, or the page cannot be written.
    """
    write_text(path, page([read_run(folder) for folder in folders]))


def page(runs: Sequence[RunContents]) -> str:
    """The page's text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("leankv.report.page", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn: list[dict[str, Any]] = []

    def chart(figure: go.Figure) -> str:
        drawn.append(json.loads(figure.to_json()))
        return f"chart-{len(drawn) - 1}"

    finished = [run for run in runs if run.chosen]
    has_frontier = bool(finished) or any(run.compare is not None and len(on_report_text(run.compare)) for run in runs)
    body = environment.get_template("page.html").render(
        version=__version__,
        runs=runs,
        side_by_side=_side_by_side(finished) if len(finished) > 1 else None,
        frontier=chart(charts.frontier(runs)) if has_frontier else None,
        chart=chart,
        charts=charts,
        compare_title=compare_title,
        tables=tables,
        parted=parted,
        task_note=note_of,
    )
    # Behind the body, which draws as it is rendered. `</` would end the script.
    scripts = environment.get_template("scripts.html").render(
        plotly=Markup(get_plotlyjs()),
        drawn=Markup(json.dumps(drawn).replace("</", "<\\/")),
    )
    return body.replace("<!-- scripts -->", scripts)


def _side_by_side(runs: Sequence[RunContents]) -> tables.PageTable:
    """The headlines of several runs, a column each."""
    columns = [
        (f"{run.name}, {format_budget(one.summary.budget)}", dict(tables.headline(one)))
        for run in runs
        for one in run.chosen
    ]
    names = list(columns[0][1])
    rows = [[tables.Cell.words(name), *(tables.Cell.words(told[name]) for _, told in columns)] for name in names]
    return tables.PageTable(["", *(name for name, _ in columns)], rows)

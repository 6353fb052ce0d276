"""The selection and its summary as tables, for the screen and for `selection.md`."""

from pathlib import Path
from typing import Any

from rich.table import Table

from leankv.report import run_files
from leankv.report.columns import read_sweep
from leankv.report.divergence import divergence_rows
from leankv.report.summary import Summary, read_summary
from leankv.report.sweep import FIGURE, sweep_markdown, sweep_title
from leankv.report.sweep_figure import draw_costs
from leankv.report.tables import (
    format_budget,
    format_interval,
    format_protocol,
    format_ratio,
    markdown_table,
    name_value_table,
    plain_table,
)
from leankv.search.certificate import Certificate
from leankv.storage.files import read_json, write_atomically, write_text

VERDICTS = {
    "kept": "kept",
    "over budget": "left out",
    "over budget alone": "not tried",
}


def write_reports(folder: Path) -> None:
    """Render a finished run: `sweep.md`, `selection.md`, and the figure with the chosen layers marked."""
    sweep, selection = read_sweep(folder), read_json(folder / run_files.SELECTION)
    write_text(folder / "sweep.md", sweep_markdown(sweep))
    write_text(folder / "selection.md", selection_markdown(selection, read_summary(folder)))
    write_atomically(folder / FIGURE, lambda path: draw_costs(sweep, selection, sweep_title(sweep), path))


def selection_rows(selection: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the selection's steps for people."""
    header = [
        "layers",
        "layer tried",
        "its cost",
        "sum of costs (predicted)",
        "joint cost (measured)",
        "what became of it",
    ]
    rows = [
        [
            str(len(step["layers"])),
            str(step["layer"]),
            f"{step['cost']:+.3f}",
            f"{step['predicted']:+.3f}",
            "-" if step["joint_cost"] is None else f"{step['joint_cost']:+.3f}",
            VERDICTS[step["verdict"]],
        ]
        for step in selection["steps"]
    ]
    return header, rows


def selection_title(selection: dict[str, Any]) -> str:
    """One line that says what the steps were measured on."""
    return (
        f"Layers added in order of cost, budget {format_budget(selection['budget'])}, measured jointly on the "
        f"{selection['split']} split (base perplexity {selection['base_ppl']:.3f}); not tried: over budget alone"
    )


def selection_table(selection: dict[str, Any]) -> Table:
    """The selection's steps, for a terminal."""
    return plain_table(selection_title(selection), *selection_rows(selection))


def selection_markdown(selection: dict[str, Any], summary: Summary) -> str:
    """The selection's steps and the result on report text."""
    return "\n\n".join(
        [
            "# Selection",
            selection_title(selection) + ".",
            markdown_table(*selection_rows(selection)),
            "## Joint result on report text",
            markdown_table(["", ""], [[name, value] for name, value in summary_rows(summary)]),
            "",
        ]
    )


def summary_rows(summary: Summary) -> list[tuple[str, str]]:
    """The summary as name and value, for people."""
    layers = summary.selected_layers
    rows = [
        ("model", f"{summary.model}, {summary.n_layers} layers, width {summary.width}"),
        ("codec, protocol", f"{summary.codec}, {format_protocol(summary.protocol, summary.sinks, summary.window)}"),
        ("layers compressed", f"{len(layers)} of {summary.n_layers}: {', '.join(map(str, layers)) or 'none'}"),
        ("text", f"{summary.dataset}, {summary.split} split, {summary.tokens} tokens"),
        ("base perplexity", f"{summary.base_ppl:.3f}"),
        ("perplexity", f"{summary.ppl:.3f}"),
        ("joint cost", f"{summary.delta_ppl:+.3f} points ({summary.delta_percent:+.1f} %)"),
        ("95 % interval", format_interval(summary.delta_ppl_interval)),
        (
            "budget",
            f"{format_budget(summary.budget)}, {'kept' if summary.within_budget else 'exceeded'} on this text",
        ),
        *([("certificate", certificate_text(summary))] if summary.certificate else []),
        *divergence_rows(summary.divergence),
        ("measured at", f"{summary.context} tokens, one sequence, exact vectors in {summary.dtype}"),
        ("code ratio (compressed vectors only)", format_ratio(summary.code_ratio)),
        ("cache ratio", format_ratio(summary.cache_ratio)),
        ("all-in ratio (with codecs and a step's peak)", format_ratio(summary.all_in_ratio)),
        ("cache, 16-bit", f"{summary.base_bytes / 1e6:.2f} MB"),
        ("cache, held", f"{summary.held_bytes / 1e6:.2f} MB, stored {summary.stored_bytes / 1e6:.2f} MB"),
        ("peak of a decoding step", f"{summary.peak_step_bytes / 1e6:.2f} MB over what is held"),
        (
            "codecs",
            (f"{summary.codec_parameters} parameters, " if summary.codec_parameters else "")  # most are not trained
            + f"{summary.codec_bytes / 1e6:.2f} MB on disk, "
            f"{summary.codec_bytes_memory / 1e6:.2f} MB in memory",
        ),
    ]
    claimed = summary.claimed_cache_ratio
    rows += [(f"claimed cache ratio at {tokens} tokens", format_ratio(ratio)) for tokens, ratio in claimed.items()]
    return rows


def certificate_text(summary: Summary) -> str:
    """What certifying the plan came to, in a sentence."""
    assert summary.certificate is not None
    return Certificate.from_json(dict(summary.certificate)).sentence()


def summary_table(summary: Summary) -> Table:
    """The summary, for a terminal."""
    return name_value_table("Joint result on report text", summary_rows(summary))

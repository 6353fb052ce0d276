"""Tables and summaries on disk: read back as written, also by the version before, or refused in a sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from leankv.errors import UserError
from leankv.report.columns import (
    COMPARE_COLUMNS,
    MAP_COLUMNS,
    SWEEP_COLUMNS,
    on_report_text,
    read_compare,
    read_map,
    read_sweep,
)
from leankv.report.divergence import DIVERGENCE_COLUMNS
from leankv.report.evaluation import Evaluation
from leankv.report.model_card import measured
from leankv.report.page.contents import Chosen
from leankv.report.page.tables import bytes_saved
from leankv.report.plans import read_entries
from leankv.report.summary import Summary, read_summary
from leankv.storage.files import write_json

TABLES = {
    "sweep": (SWEEP_COLUMNS, read_sweep),
    "map": (MAP_COLUMNS, read_map),
    "compare": (COMPARE_COLUMNS, read_compare),
}
BEFORE = {"baseline": "peer", "error_metric": "weighting"}


def write_table(folder: Path, command: str, **columns: Any) -> None:
    """A table of one row, with the names that its columns have today unless they are given another."""
    row = dict.fromkeys(TABLES[command][0], 1.5) | {"baseline": "someone", "error_metric": "none"}
    table = pd.DataFrame([row], columns=list(TABLES[command][0])).rename(columns=columns)
    table.to_csv(folder / f"{command}.csv", index=False)


def summary() -> Summary:
    return Summary(
        model="tiny",
        n_layers=4,
        width=32,
        codec="ae:4",
        key_space="post-rope",
        error_metric="gradient",
        protocol="strict",
        sinks=0,
        window=0,
        dataset="text.txt",
        split="report",
        tokens=141,
        budget="7%",
        budget_points=0.7,
        base_ppl=10.0,
        selected_layers=(0, 3),
        ppl=10.5,
        delta_ppl=0.5,
        delta_ppl_interval=(0.25, 0.75),
        delta_percent=5.0,
        within_budget=True,
        divergence=dict.fromkeys(DIVERGENCE_COLUMNS, 0.125),
        context=48,
        code_ratio=8.0,
        code_ratio_stored=None,
        cache_ratio=1.5,
        all_in_ratio=0.5,
        base_bytes=3000,
        held_bytes=2000,
        stored_bytes=2000,
        peak_step_bytes=100,
        claimed_cache_ratio={1024: 1.5, 4096: 1.75},
        codec_parameters=10,
        codec_bytes=40,
        codec_bytes_memory=40,
        seconds={"capture": 0.5, "report": 1.5},
        peak_rss_bytes=10**8,
        device="cpu",
        dtype="float32",
        claimed_base_bytes={1024: 64_000, 4096: 256_000},
    )


@pytest.mark.parametrize("command", list(TABLES))
def test_a_table_of_the_version_before(tmp_path: Path, command: str) -> None:
    """Under the names that its columns had."""
    columns, read = TABLES[command]
    write_table(tmp_path, command)
    today = read(tmp_path)
    write_table(tmp_path, command, **BEFORE)
    before = read(tmp_path)
    assert tuple(before.columns) == columns
    pd.testing.assert_frame_equal(before, today)


@pytest.mark.parametrize("command", list(TABLES))
def test_a_table_that_is_not_there_or_lacks_a_column(tmp_path: Path, command: str) -> None:
    _, read = TABLES[command]
    with pytest.raises(UserError, match=f"leankv {command} --output-dir"):
        read(tmp_path)
    write_table(tmp_path, command, protocol="manner")
    with pytest.raises(UserError, match=f"no column protocol.*leankv {command} --output-dir"):
        read(tmp_path)


def test_a_summary_is_the_same_after_json(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", summary().to_json())
    assert read_summary(tmp_path) == summary()
    written = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert written == summary().to_json()
    assert written["kl"] == written["top1_low"] == 0.125
    assert written["claimed_cache_ratio"] == {"1024": 1.5, "4096": 1.75}


def test_a_summary_of_the_version_before(tmp_path: Path) -> None:
    value = summary().to_json()
    value["weighting"] = value.pop("error_metric")
    write_json(tmp_path / "summary.json", value | {"no_longer_known": 1})
    assert read_summary(tmp_path) == summary()


def test_bytes_saved_are_of_caches_that_stop_growing_where_layers_slide() -> None:
    def base(told: Summary) -> list[str]:
        return [row[1].text for row in bytes_saved(Chosen(told)).rows]

    slides = {4096: 5_000_000, 32768: 6_000_000}
    assert base(replace(summary(), claimed_cache_ratio=dict.fromkeys(slides, 2.0), claimed_base_bytes=slides)) == [
        "5.0",
        "6.0",
    ]
    before = replace(summary(), claimed_cache_ratio={4096: 2.0}, claimed_base_bytes=None, context=1024)
    assert base(replace(before, base_bytes=4 * 2 * 32 * 2 * 1024)) == ["2.1"]
    assert base(replace(before, base_bytes=4 * 2 * 32 * 2 * 512)) == ["-"], "an earlier version's file does not say"


def test_the_choice_that_was_made_last_comes_first(tmp_path: Path) -> None:
    write_json(tmp_path / "plans.json", [{"summary": summary().to_json()}])
    write_json(tmp_path / "summary.json", summary().to_json())
    assert len(read_entries(tmp_path)) == 1
    write_json(tmp_path / "summary.json", replace(summary(), strategy="greedy", ppl=12.0).to_json())
    assert [entry["summary"]["ppl"] for entry in read_entries(tmp_path)] == [12.0, 10.5]


def test_only_report_text_stands_beside_selections() -> None:
    table = read_compare(Path(__file__).parent.parent / "results" / "compare-smollm2-selection")
    assert len(table)
    assert not len(on_report_text(table))


def test_a_card_says_how_prefixes_were_measured() -> None:
    experiment = {"data": {"block_length": 4096}, "protocol": {"prefix_length": 1024, "continuation": 256}}
    assert "in blocks of 4096 tokens" in measured(summary(), experiment)
    told = measured(replace(summary(), protocol="prefix"), experiment)
    assert "behind prefixes of 1024 tokens, 256 read beside each" in told
    assert "4096" not in told.partition("|")[0]


def test_a_summary_that_is_not_there_or_lacks_a_figure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished selection; run: leankv select"):
        read_summary(tmp_path)
    for name in ("context", "kl_p99"):
        value = summary().to_json()
        del value[name]
        write_json(tmp_path / "summary.json", value)
        with pytest.raises(UserError, match=f"has no {name}, .*leankv select --output-dir"):
            read_summary(tmp_path)


def test_an_evaluation_without_a_bundle_has_all_keys() -> None:
    """So that who reads the JSON need not ask whether a key is there."""
    about = {"model": "tiny", "dataset": "text", "split": "report", "protocol": "strict"}
    alone = Evaluation(**about, bundle=None, block_length=48, blocks=3, tokens=141, base_ppl=9.0)  # type: ignore[arg-type]
    told = alone.to_json()
    assert {name: told[name] for name in about} == about
    assert all(told[name] is None for name in ("ppl", "interval", "free_run", "sinks", *DIVERGENCE_COLUMNS))
    assert alone.kl is alone.top1 is None

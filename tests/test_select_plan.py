"""Searching a plan, from the command to the bundle, on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pandas as pd
import pytest

from leankv.cache.bundle import load_bundle
from leankv.cache.codec_files import load_codec, save_codec
from leankv.cache.plan import PlanSpec
from leankv.config.loading import load_experiment
from leankv.errors import UserError
from leankv.models.loading import load_model
from leankv.report.plans import PLANS_COLUMNS
from leankv.studies import select_plan
from leankv.studies.plan_options import Claim
from tests.forked import CommandProcess
from tests.run_folders import (
    finished_files,
    kill_the_first_worker,
    refuse,
    succeed,
    succeed_json,
    wait_for,
    worker_processes,
)

pytestmark = pytest.mark.whole_runs


@pytest.fixture(scope="module")
def config(search_config: Path) -> Path:
    return search_config


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a finished search, and what it printed as JSON."""
    folder = tmp_path_factory.mktemp("plans") / "run"
    return folder, succeed_json("select", "--config", config, "--budget", "20%", "-o", folder)


@pytest.fixture(scope="module")
def filled(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, Any]]:
    """The folder of a search that does not refine, its command but for the folder, and what it printed as JSON."""
    command = ["select", "--config", str(config), "--budget", "20%", "--strategy", "waterfill"]
    folder = tmp_path_factory.mktemp("filled") / "run"
    (summary,) = succeed_json(*command, "-o", folder)
    return folder, command, summary


def test_a_search_ends_with_a_certified_plan_and_its_bundle(run):
    folder, (summary,) = run
    assert summary["certificate"]["certified"]
    assert summary["certificate"]["budget_percent"] == 20
    assert summary["cache_ratio"] > 1
    (row,) = pd.read_csv(folder / "plans.csv").to_dict("records")
    assert list(row) == list(PLANS_COLUMNS)
    assert row["certified"]
    assert row["evaluations"] <= 72
    assert (folder / "manifest.json").is_file()
    assert (folder / "figures" / "plans.png").stat().st_size > 10_000
    (entry,) = json.loads((folder / "plans.json").read_text())
    model = load_model(load_experiment(folder / "experiment.yaml", {}).model).model
    bundle = load_bundle(folder / "bundle", model)
    sites = PlanSpec.parse(entry["plan"]).sites(4)
    assert {site: codec.recipe for site, codec in bundle.plan.items()} == sites
    assert PlanSpec.parse(json.loads((folder / "plan.json").read_text())).sites(4) == sites
    assert "certified: at most +20 %" in (folder / "bundle" / "README.md").read_text()
    assert "certified: at most +20 %" in (folder / "selection.md").read_text()


def test_candidates_go_from_safe_to_bold_and_save_more_each(run):
    folder, _ = run
    (entry,) = json.loads((folder / "plans.json").read_text())
    costs = [each["cost_percent"] for each in entry["candidates"]]
    assert costs == sorted(costs)
    assert costs[-1] <= 20
    ratios = [each["ratio"] for each in entry["candidates"]]
    assert ratios == sorted(ratios)


def test_asked_again_nothing_is_measured_anew(run, config):
    folder, (first,) = run
    cells = {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    codecs = {path.name: path.stat().st_mtime_ns for path in (folder / "codecs").iterdir()}
    (again,) = succeed_json("select", "--config", config, "--budget", "20%", "-o", folder)
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")} == cells
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "codecs").iterdir()} == codecs
    for name in ("ppl", "cache_ratio", "certificate", "codec"):
        assert again[name] == first[name]


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_workers_that_search_together_come_to_the_same(run, filled, tmp_path, monkeypatch, executor):
    """On Ray, also where one of them is killed; `tests/test_executors.py` kills local ones."""
    folder, command, _ = filled
    if executor == "local":  # they refine, too
        folder, command = run[0], command[: command.index("--strategy")]
    command = [*command, "-o", tmp_path, "--executor", executor, "--workers", 2]
    if executor == "ray":
        pytest.importorskip("ray")
        monkeypatch.setenv("RAY_worker_niceness", "0")  # of 15, beside other tests they would hardly run
        killer = Thread(target=kill_the_first_worker, args=(tmp_path,))
        killer.start()
        result = succeed(*command, "--json")
        killer.join()
        assert "shard 1/2 died (" in result.stderr
    else:
        result = succeed(*command, "--json")
    (summary,) = json.loads(result.stdout)
    (expected,), (entry,) = (json.loads((own / "plans.json").read_text()) for own in (folder, tmp_path))
    for name in ("plan", "steps", "candidates", "evaluations"):
        assert entry[name] == expected[name]
    assert summary["certificate"] == expected["summary"]["certificate"]
    assert {path.name for path in (tmp_path / "cells").glob("*.json")} >= {
        path.name for path in (folder / "cells").glob("nats-selection*.json")
    }
    logs = [(tmp_path / "logs" / f"shard-{number}.log").read_text() for number in (1, 2)]
    assert len(set(worker_processes(tmp_path).values())) == 2
    assert all("certifying" in log for log in logs)
    load_bundle(tmp_path / "bundle", load_model(load_experiment(tmp_path / "experiment.yaml", {}).model).model)


def test_workers_do_not_add_layers_in_turn(config, tmp_path):
    command = ("select", "--config", config, "-o", tmp_path, "--strategy", "greedy", "--executor", "local")
    assert "leankv sweep --executor" in refuse(*command)
    assert "--workers needs --executor" in refuse("select", "--config", config, "-o", tmp_path, "--workers", "2")


def test_a_smaller_memory_for_codecs_is_kept(run, config, tmp_path):
    folder, (free,) = run
    limit = free["codec_bytes_memory"] // 2
    (limited,) = succeed_json(
        *("select", "--config", config, "--budget", "20%", "-o", folder, "--strategy", "waterfill"),
        *("--max-codec-memory", str(limit)),
    )
    assert limited["codec_bytes_memory"] <= limit
    assert limited["cache_ratio"] <= free["cache_ratio"] * 1.02
    kept = json.loads((folder / "plans.json").read_text())
    assert [entry["settings"]["selection"]["max_codec_memory"] for entry in kept] == [None, str(limit)]


def test_a_ratio_may_be_the_target(config, tmp_path):
    (summary,) = succeed_json(
        *("select", "--config", config, "--budget", "80%", "-o", tmp_path / "run", "--strategy", "waterfill"),
        *("--recipes", "int", "--target-ratio", "2.2", "--dtype", "bfloat16"),  # what is exact counts with 16 bits
    )
    assert 0.98 * 2.2 <= summary["cache_ratio"] < 3


def test_of_several_searches_with_a_target_the_cheapest_plan_is_tested_and_not_the_smallest():
    def candidate(ratio, cost):
        return select_plan.Candidate(None, PlanSpec(), Claim(1 / ratio, 0.0), ratio, cost)

    cheap, smaller, far = candidate(8.0, 0.01), candidate(8.05, 0.03), candidate(7.0, 0.005)
    assert select_plan.in_order([smaller, far, cheap], 0.07, None) == [far, cheap, smaller]
    assert select_plan.in_order([smaller, far, cheap], 0.07, 8.0) == [cheap]
    assert select_plan.in_order([far], 0.07, 8.0) == [far], "fitted anew, it takes more than it promised"
    with pytest.raises(UserError, match=r"no plan keeps within \+2\.02 %: the nearest costs \+3\.05 %"):
        select_plan.in_order([smaller], 0.02, 8.0)


def test_windows_are_part_of_the_plan(config, tmp_path):
    folder = tmp_path / "run"
    (summary,) = succeed_json(
        *("select", "--config", config, "--budget", "50%", "-o", folder, "--strategy", "waterfill"),
        *("--recipes", "int", "--windows", "2,16"),
    )
    assert summary["window"] in (2, 16)
    (entry,) = json.loads((folder / "plans.json").read_text())
    assert {each["window"] for each in entry["candidates"]} <= {2, 16}
    # What is measured of the bundle is the cache that it makes.
    read = succeed_json("eval-ppl", "--bundle", folder / "bundle")
    assert read["window"] == summary["window"]
    assert read["ppl"] == pytest.approx(summary["ppl"])


def test_several_budgets_are_rows_of_one_table(config, tmp_path):
    folder = tmp_path / "run"
    succeed(
        *("select", "--config", config, "--budget", "15%,60%", "-o", folder, "--strategy", "waterfill"),
        *("--recipes", "int", "--minimize", "stored", "--refit", "sequential"),
    )
    table = pd.read_csv(folder / "plans.csv")
    assert list(table["budget"]) == ["15%", "60%"]
    assert table["cache_ratio"].is_monotonic_increasing
    assert (folder / "plan-15pct.json").is_file()
    assert (folder / "bundle-15pct").is_dir()
    assert (folder / "bundle-60pct").is_dir()


def test_codecs_may_be_trained_together(config, tmp_path):
    """For the plans that are certified; those of the search stay, and what was trained is not trained again."""
    command = [
        *("select", "--config", config, "--budget", "60%", "-o", tmp_path / "run", "--strategy", "waterfill"),
        *("--recipes", "transform:s0.01,transform:s0.08", "--refit", "distill", "--set", "data.calibration_blocks=8"),
    ]
    first = succeed(*command)
    assert "distilled in " in first.stderr
    table = pd.read_csv(tmp_path / "run" / "plans.csv")
    assert list(table["refit"]) == ["distill"]
    before = finished_files(tmp_path / "run")
    again = succeed(*command)
    assert "distilled in " not in again.stderr
    assert finished_files(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--budget", "0.01%", "--recipes", "int:3", "--set", "certification.clip=10"), "takes at least"),
        (("--target-ratio", "90", "--recipes", "int:2"), "no plan reaches a ratio of 90: the best has"),
        (
            ("--target-ratio", "2", "--recipes", "resid(share:-1,int:2)", "--max-codec-memory", "2kB"),
            "no plan reaches a ratio of 2 with codecs within 2kB: the best has",
        ),
        (("--strategy", "refine"), "write waterfill before it"),
        (("--strategy", "luck"), "must be one of greedy, waterfill, refine, evolve"),
        (("--sites", "q:1"), "sites 'q:1' are not understood"),
        (("--sites", "k:9"), "goes past the model's last layer"),
        (("--max-codec-memory", "lots"), "no amount of memory"),
        (("--minimize", "time"), "selection.minimize must be one of"),
        (("--recipes", "wishes"), "is not understood"),
        (("--windows", "many"), "windows 'many' are not understood"),
        (("--block-length", "513"), "data.block_length of 513 tokens is more than the model's 512 positions"),
        (
            ("--protocol", "prefix", "--window", "0", "--prefix-length", "400", "--continuation", "113"),
            "protocol.prefix_length with protocol.continuation of 513 tokens is more than",
        ),
        (("--recipes", "int:4", "--refit", "distill"), "int:4 is not trained; --refit distill takes transform, share"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(config, tmp_path, options, says):
    assert says in refuse("select", "--config", config, "-o", tmp_path / "run", "--strategy", "waterfill", *options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--set", "certification.max_documents=3"), "set certification.max_documents to more than 3"),
        (("--set", "data.selection_blocks=3", "--set", "certification.clip=auto"), "set data.selection_blocks to 4 or"),
        (("--window", "22"), "2 sinks and a window of 22 keep every token of selection blocks of 24 exact"),
        (("--windows", "4,46"), "a window of 46 keep every token of"),
    ],
)
def test_what_could_not_be_certified_is_refused_before_anything_is_searched(filled, tmp_path, options, says):
    """And what a folder holds of a finished run stays finished."""
    folder, command, _ = filled
    assert says in refuse(*command, "-o", tmp_path / "run", *options)
    assert not (tmp_path / "run" / "codecs").exists()
    begun = (folder / "experiment.yaml").read_text()
    assert "0.001 % at 95 % confidence" in refuse(*command, "-o", folder, "--budget", "0.001%")
    assert (folder / "experiment.yaml").read_text() == begun
    assert (folder / "manifest.json").is_file()


def test_a_budget_that_no_plan_keeps_does_not_stop_the_others(config, tmp_path):
    command = ("select", "--config", config, "-o", tmp_path, "--strategy", "waterfill", "--recipes", "int:2")
    clip = ("--set", "certification.clip=0.01", "--budget", "0.5%,60%", "--target-ratio", "3.3")
    assert "no plan keeps within +0.5 %: the nearest" in refuse(*command, *clip)
    (entry,) = json.loads((tmp_path / "plans.json").read_text())
    assert entry["budget"] == "60%"
    assert (tmp_path / "bundle-60pct").is_dir()


def test_recipes_may_be_named_in_any_order(filled):
    """Their errors say which is the finer; a search among them comes to the same plan and measures nothing anew."""
    folder, command, summary = filled
    before, plan = finished_files(folder), (folder / "plan.json").read_text()
    (again,) = succeed_json(
        *command, "-o", folder, "--recipes", "resid(share:-1,int:2),int:3,resid(share:-1,int:4),int:4"
    )
    assert (folder / "plan.json").read_text() == plan
    assert again["certificate"] == summary["certificate"]
    assert {path for path in finished_files(folder) if "cells" in str(path)} == {
        path for path in before if "cells" in str(path)
    }


def test_where_codecs_weigh_more_than_they_save_sites_stay_exact(config, tmp_path):
    command = ("select", "--config", config, "--budget", "20%", "--strategy", "waterfill", "-o", tmp_path)
    (summary,) = succeed_json(*command, "--minimize", "all-in", "--recipes", "resid(share:-1,int:4)")
    (entry,) = json.loads((tmp_path / "plans.json").read_text())
    assert len(PlanSpec.parse(entry["plan"]).sites(4)) < 8
    assert summary["certificate"]["certified"]


def test_all_in_counts_the_peak_that_a_plan_has_and_not_that_of_plans_that_predict(config, tmp_path):
    """Else all plans would pay for what only those that predict decode beside a step."""
    command = ["select", "--config", config, "--budget", "20%", "--strategy", "waterfill", "--minimize", "all-in"]
    command += ["-o", tmp_path / "run", "--recipes"]
    candidates = []
    for recipes in ("int:3,resid(share:-1,int:3)", "int:3"):
        succeed(*command, recipes)
        candidates.append(json.loads((tmp_path / "run" / "plans.json").read_text())[-1]["candidates"])
    both, alone = candidates
    assert both[-1]["ratio"] == pytest.approx(alone[-1]["ratio"])
    costs = [candidate["cost_percent"] for candidate in both]
    assert len(set(costs)) == len(costs)  # no plan twice, once for each peak


def test_a_killed_search_goes_on_where_it_was(filled, tmp_path):
    finished, command, expected = filled
    folder = tmp_path / "run"
    command = [*command, "-o", str(folder), "--json"]
    process = CommandProcess(command)
    wait_for(lambda: len(list(folder.glob("cells/nats-selection-*.json"))) >= 2, process)
    process.kill()
    process.communicate()
    before = finished_files(folder)
    (summary,) = succeed_json(*command[:-1])
    assert {name: mark for name, mark in finished_files(folder).items() if name in before} == before
    for name in ("ppl", "cache_ratio", "certificate", "codec", "held_bytes"):
        assert summary[name] == expected[name]
    paths = [json.loads((each / "plans.json").read_text())[0]["steps"] for each in (finished, folder)]
    assert paths[0] == paths[1]


def test_runs_stand_side_by_side(run, finished):
    folder, _ = run
    summary = json.loads((folder / "summary.json").read_text())
    shown = succeed("report", finished, folder).stdout
    assert "not asked for" in shown
    assert "at 95 %" in shown
    assert f"{summary['delta_percent']:+.2f}" in shown
    assert set(succeed_json("report", folder)) == {str(folder)}
    assert "holds no run" in refuse("report", folder / "cells")


@pytest.mark.usefixtures("drawn_whole")
def test_selections_and_comparisons_are_written_into_one_table_and_figure(run, finished, config, tmp_path):
    folder, _ = run
    succeed("compare", "int:4", "--config", config, "-o", tmp_path / "compared")
    succeed("report", folder, finished, tmp_path / "compared", "-o", tmp_path / "together")
    table = pd.read_csv(tmp_path / "together" / "plans.csv")
    assert list(table.columns) == ["run", *PLANS_COLUMNS]
    kept = [entry["summary"] for entry in json.loads((folder / "plans.json").read_text())]
    expected = [(folder, summary) for summary in kept]
    expected.append((finished, json.loads((finished / "summary.json").read_text())))
    for row, (own, summary) in zip(table.itertuples(), expected, strict=True):
        assert (row.run, row.strategy) == (own.name, summary["strategy"])
        assert row.delta_percent == pytest.approx(summary["delta_percent"])
        assert row.stored_ratio == pytest.approx(summary["base_bytes"] / summary["stored_bytes"])
    text = (tmp_path / "together" / "plans.md").read_text()
    assert "not asked for" in text
    assert "at 95 %" in text
    assert (tmp_path / "together" / "figures" / "frontier.png").stat().st_size > 10_000
    assert "holds no run" in refuse("report", folder, folder / "cells", "-o", tmp_path / "together")
    # Without a selection there is nothing to draw beside: the page alone.
    succeed("report", tmp_path / "compared", "-o", tmp_path / "alone")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["report.html"]


def test_what_is_not_certified_is_shipped_with_its_own_certificate(config, tmp_path, monkeypatch):
    """The safest plan then: the bolder one was not tested, and no certificate speaks of it."""
    really, folder = select_plan._candidates, tmp_path / "run"

    def a_safe_and_a_bold_one(*arguments):
        bold = really(*arguments)[-1]
        safe = replace(bold, spec=bold.spec.with_layers(range(4), k="int:8", v="int:8"), cost=bold.cost / 2)
        return [safe, bold]

    monkeypatch.setattr(select_plan, "_candidates", a_safe_and_a_bold_one)
    monkeypatch.setattr("leankv.search.betting.BettingTest.is_hopeless", lambda test, left: True)
    command = ["select", "--config", config, "--budget", "60%", "-o", folder, "--strategy", "waterfill"]
    (summary,) = succeed_json(*command, "--recipes", "int")
    (entry,) = json.loads((folder / "plans.json").read_text())
    assert not summary["certificate"]["certified"]
    assert [each["certificate"] for each in entry["candidates"]] == [summary["certificate"], None]
    assert PlanSpec.parse(entry["plan"]).sites(4) == PlanSpec.uniform("int:8").sites(4)


def test_a_search_takes_codecs_that_other_commands_have_fitted(config, tmp_path):
    folder = tmp_path / "run"
    recipe = "resid(share:-1,int:4)"
    succeed("compare", "--config", config, "-o", folder, recipe, "int:4")
    for path in (folder / "codecs").glob("layer-000-k-*"):  # one as an earlier version left it
        codec, about = load_codec(path)
        save_codec(path, codec, {name: value for name, value in about.items() if name != "error"})
    (summary,) = succeed_json(
        *("select", "--config", config, "--budget", "40%", "-o", folder, "--strategy", "waterfill"),
        *("--recipes", recipe),
    )
    assert summary["certificate"] is not None

"""`leankv compare`: costs and bytes of whole caches, ours and those of others."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import DynamicCache

from leankv.cache.lean_cache import LeanCache
from leankv.cache.memory import held_bytes
from leankv.cache.plan import PlanSpec
from leankv.config.presets import COMPARE_SPECS
from leankv.errors import UserError
from leankv.evaluation.baselines import find_baselines
from leankv.evaluation.perplexity import measure_nats
from leankv.report.columns import COMPARE_COLUMNS, read_compare
from leankv.report.compare import compare_markdown, compare_title, cost_rows, divergence_rows
from leankv.studies.compare import compare_caches, format_row, plans_of
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.rate_map import parse_recipes
from tests.run_folders import evaluator_of, folder_of, invoke, write_factory

pytestmark = pytest.mark.whole_runs

SPECS = ["int:4g8", "transform:1"]
PLANS = plans_of(parse_recipes(SPECS))
CONTEXT = 512  # so long that half of it is two groups of the baselines
STOCK = f"{__name__}:stock"
HALVED = f"{__name__}:halved"
BROKEN = f"{__name__}:broken"


def stock(config: Any) -> Any:
    """A baseline that loses nothing and saves nothing."""
    return DynamicCache(config=config)


class _Halved(DynamicCache):
    """Holds everything in bfloat16: half of what float32 takes, and some loss."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        k, v = super().update(keys.bfloat16(), values.bfloat16(), *args, **kwargs)
        return k.float(), v.float()


def halved(config: Any) -> Any:
    return _Halved(config=config)


def broken(config: Any) -> Any:
    raise ValueError("no such luck\nsecond line")


@pytest.fixture(scope="module")
def compare_settings(llama_folder: Path, text_file: Path) -> dict[str, Any]:
    return {
        "model.name": str(llama_folder),
        "model.device": "cpu",
        "model.dtype": "float32",
        "data.dataset": str(text_file),
        "data.block_length": CONTEXT,
        "data.calibration_blocks": 2,
        "data.selection_blocks": 2,
        "data.report_blocks": 3,
        "fit.epochs": 1,
        "protocol.kind": "stream",
        "protocol.chunk": 64,
        "protocol.sinks": 2,
        "protocol.window": 8,
    }


@pytest.fixture(scope="module")
def finished(compare_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> PlanEvaluator:
    evaluator = evaluator_of(compare_settings, tmp_path_factory.mktemp("compare"))
    compare_caches(evaluator, PLANS, find_baselines([STOCK, HALVED, "turboquant:safe", "hqq:4"]), windows=[8, 0])
    return evaluator


def row_of(evaluator: PlanEvaluator, spec: str, window: int = 8) -> Any:
    table = read_compare(folder_of(evaluator))
    (row,) = table[(table["spec"] == spec) & table["window"].isin([window, math.nan])].itertuples()
    return row


# -- the table ---------------------------------------------------------------------------------------------------------


def test_a_row_for_every_cache(finished: PlanEvaluator) -> None:
    table = read_compare(folder_of(finished))
    assert list(table.columns) == list(COMPARE_COLUMNS)
    ours = [spec for spec in SPECS for _ in (8, 0)]
    assert list(table["spec"]) == [*ours, STOCK, HALVED, "turboquant:safe", "hqq:4"]
    assert list(table["baseline"] == "") == [True] * 4 + [False] * 4
    assert list(table["window"].iloc[:4]) == [8, 0, 8, 0]
    assert set(table["tokens"]) == {3 * (CONTEXT - 1)}
    assert (set(table["split"]), set(table["blocks"]), set(table["context"])) == ({"report"}, {3}, {CONTEXT})
    assert table["all_in_ratio_4096"].isna().all()
    assert table["base_ppl"].nunique() == 1
    assert (table["low"] <= table["delta_percent"]).all()
    assert (table["delta_percent"] <= table["high"]).all()


def test_costs_are_those_of_all_layers_on_report_text(finished: PlanEvaluator) -> None:
    workspace, plan = finished.workspace, finished.codecs.plan(PLANS["int:4g8"])
    model, blocks, protocol = workspace.loaded.model, workspace.blocks("report"), finished.protocol
    assert len(plan) == 8
    base = measure_nats(model, blocks, protocol, lambda: DynamicCache(config=model.config)).perplexity
    ppl = measure_nats(model, blocks, protocol, lambda: LeanCache(model.config, plan, sinks=2, window=8)).perplexity
    row = row_of(finished, "int:4g8")
    assert row.base_ppl == pytest.approx(base, rel=1e-9)
    assert row.ppl == pytest.approx(ppl, rel=1e-9)
    assert row.delta_percent == pytest.approx(100 * (ppl / base - 1), rel=1e-6)


def test_a_cache_that_changes_nothing_costs_nothing(finished: PlanEvaluator) -> None:
    """Its bytes are those of float32 vectors: twice the 16-bit ones."""
    row = row_of(finished, STOCK)
    assert row.delta_percent == 0
    assert row.code_ratio_live == row.code_ratio_stored == row.cache_ratio == 0.5


def test_divergence_stands_beside_every_cost(finished: PlanEvaluator) -> None:
    """A cache that changes nothing strays nowhere; others do, and the table for people says how far."""
    same, other = row_of(finished, STOCK), row_of(finished, "int:4g8")
    assert (same.kl, same.kl_p999, same.top1, same.rms_dp) == (0, 0, 100, 0)
    assert 0 < other.kl_low < other.kl < other.kl_high
    assert other.kl_median < other.kl_p99 < other.kl_p999
    assert other.top1 < 100
    header, rows = divergence_rows(read_compare(folder_of(finished)))
    assert {"Mean KLD", "Same top p"} < set(header)
    (cells,) = [row for row in rows if row[:2] == ["int:4g8", "8"]]
    assert cells[header.index("Same top p")] == f"{other.top1:.2f} %"


def test_a_plan_of_several_recipes_is_a_row(compare_settings: dict[str, Any], tmp_path: Path) -> None:
    """Under the name that it is given; its cost and its bits are those of its own codecs, each site's."""
    spec = PlanSpec.uniform("pca:8").with_layers([0, 2], k="int:4g8").with_layers([3], v="none")
    evaluator = evaluator_of(compare_settings, tmp_path, **{"data.block_length": 64})
    table = compare_caches(evaluator, {"mixed": spec})
    (row,) = table.itertuples()
    assert (row.spec, row.method) == ("mixed", "plan")
    plan, model = evaluator.codecs.plan(spec), evaluator.workspace.loaded.model
    assert {site: codec.recipe.text for site, codec in plan.items()} == {
        **{(layer, "k"): "int:4g8" if layer in (0, 2) else "pca:8" for layer in range(4)},
        **{(layer, "v"): "pca:8" for layer in range(3)},
    }
    blocks = evaluator.workspace.blocks("report")
    ppl = measure_nats(
        model, blocks, evaluator.protocol, lambda: LeanCache(model.config, plan, sinks=2, window=8)
    ).perplexity
    assert row.ppl == pytest.approx(ppl, rel=1e-9)
    assert row.codec_bytes == sum(codec.nbytes for codec in plan.values())
    bits = sum(codec.bits_per_token for codec in plan.values())
    assert row.code_ratio_live == pytest.approx(7 * 32 * 16 / bits)


def test_a_baseline_in_half_the_bytes(finished: PlanEvaluator) -> None:
    row = row_of(finished, HALVED)
    assert row.code_ratio_live == row.cache_ratio == 1
    assert row.delta_percent != 0


def test_ratios_are_those_of_the_codes(finished: PlanEvaluator) -> None:
    """4 bits a number, and a scale and a zero of 16 bits for 8 numbers."""
    row = row_of(finished, "int:4g8")
    bits = {codec.bits_per_token for codec in finished.codecs.plan(PLANS["int:4g8"]).values()}
    assert row.code_ratio_live == pytest.approx(32 * 16 / bits.pop())
    assert not bits
    transform = row_of(finished, "transform:1")
    assert transform.code_ratio_stored > transform.code_ratio_live
    fitted = finished.codecs.plan(PLANS["transform:1"])
    assert transform.codec_bytes == sum(codec.nbytes for codec in fitted.values())


def test_baselines_with_packages_of_their_own(finished: PlanEvaluator) -> None:
    """As the report's notes say of them: at whole groups HQQ holds codes alone, TurboQuant 256 tokens exact."""
    hqq, turbo = row_of(finished, "hqq:4"), row_of(finished, "turboquant:safe")
    assert hqq.code_ratio_live > 2
    assert hqq.cache_ratio == hqq.code_ratio_live
    assert turbo.code_ratio_live > 2
    exact = 256 * 4 * 2 * 32 * 4  # layers, K and V, width, float32
    codes = (CONTEXT - 128) * 4 * 2 * 32 * 2 / turbo.code_ratio_live
    assert turbo.held_bytes == pytest.approx(exact + codes)
    assert row_of(finished, "hqq:4").delta_percent != 0


def test_a_finished_comparison_is_only_looked_up(
    finished: PlanEvaluator, compare_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(finished)
    before = (folder / "compare.csv").read_bytes()
    for name in (
        "leankv.studies.plan_evaluator.measure_nats",
        "leankv.studies.plan_evaluator.measure_pair",
        "leankv.studies.stored_bytes.measure_bytes",
        "leankv.studies.activation_store.capture",
        "leankv.studies.codec_store.fit_codecs",
        "leankv.studies.codec_store.fit_in_context",
    ):
        monkeypatch.setattr(name, pytest.fail)
    again = evaluator_of(compare_settings, folder)
    compare_caches(again, PLANS, find_baselines([STOCK, HALVED, "turboquant:safe", "hqq:4"]), windows=[8, 0])
    assert (folder / "compare.csv").read_bytes() == before


@pytest.mark.usefixtures("drawn_whole")
def test_a_strict_comparison(compare_settings: dict[str, Any], tmp_path: Path) -> None:
    strict = {"protocol.kind": "strict", "protocol.window": 0}
    evaluator, plans = evaluator_of(compare_settings, tmp_path, **strict), {"all of it": PlanSpec.uniform("identity")}
    table = compare_caches(evaluator, plans)
    assert table["spec"].tolist() == ["all of it"]
    assert table["delta_percent"].tolist() == [0]
    with pytest.raises(UserError, match="--protocol stream"):
        compare_caches(evaluator, plans, find_baselines([STOCK]))
    with pytest.raises(UserError, match="no exact window"):
        compare_caches(evaluator, plans, windows=[0, 8])
    assert "protocol strict, sinks 2, window 0" in compare_title(table)


def test_a_comparison_to_choose_with(compare_settings: dict[str, Any], tmp_path: Path) -> None:
    """On selection text, and said so."""
    evaluator, spec = evaluator_of(compare_settings, tmp_path, **{"data.block_length": 64}), PlanSpec.uniform("int:4")
    table = compare_caches(evaluator, {"int:4": spec}, split="selection")
    model, blocks = evaluator.workspace.loaded.model, evaluator.workspace.blocks("selection")
    plan = evaluator.codecs.plan(spec)
    ppl = measure_nats(
        model, blocks, evaluator.protocol, lambda: LeanCache(model.config, plan, sinks=2, window=8)
    ).perplexity
    assert table["ppl"].tolist() == pytest.approx([ppl], rel=1e-9)
    assert table["tokens"].tolist() == [2 * 63]
    assert "2 blocks of 64 tokens of the selection split" in compare_title(table)


def test_a_window_of_none_is_a_row_of_its_own(finished: PlanEvaluator) -> None:
    """Codecs are the same; more of the cache is codes, and the cost is higher."""
    with_window, without = row_of(finished, "int:4g8"), row_of(finished, "int:4g8", window=0)
    assert without.held_bytes < with_window.held_bytes
    assert without.delta_percent != with_window.delta_percent
    assert without.codec_bytes == with_window.codec_bytes


def test_ratios_stand_at_the_context_of_the_costs(finished: PlanEvaluator) -> None:
    row = row_of(finished, "transform:1")
    base = CONTEXT * 4 * 2 * 32 * 2
    assert row.cache_ratio == base / row.held_bytes
    assert row.all_in_ratio == base / (row.held_bytes + row.codec_bytes_memory + row.peak_step_bytes)
    assert row.stored_bytes < row.held_bytes
    assert row.codec_bytes_memory > row.codec_bytes


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report(finished: PlanEvaluator) -> None:
    folder = folder_of(finished)
    markdown = (folder / "compare.md").read_text(encoding="utf-8")
    table = read_compare(folder_of(finished))
    assert markdown == compare_markdown(table)
    for spec in table["spec"]:
        assert f"| {spec} |" in markdown
    costs = [float(row[2]) for row in cost_rows(table)[1]]
    assert costs == sorted(costs)
    assert (folder / "figures" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_no_comparison_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leankv compare"):
        read_compare(tmp_path)


def test_a_table_of_an_older_version(finished: PlanEvaluator, tmp_path: Path) -> None:
    table = read_compare(folder_of(finished)).drop(columns="all_in_ratio")
    table.to_csv(tmp_path / "compare.csv", index=False)
    with pytest.raises(UserError, match=r"all_in_ratio.*leankv compare"):
        read_compare(tmp_path)


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_a_storage_counts_once() -> None:
    class Slotted:
        __slots__ = ("kept", "never_set")

        def __init__(self) -> None:
            self.kept = torch.zeros(5, dtype=torch.float64)

    whole = torch.zeros(10)
    thing = {"views": [whole[:3], (whole[4:],)], "again": whole, "own": Slotted(), "words": "words"}
    thing["itself"] = thing
    assert held_bytes(thing) == 10 * 4 + 5 * 8
    assert held_bytes([torch.nn.Linear(3, 3)]) == 0


# -- baselines of one's own -------------------------------------------------------------------------------------------


def test_an_edited_baseline_is_measured_again(
    compare_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    costs = []
    for name in ("stock", "halved"):
        baseline = write_factory(tmp_path, "own_cache", f"from {__name__} import {name} as make\n")
        evaluator = evaluator_of(compare_settings, tmp_path / "run", **{"data.report_blocks": 2})
        compare_caches(evaluator, {}, find_baselines([baseline]))
        costs.append(row_of(evaluator, baseline).delta_percent)
    assert costs[0] == 0
    assert costs[1] != 0


def test_a_baseline_that_breaks_is_known_before_anything_is_measured(
    compare_settings: dict[str, Any], tmp_path: Path
) -> None:
    evaluator = evaluator_of(compare_settings, tmp_path)
    with pytest.raises(UserError, match="no such luck") as refusal:
        compare_caches(evaluator, PLANS, find_baselines([STOCK, BROKEN]))
    assert BROKEN in str(refusal.value)
    assert "second line" not in str(refusal.value)
    assert not list((tmp_path / "cells").glob("nats-*"))


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(compare_settings: dict[str, Any], tmp_path: Path) -> None:
    """One line, with settings of its own where no experiment is named."""
    given = ("-o", tmp_path, "-m", compare_settings["model.name"], "--dataset", compare_settings["data.dataset"])
    sets = ("--block-length", 64, "--set", "data.calibration_blocks=6", "--blocks", 2, "--set", "protocol.chunk=16")
    arguments = ("int:2", "--baseline", STOCK, *given, *sets, "--window", 0, "--window", 8, "--device", "cpu")
    shown = invoke("compare", *arguments)
    assert shown.exit_code == 0, shown.output
    assert "compare.csv" in shown.stdout
    assert max(map(len, shown.stdout.splitlines()[:-1])) <= 100
    rows = json.loads(invoke("compare", *arguments, "--json").stdout)
    assert [(row["spec"], row["window"]) for row in rows] == [("int:2", 0), ("int:2", 8), (STOCK, None)]
    assert rows[0]["key_space"] == "pre-rope"
    assert rows[0]["error_metric"] == "gradient"
    assert math.isfinite(rows[0]["ppl"])
    plan = tmp_path / "plan.json"
    plan.write_text('{"k": "int:2", "v": "mean", "layers": {"0": "none"}}', encoding="utf-8")
    (row,) = json.loads(invoke("compare", "--plan", plan, *arguments[3:], "--json").stdout)[:1]
    assert (row["spec"], row["method"]) == (str(plan), "plan")
    strict = ("int:2", "--protocol", "strict", *given, *sets, "--device", "cpu", "-o", tmp_path / "strict", "--json")
    assert json.loads(invoke("compare", *strict).stdout)[0]["window"] == 0


def test_what_the_command_refuses(tmp_path: Path) -> None:
    for arguments, words in (
        (("nonsense:3",), "nonsense:3"),
        (("none",), "identity"),
        (("mean", "--baseline", "nobody"), "nobody"),
        (("mean", "--blocks", "0"), "report_blocks"),
        (("mean", "--blocks", "0", "--split", "selection"), "selection_blocks"),
        (("mean", "--split", "calibration"), "selection"),
        (("mean", "--protocol", "strict", "--window", "8"), "window"),
    ):
        shown = invoke("compare", *arguments, "-o", tmp_path)
        assert shown.exit_code == 2
        assert words in shown.stderr


def test_specs_of_the_command_parse() -> None:
    assert [recipe.text for recipe in parse_recipes(COMPARE_SPECS)] == list(COMPARE_SPECS)


def test_rows_without_interval_or_ratios() -> None:
    unknown = dict.fromkeys(("low", "high", "code_ratio_live", "cache_ratio", "all_in_ratio"))
    row = dict.fromkeys(COMPARE_COLUMNS, 1.0) | {"spec": "mean", "baseline": "", **unknown}
    (cells,) = cost_rows(pd.DataFrame([row]))[1]
    assert cells[:5] == ["mean", "1", "+1.00", "not known", "-"]
    assert "cache ratio -, all-in ratio -" in format_row(row)

"""`leankv eval-ppl`: a model alone, and a bundle beside it, on any split and under any protocol."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from leankv.cache.bundle import load_bundle
from leankv.config.experiment import DataConfig, Experiment, ModelConfig
from leankv.models.loading import load_model
from leankv.report.divergence import DIVERGENCE_COLUMNS
from leankv.studies import evaluate
from tests.run_folders import BLOCKS, refuse, succeed, succeed_json

pytestmark = pytest.mark.whole_runs

EVALUATION_KEYS = {"base_ppl", "ppl", "delta_ppl", "delta_percent", "interval", "tokens", "protocol", "split"}


def test_eval_ppl_of_a_model_alone(llama_folder: Path, text_file: Path) -> None:
    where = ("--model", llama_folder, "--dataset", text_file, "--block-length", 48, "--blocks", 2, "--device", "cpu")
    told = succeed_json("eval-ppl", *where)
    assert set(told) >= EVALUATION_KEYS
    assert told["tokens"] == 2 * 47
    assert told["split"] == "report"
    assert told["ppl"] is told["delta_ppl"] is told["interval"] is told["kl"] is told["free_run"] is None
    assert f"{told['base_ppl']:.3f}" in succeed("eval-ppl", *where).stdout


@pytest.mark.parametrize("protocol", ["strict", "stream", "decode"])
def test_eval_ppl_of_a_bundle(bundle: Path, protocol: str) -> None:
    window = () if protocol == "strict" else ("--window", 4)
    arguments = ("eval-ppl", "--bundle", bundle, "--protocol", protocol, "--sinks", 2, *window)
    told = succeed_json(*arguments)
    assert set(told) >= EVALUATION_KEYS
    assert told["protocol"] == protocol
    assert told["tokens"] == BLOCKS * 47
    assert told["delta_ppl"] == pytest.approx(told["ppl"] - told["base_ppl"])
    assert told["delta_percent"] == pytest.approx(100 * told["delta_ppl"] / told["base_ppl"])
    low, high = told["interval"]
    assert low < told["delta_ppl"] < high
    assert told["kl_low"] < told["kl"] < told["kl_high"]
    assert 0 <= told["kl_median"] < told["kl_p99"] <= told["kl_p999"]
    assert told["top1_low"] < told["top1"] <= told["top1_high"] <= 100
    assert 0 < told["rms_dp"] < told["rms_dp_high"]
    output = succeed(*arguments).stdout
    assert f"{told['ppl']:.3f}" in output
    assert f"{told['kl']:.4g}" in output
    assert protocol in output
    assert all(name in output for name in ("Mean KLD", "Median KLD", "99.0% KLD", "99.9% KLD", "RMS Δp", "Same top p"))


def test_eval_ppl_of_a_bundle_repeats_its_summary(finished: Path, bundle: Path) -> None:
    """By default: the same text, the same protocol, the same figures."""
    summary, told = json.loads((finished / "summary.json").read_text()), succeed_json("eval-ppl", "--bundle", bundle)
    assert told["base_ppl"] == summary["base_ppl"]
    assert told["ppl"] == summary["ppl"]
    assert told["interval"] == summary["delta_ppl_interval"]
    assert {name: told[name] for name in DIVERGENCE_COLUMNS} == {name: summary[name] for name in DIVERGENCE_COLUMNS}


@pytest.mark.parametrize("split", ["all", "selection", "calibration", "certification"])
def test_eval_ppl_on_a_split(bundle: Path, split: str) -> None:
    told = succeed_json("eval-ppl", "--bundle", bundle, "--split", split, "--blocks", 2)
    assert told["split"] == split
    assert told["tokens"] == 2 * 47


def test_other_blocks_do_not_move_the_borders_of_a_bundle_s_text() -> None:
    """WikiText-2 is cut by tokens: shorter blocks would put certification text where codecs were fitted."""
    made = {"dataset": "wikitext-2", "block_length": 512, "calibration_blocks": 64, "selection_blocks": 2}
    cuts = []
    for asked in ({}, {"block_length": 64}, {"calibration_blocks": 2}):
        data = dataclasses.replace(DataConfig(**made), **asked)
        cuts.append(evaluate._cut_for(dataclasses.replace(Experiment(), data=data), {"data": made}))
    assert cuts[0] == cuts[1] == cuts[2]
    assert cuts[0].data == DataConfig(**made)
    other = dataclasses.replace(Experiment(), data=DataConfig(dataset="wikipedia-sample"))
    assert evaluate._cut_for(other, {"data": made}) is other


def test_eval_ppl_on_all_begins_where_calibration_begins(bundle: Path) -> None:
    everything, calibration = (
        succeed_json("eval-ppl", "--bundle", bundle, "--split", split, "--blocks", 2)
        for split in ("all", "calibration")
    )
    assert everything["base_ppl"] == calibration["base_ppl"]


def test_one_block_has_no_interval(bundle: Path) -> None:
    assert succeed_json("eval-ppl", "--bundle", bundle, "--blocks", 1)["interval"] is None
    assert "not known" in succeed("eval-ppl", "--bundle", bundle, "--blocks", 1).stdout


def test_eval_ppl_lets_both_run_free(bundle: Path) -> None:
    arguments = ("eval-ppl", "--bundle", bundle, "--free-run", 9)
    told = succeed_json(*arguments)["free_run"]
    assert told["prompts"] == BLOCKS
    assert told["prompt_tokens"] == 24
    assert told["new_tokens"] == 9
    assert 0 <= told["equal_percent"] <= 100
    assert 0 <= told["first_difference"] <= 9
    output = succeed(*arguments).stdout
    assert f"{told['equal_percent']:.1f} %" in output
    assert f"{told['without_difference']} of {BLOCKS}" in output


def test_free_running_needs_a_bundle_and_room(bundle: Path, llama_folder: Path, text_file: Path) -> None:
    alone = ("eval-ppl", "--model", llama_folder, "--dataset", text_file, "--block-length", 48)
    assert "give --bundle" in refuse(*alone, "--free-run", 9)
    assert "--free-run must be at least 1, not 0" in refuse("eval-ppl", "--bundle", bundle, "--free-run", 0)
    assert "beyond the model's 512 positions" in refuse("eval-ppl", "--bundle", bundle, "--free-run", 489)


def test_a_window_in_a_strict_pass(bundle: Path) -> None:
    assert "window" in refuse("eval-ppl", "--bundle", bundle, "--protocol", "strict", "--window", 4)


@pytest.mark.parametrize("arguments", [("--protocol", "x"), ("--split", "x"), ("--blocks", 0), ("--sinks", -1)])
def test_bad_ways_to_measure(bundle: Path, arguments: tuple[str, object]) -> None:
    assert str(arguments[0]).strip("-") in refuse("eval-ppl", "--bundle", bundle, *arguments)


def test_no_code_runs_because_a_bundle_asks_for_it(bundle: Path, llama_folder: Path, tmp_path: Path) -> None:
    """A bundle names its model, whose folder may hold code: to run that takes the flag."""
    model = tmp_path / "model"
    shutil.copytree(llama_folder, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "another", "auto_map": {"AutoConfig": "code.Configuration"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    own = load_bundle(bundle, load_model(ModelConfig(str(llama_folder), device="cpu", dtype="float32")).model)
    asks = {**own.experiment, "model": {**own.experiment["model"], "name": str(model), "trust_remote_code": True}}
    dataclasses.replace(own, experiment=asks).save(tmp_path / "bundle")
    for command in (
        ("generate", "--bundle", tmp_path / "bundle", "hello"),
        ("eval-ppl", "--bundle", tmp_path / "bundle"),
    ):
        assert "--trust-remote-code" in refuse(*command)
    assert not (tmp_path / "ran").exists()

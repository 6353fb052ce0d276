"""The command line: what each command prints and writes, and how it refuses what it cannot do."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from leankv import ModelConfig, __version__, load_model
from leankv.cli import app
from leankv.divergence_table import DIVERGENCE_COLUMNS
from leankv.rope import KeyRotation
from tests import tiny

COMMANDS = ["run", "capture", "train-layer", "sweep", "map", "select", "eval-ppl", "generate", "info"]
LEANKV = str(Path(sys.executable).with_name("leankv"))
BLOCKS = 3  # of every split


def invoke(*arguments: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    return result


def succeed_json(*arguments: object) -> Any:
    """What a command prints with --json; anything beside JSON on standard output fails."""
    return json.loads(succeed(*arguments, "--json").stdout)


def refuse(*arguments: object) -> str:
    """The sentence with which a command refuses."""
    return refusal(invoke(*arguments))


def refusal(result: Result) -> str:
    """The sentence on standard error; exit code 2, and nothing on standard output."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert result.stderr.splitlines()[-1] == errors[0], "the sentence comes last, on one line"
    return errors[0]


@pytest.fixture(scope="module")
def experiment(llama_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment file that takes a second or two."""
    path = tmp_path_factory.mktemp("experiment") / "tiny.yaml"
    values = {
        "model": {"name": str(llama_folder), "device": "cpu"},
        "data": {
            "dataset": str(text_file),
            "block_length": 48,
            "calibration_blocks": 8,
            "selection_blocks": BLOCKS,
            "report_blocks": BLOCKS,
        },
        "codec": {"k": "ae:4x16", "v": "ae:4x16"},
        "fit": {"epochs": 1},
        "selection": {"budget": "80%"},
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished `leankv run`."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    succeed("run", experiment, "-o", folder, "--prompt", "once there was")
    return folder


@pytest.fixture
def bundle(finished: Path) -> Path:
    return finished / "bundle"


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    text = succeed(command, "--help").stdout
    assert "Usage:" in text
    assert "--model" in text or command == "info"
    assert "--json" in text


def test_help_lists_every_command() -> None:
    text = succeed("--help").stdout
    assert all(command in text for command in COMMANDS)


def test_help_needs_no_torch() -> None:
    """So that it is instant."""
    code = f"""
import sys
from typer.testing import CliRunner
from leankv.cli import app
for command in [[], *([name] for name in {COMMANDS!r})]:
    assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0
print([name for name in ("torch", "transformers", "datasets", "pandas", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_told() -> None:
    assert succeed("--version").stdout.split() == ["leankv", __version__]


# -- the whole run -----------------------------------------------------------------------------------------------------


def test_run_writes_everything(finished: Path) -> None:
    for name in (
        "experiment.yaml",
        "manifest.json",
        "sweep.csv",
        "sweep.md",
        "selection.json",
        "selection.md",
        "summary.json",
        "figures/cost_by_layer.png",
        "bundle/leankv_config.json",
        "bundle/codecs.safetensors",
        "bundle/README.md",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert (finished / "figures/cost_by_layer.png").read_bytes().startswith(b"\x89PNG")


def test_run_prints_tables_and_a_completion(experiment: Path, finished: Path) -> None:
    """A second run takes everything from the files of the first."""
    before = {path: path.stat().st_mtime_ns for path in (finished / "cells").iterdir()}
    output = succeed("run", experiment, "-o", finished, "--prompt", "once there was").stdout
    summary = json.loads((finished / "summary.json").read_text())
    assert f"{summary['ppl']:.3f}" in output
    assert f"{summary['base_ppl']:.3f}" in output
    assert "once there was" in output
    assert "tokens/s" in output
    assert {path: path.stat().st_mtime_ns for path in (finished / "cells").iterdir()} == before


def test_run_prints_its_summary_as_json(experiment: Path, finished: Path) -> None:
    assert succeed_json("run", experiment, "-o", finished) == json.loads((finished / "summary.json").read_text())


# -- sweep, select, train-layer, capture -------------------------------------------------------------------------------


def test_sweep_then_select(experiment: Path, tmp_path: Path) -> None:
    """The two steps of `run` by hand: the second takes the experiment from the first one's folder."""
    rows = succeed_json("sweep", "--config", experiment, "-o", tmp_path, "--codec", "pca:4", "--layers", "0,2-3")
    assert [row["layer"] for row in rows] == [0, 2, 3]
    assert all(row["codec_k"] == row["codec_v"] == "pca:4" for row in rows)
    table = pd.read_csv(tmp_path / "sweep.csv")
    assert list(table["delta_ppl"]) == pytest.approx([row["delta_ppl"] for row in rows])
    assert (tmp_path / "sweep.md").exists()
    summary = succeed_json("select", "-o", tmp_path, "--budget", "1000%")
    assert summary["selected_layers"] == [0, 2, 3]
    assert summary["budget"] == "1000%"
    assert succeed_json("select", "-o", tmp_path, "--budget", "1000%", "--layers", "2-3")["selected_layers"] == [2, 3]


def test_sweep_prints_a_table(experiment: Path, tmp_path: Path) -> None:
    output = succeed("sweep", "--config", experiment, "-o", tmp_path, "--part", "v", "--layers", "1,3").stdout
    assert "cheapest first" in output
    assert "k=none v=ae:4x16" in output
    assert str(tmp_path) in output.replace("\n", "")


def test_set_reaches_every_setting(experiment: Path, tmp_path: Path) -> None:
    changes = ("--set", "fit.learning_rate=1e-3", "--set", "data.selection_blocks=2", "--seed", "5")
    succeed("sweep", "--config", experiment, "-o", tmp_path, "--layers", "0", *changes)
    resolved = yaml.safe_load((tmp_path / "experiment.yaml").read_text())
    assert resolved["fit"]["learning_rate"] == 1e-3
    assert resolved["data"]["selection_blocks"] == 2
    assert resolved["seed"] == 5


def test_train_layer_tells_error_and_cost(experiment: Path, tmp_path: Path) -> None:
    row = succeed_json("train-layer", 2, "--config", experiment, "-o", tmp_path)
    assert row["layer"] == 2
    assert row["delta_ppl"] == pytest.approx(row["ppl"] - row["base_ppl"])
    assert 0 < row["fvu_k"] < 1.5
    codecs = sorted(path.name[:11] for path in (tmp_path / "codecs").iterdir())
    assert codecs == ["layer-002-k", "layer-002-v"]
    assert "FVU K" in succeed("train-layer", 2, "--config", experiment, "-o", tmp_path).stdout


def test_capture_writes_the_layers_asked_for(experiment: Path, tmp_path: Path) -> None:
    told = succeed_json("capture", "--config", experiment, "-o", tmp_path, "--layers", "1,3", "--blocks", 4)
    assert told["layers"] == [1, 3]
    assert told["blocks"] == 4
    files = {path.name for path in Path(told["folder"]).iterdir()}
    assert files == {"layer-001.safetensors", "layer-003.safetensors", "manifest.json"}
    assert "2 layers" in succeed("capture", "--config", experiment, "-o", tmp_path, "--layers", "1,3").stdout


@pytest.mark.parametrize("key_space", ["post-rope", "pre-rope"])
def test_a_sweep_uses_what_was_captured(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key_space: str
) -> None:
    """In its key space; and leaves it for the next command."""
    common = ("--config", experiment, "-o", tmp_path, "--key-space", key_space)
    told = succeed_json("capture", *common)
    first = {path: path.stat().st_mtime_ns for path in Path(told["folder"]).iterdir()}
    assert told["depends_on"]["key_space"] == key_space
    monkeypatch.setattr("leankv.workplace.capture", pytest.fail)
    for shard in ("2/2", "1/2"):
        succeed("sweep", *common, "--shard", shard)
    succeed("map", "int:4", *common, "--layers", "1-2")
    assert succeed_json("capture", *common, "--layers", "2") == told
    assert {path: path.stat().st_mtime_ns for path in Path(told["folder"]).iterdir()} == first
    assert not list(tmp_path.glob("activations-*"))


@torch.no_grad()
def test_captured_keys_are_in_the_key_space_asked_for(experiment: Path, llama_folder: Path, tmp_path: Path) -> None:
    common = ("--config", experiment, "-o", tmp_path, "--layers", "1")
    turned, plain = (
        load_file(Path(succeed_json("capture", *common, "--key-space", space)["folder"]) / "layer-001.safetensors")
        for space in ("pre-rope", "post-rope")
    )
    rotation = KeyRotation(load_model(ModelConfig(str(llama_folder), device="cpu")).model)
    heads = plain["k"].reshape(-1, 48, 2, 16).transpose(1, 2)  # blocks, heads, tokens
    expected = rotation.remove(1, heads, torch.arange(48)[None]).transpose(1, 2).reshape(-1, 32)
    assert not torch.allclose(turned["k"].float(), plain["k"].float(), atol=1e-2)
    torch.testing.assert_close(turned["k"].float(), expected, atol=2e-2, rtol=2e-2)
    assert torch.equal(turned["v"], plain["v"])


def test_layers_that_were_not_captured_are_added(experiment: Path, tmp_path: Path) -> None:
    common = ("--config", experiment, "-o", tmp_path)
    told = succeed_json("capture", *common, "--layers", "0,2")
    succeed("sweep", *common, "--layers", "1-2")
    assert succeed_json("capture", *common, "--layers", "0,2") == told, "the sweep has left it alone"
    more = succeed_json("capture", *common, "--layers", "1")
    assert more["layers"] == [0, 1, 2]
    assert more["folder"] == told["folder"]


# -- eval-ppl ----------------------------------------------------------------------------------------------------------


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


# -- generate and info -------------------------------------------------------------------------------------------------


def test_generate_streams_text_and_tells_the_bytes(bundle: Path) -> None:
    told = succeed_json("generate", "once there was", "--bundle", bundle, "--max-new-tokens", 12)
    assert set(told) == {"text", "tokens", "cache_bytes", "uncompressed_bytes", "tokens_per_second"}
    assert told["tokens"] == 14 + 12 - 1  # the last token is never fed
    assert told["cache_bytes"] < told["uncompressed_bytes"]
    output = succeed("generate", "once there was", "--bundle", bundle, "--max-new-tokens", 12).stdout
    assert output.startswith(told["text"].rstrip("\ufffd")[:3])
    assert f"{told['cache_bytes']:,}" in output
    assert "tokens/s" in output


def test_sampling_follows_the_seed(bundle: Path) -> None:
    def sample(seed: int) -> str:
        options = ("--max-new-tokens", 12, "--temperature", 1.0, "--seed", seed)
        return str(succeed_json("generate", "once there was", "--bundle", bundle, *options)["text"])

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_info_tells_the_geometry(llama_folder: Path) -> None:
    told = succeed_json("info", llama_folder)
    assert told["model_type"] == "llama"
    assert told["n_layers"] == 4
    assert told["kv_heads"] == 2
    assert told["head_dim"] == 16
    assert told["width"] == 32
    assert told["bytes_per_token"] == 512
    assert told["key_convention"] == {"half": 4}
    output = succeed("info", llama_folder).stdout
    assert "2 x 16" in output
    assert "rotary" in output


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_an_unknown_model_exits_with_2_for_real(text_file: Path, tmp_path: Path) -> None:
    """The installed command, as a shell sees it."""
    command = [LEANKV, "sweep", "-m", str(tmp_path / "none"), "--dataset", str(text_file), "-o", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"error: the model folder {tmp_path / 'none'} does not exist; check --model"


def test_a_folder_without_a_model(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sentence = refuse("sweep", "--config", experiment, "-m", tmp_path / "empty", "-o", tmp_path / "run")
    assert str(tmp_path / "empty") in sentence
    assert "config.json" in sentence
    assert "config.json" in refuse("info", tmp_path / "empty")


BAD_TEXTS = {
    "empty": b"",
    "blank": b" \n\n \n",
    "not UTF-8": b"caf\xe9 au lait\n" * 50,
    "too short for splits": b"one line",
    "too short for blocks": b"a few words\n" * 40,
}


@pytest.mark.parametrize("kind", list(BAD_TEXTS))
def test_bad_data(experiment: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(BAD_TEXTS[kind])
    assert str(path) in refuse("sweep", "--config", experiment, "--dataset", path, "-o", tmp_path / "run")
    assert str(path) in refuse("eval-ppl", "--config", experiment, "--dataset", path, "--split", "calibration")


def test_missing_data(experiment: Path, tmp_path: Path) -> None:
    for name in ("none.txt", "none.parquet", "none.csv"):
        path = tmp_path / name
        assert str(path) in refuse("sweep", "--config", experiment, "--dataset", path, "-o", tmp_path / "run")


@pytest.mark.parametrize(
    ("layers", "words"),
    [("3-1", "1-3"), ("x", "0,4,40-63"), ("99", "last layer, which is 3"), ("2-", "0,4,40-63"), ("", "0,4,40-63")],
)
@pytest.mark.parametrize("command", ["sweep", "capture"])
def test_bad_layers(experiment: Path, tmp_path: Path, command: str, layers: str, words: str) -> None:
    sentence = refuse(command, "--config", experiment, "-o", tmp_path / "run", "--layers", layers)
    assert "--layers" in sentence
    assert repr(layers) in sentence
    assert words in sentence


@pytest.mark.parametrize("layer", [-1, 4])
def test_train_layer_of_a_layer_that_is_not_there(experiment: Path, tmp_path: Path, layer: int) -> None:
    assert str(layer) in refuse("train-layer", "--config", experiment, "-o", tmp_path, "--", layer)


@pytest.mark.parametrize("codec", ["nonsense:3", ""])
def test_an_unknown_codec_is_answered_with_all_grammars(experiment: Path, tmp_path: Path, codec: str) -> None:
    sentence = refuse("sweep", "--config", experiment, "-o", tmp_path, "--codec", codec)
    assert repr(codec) in sentence
    for grammar in ("ae:D", "pca:D", "mean", "identity", "resid(A,B)"):
        assert grammar in sentence


@pytest.mark.parametrize("codec", ["ae", "ae:", "ae:0", "ae:4x", "pca:x", "mean:2", "resid(pca:2)", "share:0"])
def test_a_codec_that_does_not_parse_is_answered_with_its_grammar(experiment: Path, tmp_path: Path, codec: str) -> None:
    sentence = refuse("sweep", "--config", experiment, "-o", tmp_path, "--codec", codec)
    assert repr(codec) in sentence
    family = codec.partition(":")[0].partition("(")[0]
    assert f"write {family}" in sentence


@pytest.mark.parametrize("codec", ["ae:33", "pca:1000"])
def test_more_dimensions_than_the_width(experiment: Path, tmp_path: Path, codec: str) -> None:
    sentence = refuse("sweep", "--config", experiment, "-o", tmp_path, "--codec", codec)
    assert repr(codec) in sentence
    assert "width 32" in sentence


@pytest.mark.parametrize("budget", ["abc", "-1", "nan", "inf", "0", "%", "", "2.5%%"])
def test_a_bad_budget(experiment: Path, finished: Path, tmp_path: Path, budget: str) -> None:
    for command in (("run", experiment, "-o", tmp_path), ("select", "-o", finished)):
        sentence = refuse(*command, "--budget", budget)
        assert repr(budget) in sentence
        assert "7%" in sentence


def test_select_without_a_sweep(tmp_path: Path) -> None:
    sentence = refuse("select", "-o", tmp_path / "nothing")
    assert str(tmp_path / "nothing") in sentence
    assert "leankv sweep" in sentence


def test_select_after_a_sweep_of_something_else(finished: Path) -> None:
    sentence = refuse("select", "-o", finished, "--set", "codec.k=pca:4")
    assert "pca:4" in sentence
    assert "ae:4x16" in sentence


@pytest.fixture
def swept(experiment: Path, text_file: Path, tmp_path: Path) -> Path:
    """The folder of a sweep whose text may change."""
    text = tmp_path / "text.txt"
    text.write_bytes(text_file.read_bytes())
    common = ("--config", experiment, "--set", f"data.dataset={text}", "--codec", "mean")
    succeed("sweep", *common, "-o", tmp_path / "swept", "--layers", "0-1")
    return tmp_path / "swept"


@pytest.mark.parametrize(
    ("changed", "words"),
    [(slice(0, 300), "fitted to other text"), (slice(1000, None), "made with other selection text")],
    ids=["calibration", "all else"],
)
def test_select_after_a_sweep_of_other_text(swept: Path, changed: slice, words: str) -> None:
    """Of the same length, so that the splits are cut where they were."""
    text = swept.parent / "text.txt"
    letters = list(text.read_text(encoding="utf-8"))
    letters[changed] = ["z" if letter == "a" else letter for letter in letters[changed]]
    text.write_text("".join(letters), encoding="utf-8")
    sentence = refuse("select", "-o", swept)
    assert words in sentence
    assert "run leankv sweep again" in sentence


def test_select_after_a_sweep_on_another_device(swept: Path) -> None:
    """Its base cell says so."""
    (path,) = [path for path in (swept / "cells").glob("nats-selection-*") if '"codecs": {}' in path.read_text()]
    cell = json.loads(path.read_text())
    cell["depends_on"]["model"]["device"] = "cuda"
    path.write_text(json.dumps(cell))
    assert "was made with device cuda, not cpu" in refuse("select", "-o", swept)


def test_select_after_a_sweep_that_was_begun_again(swept: Path) -> None:
    """The table is then of the sweep before."""
    table = pd.read_csv(swept / "sweep.csv")
    table["base_ppl"] += 1e-6
    table.to_csv(swept / "sweep.csv", index=False)
    assert "begun again and not finished" in refuse("select", "-o", swept)


@pytest.mark.parametrize("command", [("eval-ppl",), ("generate", "once there was")], ids=["eval-ppl", "generate"])
def test_a_missing_bundle(finished: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    assert str(tmp_path / "none") in refuse(*command, "--bundle", tmp_path / "none")
    assert "leankv_config.json" in refuse(*command, "--bundle", finished / "cells")


def test_a_bundle_for_another_model(bundle: Path, tmp_path: Path) -> None:
    tiny.save(tmp_path, tiny.build("llama", seed=1))
    for command in (("eval-ppl",), ("generate", "once there was")):
        assert "weights" in refuse(*command, "--bundle", bundle, "-m", tmp_path)


def test_an_empty_prompt(bundle: Path) -> None:
    assert "prompt" in refuse("generate", "", "--bundle", bundle)


def test_chat_without_a_template(bundle: Path) -> None:
    assert "chat template" in refuse("generate", "hello", "--bundle", bundle, "--chat")


def test_a_window_in_a_strict_pass(bundle: Path) -> None:
    assert "window" in refuse("eval-ppl", "--bundle", bundle, "--protocol", "strict", "--window", 4)


@pytest.mark.parametrize("arguments", [("--protocol", "x"), ("--split", "x"), ("--blocks", 0), ("--sinks", -1)])
def test_bad_ways_to_measure(bundle: Path, arguments: tuple[str, object]) -> None:
    assert str(arguments[0]).strip("-") in refuse("eval-ppl", "--bundle", bundle, *arguments)


def test_an_output_folder_that_is_a_file(experiment: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine", encoding="utf-8")
    for command in (("sweep", "--config", experiment), ("run", experiment), ("capture", "--config", experiment)):
        assert str(path) in refuse(*command, "-o", path)
        assert str(path) in refuse(*command, "-o", path / "below")
    assert path.read_text(encoding="utf-8") == "mine"


BAD_YAMLS = {
    "no such key": ("seed: 0\nmodel:\n  nam: x\n", "line 3", "model.nam"),
    "no such group": ("seed: 0\nmodels:\n  name: x\n", "line 2", "models"),
    "wrong type": ("data:\n  dataset: x.txt\n  block_length: many\n", "line 3", "data.block_length"),
    "a fraction": ("fit:\n  epochs: 1.5\n", "line 2", "fit.epochs"),
    "a yes": ("fit:\n  epochs: true\n", "line 2", "fit.epochs"),
    "a group as a value": ("seed: 1\nmodel: x\n", "line 2", "model"),
    "a list": ("- seed\n", "line 1", "mapping"),
    "twice": ("seed: 1\nseed: 2\n", "line 2", "seed"),
    "broken": ("seed: 1\nmodel: [1, 2\n", "line 3", "not valid YAML"),
    "tab": ("model:\n\tname: x\n", "line 2", "not valid YAML"),
}


@pytest.mark.parametrize("kind", list(BAD_YAMLS))
def test_a_malformed_experiment_names_line_and_key(tmp_path: Path, kind: str) -> None:
    text, line, key = BAD_YAMLS[kind]
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    sentence = refuse("run", path)
    assert str(path) in sentence
    assert line in sentence
    assert key in sentence


def test_a_missing_experiment(tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in refuse("run", tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["seed", "nothing.such=1", "seed=x", "fit.epochs=[1", "fit.epochs=-1"])
def test_a_bad_set(experiment: Path, tmp_path: Path, text: str) -> None:
    assert text.partition("=")[0] in refuse("sweep", "--config", experiment, "-o", tmp_path, "--set", text)


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """Mounts a file system of so many bytes, and resizes it when called again; skips where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def resize(size: str) -> Path:
        nonlocal mounted
        options = f"remount,size={size}" if mounted else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("this user may not mount a file system")
        mounted = True
        return folder

    yield resize
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_loses_nothing_and_the_run_goes_on(experiment: Path, finished: Path, small_disk: Any) -> None:
    """Full at once, during the capture, and among the codecs; each time there is a little more room."""
    full_at: set[str] = set()
    kept: dict[Path, int] = {}
    for kibibytes in range(4, 1000, 8):
        folder = small_disk(f"{kibibytes}k")
        result = invoke("run", experiment, "-o", folder, "--json")
        assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())
        if result.exit_code == 0:
            break
        sentence = refusal(result)
        assert "No space left on device" in sentence
        full_at |= {name for name in ("activations", "codecs") if f"{folder}/{name}" in sentence}
        kept = {path: path.stat().st_mtime_ns for kind in ("cells", "codecs") for path in (folder / kind).glob("[!.]*")}
    assert full_at == {"activations", "codecs"}
    assert kept
    assert json.loads(result.stdout)["ppl"] == json.loads((finished / "summary.json").read_text())["ppl"]


def test_a_disk_that_fills_on_flushing(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems tell only when they are asked to write for real; nothing but empty lock files is left."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    sentence = refuse("sweep", "--config", experiment, "-o", tmp_path / "run")
    assert "No space left on device" in sentence
    assert str(tmp_path / "run") in sentence
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix != ".lock"] == []

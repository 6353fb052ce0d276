"""The command line: its help, what each command prints, and the files it writes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command

from leankv import __version__
from leankv.cli import app
from tests.run_folders import refuse, succeed, succeed_json

pytestmark = pytest.mark.whole_runs

COMMANDS = ["run", "capture", "train-layer", "sweep", "map", "select", "eval-ppl", "generate", "info"]


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


def test_help_and_misspelt_settings_need_no_torch(tmp_path: Path) -> None:
    """So that they are instant."""
    (tmp_path / "wrong.yaml").write_text("fit: {epoch: 3}\n")
    code = f"""
import sys
from typer.testing import CliRunner
from leankv.cli import app
for command in [[], *([name] for name in {COMMANDS!r})]:
    assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0
wrong = {str(tmp_path / "wrong.yaml")!r}
for command in (["sweep", "--set", "fit.epoch=3"], ["eval-ppl", "--config", wrong], ["run", wrong]):
    assert CliRunner().invoke(app, command).exit_code == 2
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
    output = succeed("run", experiment, "-o", finished, "--prompt", "once there was [/b] [INST]").stdout
    summary = json.loads((finished / "summary.json").read_text())
    assert f"{summary['ppl']:.3f}" in output
    assert f"{summary['base_ppl']:.3f}" in output
    assert "once there was [/b] [INST]" in output, "a prompt is text, not markup"
    assert "tokens/s" in output
    assert {path: path.stat().st_mtime_ns for path in (finished / "cells").iterdir()} == before


def test_run_prints_its_summary_as_json(experiment: Path, finished: Path) -> None:
    assert succeed_json("run", experiment, "-o", finished) == json.loads((finished / "summary.json").read_text())
    assert (finished / "completion.json").is_file(), "the bundle is the same, and so is what it says"


def test_what_an_earlier_choice_said_does_not_stay_beside_another(experiment: Path, tmp_path: Path) -> None:
    succeed("run", experiment, "-o", tmp_path)
    assert (tmp_path / "completion.json").is_file()
    succeed_json("select", "-o", tmp_path, "--budget", "0.0001%", "--strategy", "greedy")
    assert not (tmp_path / "completion.json").exists()


# -- sweep, select, train-layer ----------------------------------------------------------------------------------------


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
    # Or from a file that names the folder, with the layers that it was last begun with.
    (tmp_path / "again.yaml").write_text((tmp_path / "experiment.yaml").read_text())
    summary = succeed_json("select", "--config", tmp_path / "again.yaml", "--budget", "1000%")
    assert summary["selected_layers"] == [2, 3]


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


def test_train_layer_leaves_a_run_s_layers_alone(experiment: Path, finished: Path, tmp_path: Path) -> None:
    """What is chosen later is chosen among all that were swept."""
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "experiment.yaml").read_text()
    for command in (("train-layer", 1), ("map", "int:4", "--layers", "1")):
        succeed_json(*command, "--config", experiment, "-o", run)
        assert (run / "experiment.yaml").read_text() == before
    assert "2024 holds no finished sweep" in refuse("select", "--strategy", "greedy", "--set", "output_dir=2024")


def test_train_layer_tells_error_and_cost(experiment: Path, tmp_path: Path) -> None:
    row = succeed_json("train-layer", 2, "--config", experiment, "-o", tmp_path)
    assert row["layer"] == 2
    assert row["delta_ppl"] == pytest.approx(row["ppl"] - row["base_ppl"])
    assert 0 < row["fvu_k"] < 1.5
    codecs = sorted(path.name[:11] for path in (tmp_path / "codecs").iterdir())
    assert codecs == ["layer-002-k", "layer-002-v"]
    assert "FVU K" in succeed("train-layer", 2, "--config", experiment, "-o", tmp_path).stdout


# -- generate and info -------------------------------------------------------------------------------------------------


def test_generate_streams_text_and_tells_the_bytes(bundle: Path) -> None:
    told = succeed_json("generate", "once there was", "--bundle", bundle, "--max-new-tokens", 12)
    speeds = {"seconds_to_first_token", "tokens_per_second"}
    assert set(told) == {"text", "tokens", "tokens_at_start", "cache_bytes", "uncompressed_bytes", *speeds}
    assert 0 < told["seconds_to_first_token"] < 12 / told["tokens_per_second"]
    assert told["tokens"] == 14 + 12 - 1  # the last token is never fed
    assert told["cache_bytes"] < told["uncompressed_bytes"]
    output = succeed("generate", "once there was", "--bundle", bundle, "--max-new-tokens", 12).stdout
    assert output.startswith(told["text"].rstrip("\ufffd")[:3])
    assert f"{told['cache_bytes']:,}" in output
    assert "tokens/s" in output


def test_more_tokens_than_the_model_has_positions_are_refused(bundle: Path) -> None:
    sentence = refuse("generate", "once there was", "--bundle", bundle, "--max-new-tokens", 600)
    assert "and 600 new ones are more than the model's 512 positions" in sentence


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


def test_every_command_shows_an_example() -> None:
    commands = get_command(app)
    assert isinstance(commands, TyperGroup)
    waiting = dict(commands.commands)
    seen = []
    while waiting:
        name, command = waiting.popitem()
        if isinstance(command, TyperGroup):
            waiting.update({f"{name} {inner}": own for inner, own in command.commands.items()})
            continue
        seen.append(name)
        assert f"Example: leankv {name}" in (command.help or ""), name
    assert {"select", "report", "export", "doctor", "prefix add"} <= set(seen)

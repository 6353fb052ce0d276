"""`leankv capture`: what it writes, and that sweeps and maps use it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from leankv import ModelConfig, load_model
from leankv.models.rope import KeyRotation
from tests.run_folders import succeed, succeed_json

pytestmark = pytest.mark.whole_runs


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
    monkeypatch.setattr("leankv.studies.activation_store.capture", pytest.fail)
    for shard in ("2/2", "1/2"):
        succeed("sweep", *common, "--shard", shard)
    succeed("map", "int:4", *common, "--layers", "1-2")
    assert succeed_json("capture", *common, "--layers", "2") == told
    assert {path: path.stat().st_mtime_ns for path in Path(told["folder"]).iterdir()} == first
    assert not list(tmp_path.glob("activations-*"))


def test_a_capture_claims_no_folder(experiment: Path, tmp_path: Path) -> None:
    """A sweep of other codecs may follow in it."""
    common = ("--config", experiment, "-o", tmp_path)
    succeed("capture", *common)
    succeed("sweep", *common, "--codec", "int:4", "--layers", "1")


@torch.no_grad()
def test_captured_keys_are_in_the_key_space_asked_for(experiment: Path, llama_folder: Path, tmp_path: Path) -> None:
    common = ("--config", experiment, "-o", tmp_path, "--layers", "1")
    pre_rope, plain = (
        load_file(Path(succeed_json("capture", *common, "--key-space", space)["folder"]) / "layer-001.safetensors")
        for space in ("pre-rope", "post-rope")
    )
    rotation = KeyRotation(load_model(ModelConfig(str(llama_folder), device="cpu", dtype="float32")).model)
    heads = plain["k"].reshape(-1, 48, 2, 16).transpose(1, 2)  # blocks, heads, tokens
    expected = rotation.remove(1, heads, torch.arange(48)[None]).transpose(1, 2).reshape(-1, 32)
    assert not torch.allclose(pre_rope["k"].float(), plain["k"].float(), atol=1e-2)
    torch.testing.assert_close(pre_rope["k"].float(), expected, atol=2e-2, rtol=2e-2)
    assert torch.equal(pre_rope["v"], plain["v"])


def test_layers_that_were_not_captured_are_added(experiment: Path, tmp_path: Path) -> None:
    common = ("--config", experiment, "-o", tmp_path)
    told = succeed_json("capture", *common, "--layers", "0,2")
    succeed("sweep", *common, "--layers", "1-2")
    assert succeed_json("capture", *common, "--layers", "0,2") == told, "the sweep has left it alone"
    more = succeed_json("capture", *common, "--layers", "1")
    assert more["layers"] == [0, 1, 2]
    assert more["folder"] == told["folder"]

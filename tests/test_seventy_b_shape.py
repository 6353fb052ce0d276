"""LeanLlama-70B in all but size: 80 layers of width 1024 in NF4, through the experiment file that is meant for it."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from leankv import load_model
from leankv.cache.bundle import load_bundle
from leankv.config.loading import load_experiment
from leankv.progress import Silent
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.select import select
from leankv.studies.sweep import sweep
from leankv.studies.workspace import Workspace
from tests import tiny

pytestmark = pytest.mark.whole_runs

EXPERIMENT = Path(__file__).parent.parent / "experiments" / "llama-3.3-70b-nf4.yaml"
LAYERS, WIDTH = 80, 1024
PARAMETERS = (1024 * 4 + 4) + (4 * 128 + 128) + (128 * 1024 + 1024)  # of one codec, weights and biases


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> PlanEvaluator:
    """The finished run: every layer swept, a few of them chosen from."""
    root = tmp_path_factory.mktemp("seventy")
    shape = {
        "num_hidden_layers": LAYERS,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "initializer_range": 0.05,
    }
    tiny.save(root / "model", tiny.build("llama", **shape))
    (root / "text.txt").write_text(tiny.text(8_000), encoding="utf-8")
    overrides = {
        "model.name": str(root / "model"),
        "model.dtype": "auto",  # processors that know no bfloat16 take an age over it
        "data.dataset": str(root / "text.txt"),
        "data.block_length": 24,
        "data.calibration_blocks": 6,
        "data.selection_blocks": 2,
        "data.report_blocks": 2,
        "fit.epochs": 1,
        "protocol.batch_size": 2,
        "selection.budget": "500%",
        "selection.layers": "40-43",
        "output_dir": str(root / "run"),
    }
    finished = PlanEvaluator(Workspace.open(load_experiment(EXPERIMENT, overrides), Silent()))
    sweep(finished)
    select(finished)
    return finished


@pytest.fixture
def folder(run: PlanEvaluator) -> Path:
    assert run.workspace.folder is not None
    return run.workspace.folder


@pytest.fixture
def summary(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text())


def test_the_model_is_in_nf4_under_a_device_map(run: PlanEvaluator) -> None:
    assert run.workspace.experiment.model.device_map == "auto"
    assert run.workspace.experiment.model.load_in_4bit
    model = run.workspace.loaded.model
    for layer in model.model.layers:
        assert layer.self_attn.k_proj.weight.dtype == torch.uint8
        assert layer.self_attn.k_proj.weight.numel() == WIDTH * 64 // 2
    assert model.lm_head.weight.dtype == model.dtype
    assert load_experiment(EXPERIMENT, {}).model.dtype == "bfloat16"


def test_the_cache_is_llamas(run: PlanEvaluator) -> None:
    assert len(run.workspace.loaded.geometry.layers) == LAYERS
    assert run.workspace.loaded.geometry.width == WIDTH
    assert run.workspace.loaded.geometry.bytes_per_token == 80 * 2 * 1024 * 2


def test_every_layer_is_swept(folder: Path) -> None:
    table = pd.read_csv(folder / "sweep.csv")
    assert list(table["layer"]) == list(range(LAYERS))
    assert set(table["codec_k"]) == set(table["codec_v"]) == {"ae:4"}
    assert set(table["bits_per_token"]) == {2 * 4 * 16}
    assert table["delta_ppl"].nunique() > LAYERS // 2, "layers cost different amounts"


def test_codecs_have_the_papers_size(run: PlanEvaluator, summary: Any) -> None:
    assert PARAMETERS == 136_836
    plan = run.codecs.plan(run.workspace.plan.only(summary["selected_layers"]))
    assert len(plan) == 2 * len(summary["selected_layers"])
    assert {codec.n_parameters for codec in plan.values()} == {PARAMETERS}
    assert {p.dtype for codec in plan.values() for p in codec.parameters()} == {torch.float32}
    assert summary["codec_parameters"] == len(plan) * PARAMETERS


def test_ratios(summary: Any) -> None:
    chosen = len(summary["selected_layers"])
    assert set(summary["selected_layers"]) <= {40, 41, 42, 43}
    assert chosen > 0
    assert summary["n_layers"] == LAYERS
    assert summary["width"] == WIDTH
    assert summary["code_ratio"] == 256
    assert summary["claimed_cache_ratio"]["4096"] == pytest.approx(LAYERS / (LAYERS - chosen + chosen / 256))


def test_the_bundle_holds_the_chosen_codecs(folder: Path, summary: Any) -> None:
    tensors = load_file(folder / "bundle" / "codecs.safetensors")
    assert {int(name.split(".")[0]) for name in tensors} == set(summary["selected_layers"])
    weights = [tensor for name, tensor in tensors.items() if name.endswith(("weight", "bias"))]
    assert sum(tensor.numel() for tensor in weights) == 2 * len(summary["selected_layers"]) * PARAMETERS


def test_the_bundle_generates_on_the_quantized_model(run: PlanEvaluator, folder: Path, summary: Any) -> None:
    """In the process that made it, after many forward passes."""
    model = run.workspace.loaded.model
    cache = load_bundle(folder / "bundle", model).new_cache()
    inputs = run.workspace.loaded.tokenizer("once there was", return_tensors="pt")
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert output.shape == (1, 14 + 4)
    tokens, chosen = cache.get_seq_length(), len(summary["selected_layers"])
    exact = 2 * WIDTH * model.dtype.itemsize
    assert cache.nbytes() == tokens * ((LAYERS - chosen) * exact + chosen * 2 * 4 * 2)


def test_the_bundle_loads_on_the_same_model_loaded_anew(run: PlanEvaluator, folder: Path, summary: Any) -> None:
    """As in another process."""
    loaded = load_model(run.workspace.experiment.model)
    assert loaded.fingerprint == run.workspace.loaded.fingerprint
    opened = load_bundle(folder / "bundle", loaded.model)
    assert {site.layer for site in opened.plan} == set(summary["selected_layers"])

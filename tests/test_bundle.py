"""A whole small run from Python, its result files, and the bundle that comes out of it."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from leankv import LeanCache, ModelConfig, UserError, load_model
from leankv.cache.bundle import load_bundle, read_bundle_config
from leankv.cache.plan import Site
from leankv.config.loading import load_experiment
from leankv.data.splits import TextSource
from leankv.models.loading import LoadedModel
from leankv.progress import Silent
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.select import select
from leankv.studies.sweep import sweep
from leankv.studies.workspace import Workspace
from tests import tiny

pytestmark = pytest.mark.whole_runs

SUMMARY_KEYS = {
    "model",
    "n_layers",
    "width",
    "codec",
    "protocol",
    "budget",
    "base_ppl",
    "selected_layers",
    "ppl",
    "delta_ppl",
    "delta_ppl_interval",
    "delta_percent",
    "code_ratio",
    "cache_ratio",
    "all_in_ratio",
    "context",
    "base_bytes",
    "held_bytes",
    "stored_bytes",
    "peak_step_bytes",
    "codec_bytes",
    "codec_bytes_memory",
    "claimed_cache_ratio",
    "seconds",
    "peak_rss_bytes",
}
SWEEP_COLUMNS = [  # those that are always filled; a last one holds predictions where they were asked for
    "layer",
    "codec_k",
    "codec_v",
    "key_space",
    "protocol",
    "sinks",
    "window",
    "tokens",
    "base_ppl",
    "ppl",
    "delta_ppl",
    "delta_ppl_low",
    "delta_ppl_high",
    "fvu_k",
    "fvu_v",
    "bits_per_token",
    "seconds",
]


def evaluator_of(config: Path | None, overrides: dict[str, Any]) -> PlanEvaluator:
    return PlanEvaluator(Workspace.open(load_experiment(config, overrides), Silent()))


def run_all(overrides: dict[str, Any]) -> Path:
    """Sweep and select; the run's folder."""
    evaluator = evaluator_of(None, overrides)
    sweep(evaluator)
    select(evaluator)
    assert evaluator.workspace.folder is not None
    return evaluator.workspace.folder


_finished: list[Path] = []


@pytest.fixture
def finished(settings: dict[str, Any]) -> Path:
    """The folder of a finished run, made once; tests that change it work on a copy."""
    if not _finished:
        _finished.append(run_all(settings))
    return _finished[0]


@pytest.fixture
def bundle(finished: Path, tmp_path: Path) -> Path:
    """A copy of its bundle."""
    return Path(shutil.copytree(finished / "bundle", tmp_path / "bundle"))


@pytest.fixture
def loaded(llama_folder: Path) -> LoadedModel:
    return load_model(ModelConfig(str(llama_folder), device="cpu", dtype="float32"))


def refusal(bundle: Path, model: Any) -> str:
    """The sentence that refuses a bundle."""
    with pytest.raises(UserError) as caught:
        load_bundle(bundle, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- result files ------------------------------------------------------------------------------------------------------


def test_the_summary_has_what_the_project_promises(finished: Path, llama_folder: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary) >= SUMMARY_KEYS
    assert summary["model"] == str(llama_folder)
    assert summary["n_layers"] == 4
    assert summary["width"] == 32
    assert summary["codec"] == "ae:4x16"
    assert summary["protocol"] == "strict"
    assert summary["budget"] == "50%"
    assert summary["selected_layers"] == sorted(summary["selected_layers"]) != []
    assert summary["delta_ppl"] == pytest.approx(summary["ppl"] - summary["base_ppl"])
    assert summary["delta_percent"] == pytest.approx(100 * summary["delta_ppl"] / summary["base_ppl"])
    low, high = summary["delta_ppl_interval"]
    assert low < summary["delta_ppl"] < high
    assert summary["kl_low"] < summary["kl"] < summary["kl_high"]
    assert summary["kl_median"] < summary["kl_p99"] <= summary["kl_p999"]
    assert 0 < summary["rms_dp"] < 100
    assert 0 < summary["top1"] < 100
    assert summary["code_ratio"] == 32 / 4
    chosen = len(summary["selected_layers"])
    assert summary["context"] == 48  # a block of report text, as the cost
    exact, coded = (4 - chosen) * 2 * 32, chosen * 2 * 4
    base, held = 4 * 2 * 32 * 2, exact * getattr(torch, summary["dtype"]).itemsize + coded * 2
    assert (summary["base_bytes"], summary["held_bytes"]) == (48 * base, 48 * held)
    assert summary["cache_ratio"] == base / held
    whole = summary["held_bytes"] + summary["codec_bytes_memory"] + summary["peak_step_bytes"]
    assert summary["all_in_ratio"] == summary["base_bytes"] / whole
    assert summary["codec_bytes_memory"] >= summary["codec_bytes"] > 0
    claimed = summary["claimed_cache_ratio"]
    assert claimed == {n: pytest.approx(base / (2 * (exact + coded))) for n in ("1024", "4096", "32768", "131072")}
    assert summary["peak_rss_bytes"] > 10**7
    assert all(value >= 0 for value in summary["seconds"].values())


def test_the_sweep_has_one_row_a_layer(finished: Path) -> None:
    table = pd.read_csv(finished / "sweep.csv")
    assert list(table) == [*SWEEP_COLUMNS, "predicted_delta_ppl"]
    assert list(table["layer"]) == [0, 1, 2, 3]
    assert set(table["codec_k"]) == set(table["codec_v"]) == {"ae:4x16"}
    assert set(table["protocol"]) == {"strict"}
    assert set(table["key_space"]) == {"post-rope"}
    assert set(table["tokens"]) == {3 * 47}
    assert (set(table["sinks"]), set(table["window"])) == ({0}, {0})
    assert "protocol strict, sinks 0, window 0" in (finished / "sweep.md").read_text()
    assert set(table["bits_per_token"]) == {2 * 4 * 16}
    assert table["base_ppl"].nunique() == 1
    assert list(table["delta_ppl"]) == pytest.approx(list(table["ppl"] - table["base_ppl"]))
    assert (table["delta_ppl_low"] < table["delta_ppl"]).all()
    assert (table["delta_ppl"] < table["delta_ppl_high"]).all()
    assert ((table[["fvu_k", "fvu_v"]] > 0) & (table[["fvu_k", "fvu_v"]] < 1.5)).all(axis=None)


def test_the_manifest_names_what_made_the_results(finished: Path, loaded: LoadedModel) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["model"]["fingerprint"] == loaded.fingerprint
    assert manifest["seed"] == 0
    assert set(manifest["data"]) == {"calibration", "selection", "report"}
    assert len(set(manifest["data"].values())) == 3


def test_the_chosen_set_keeps_the_budget_on_the_selection_split(finished: Path) -> None:
    selection = json.loads((finished / "selection.json").read_text())
    kept = [step for step in selection["steps"] if step["verdict"] == "kept"]
    assert selection["selected_layers"] == kept[-1]["layers"]
    assert all(step["joint_cost"] <= selection["budget_points"] for step in kept)
    assert selection["budget_points"] == pytest.approx(selection["base_ppl"] / 2)


@torch.no_grad()
def test_the_joint_cost_is_that_of_the_loaded_bundle(finished: Path, bundle: Path, loaded: LoadedModel) -> None:
    """Measured again with nothing but the bundle, the report text and a plain loop."""
    experiment = load_experiment(finished / "experiment.yaml", {})
    data = experiment.data
    blocks = TextSource(data).blocks("report", loaded.tokenizer, data.report_blocks, data.block_length)

    def perplexity(make_cache: Any) -> float:
        nats = 0.0
        for tokens in blocks.tokens:
            logits = loaded.model(tokens[None], past_key_values=make_cache()).logits[0, :-1]
            nats += cross_entropy(logits.float(), tokens[1:], reduction="sum").item()
        return math.exp(nats / (len(blocks) * (data.block_length - 1)))

    summary = json.loads((finished / "summary.json").read_text())
    assert perplexity(lambda: None) == pytest.approx(summary["base_ppl"], rel=1e-5)
    compressed = perplexity(load_bundle(bundle, loaded.model).new_cache)
    assert compressed == pytest.approx(summary["ppl"], rel=1e-5)
    assert abs(compressed - summary["base_ppl"]) > 1e-3


def test_a_run_of_values_under_stream(settings: dict[str, Any], loaded: LoadedModel) -> None:
    """Values only, another family, sinks and a window: the bundle carries them all."""
    folder = run_all(
        {
            **settings,
            "plan": {"v": "pca:8"},
            "codec.dtype": "float16",
            "protocol.kind": "stream",
            "protocol.sinks": 2,
            "protocol.window": 5,
            "protocol.chunk": 16,
        }
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["codec"] == "k=none v=pca:8"
    assert summary["code_ratio"] == 4.0
    opened = load_bundle(folder / "bundle", loaded.model)
    assert set(opened.plan) == {Site(layer, "v") for layer in summary["selected_layers"]}
    codec = next(iter(opened.plan.values()))
    assert {parameter.dtype for parameter in codec.parameters()} == {torch.float16}
    cache = opened.new_cache()
    assert (cache.sinks, cache.window) == (opened.sinks, opened.window) == (2, 5)
    table = pd.read_csv(folder / "sweep.csv", keep_default_na=False)
    assert set(table["codec_k"]) == {"none"}
    assert (table["fvu_k"] == 0).all()
    assert set(table["bits_per_token"]) == {32 * 16 + 8 * 16}


def test_a_choice_of_no_layers_leaves_no_bundle_of_an_earlier_one(finished: Path, tmp_path: Path) -> None:
    """What lies in the folder is what the summary tells of."""
    folder = Path(shutil.copytree(finished, tmp_path / "again"))
    dearest = pd.read_csv(folder / "sweep.csv").sort_values("delta_ppl").iloc[-1]
    assert dearest["delta_ppl"] > 0.001
    changes = {
        "output_dir": str(folder),
        "selection.budget": "0.001",
        "selection.layers": str(int(dearest["layer"])),
    }
    summary = select(evaluator_of(folder / "experiment.yaml", changes))
    assert summary.selected_layers == ()
    assert summary.delta_ppl == 0
    assert summary.code_ratio is None
    assert not (folder / "bundle" / "leankv_config.json").exists()


# -- the bundle --------------------------------------------------------------------------------------------------------


def test_the_bundle_loads_and_generates(bundle: Path, loaded: LoadedModel) -> None:
    summary = json.loads((bundle / "leankv_config.json").read_text())["results"]
    inputs = loaded.tokenizer("once there was", return_tensors="pt")
    caches = [load_bundle(bundle, loaded.model).new_cache(), LeanCache(loaded.model.config, {}, sinks=0, window=0)]
    outputs = [
        loaded.model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False) for cache in caches
    ]
    assert outputs[0].shape == (1, 14 + 20)
    lean, plain = (cache.nbytes() for cache in caches)
    # Codes of 4 numbers in 16 bits in place of 32 in 32.
    assert lean == pytest.approx(plain * (1 - len(summary["selected_layers"]) / 4 * (1 - 4 * 16 / (32 * 32))))


def test_sinks_and_window_may_be_overridden(bundle: Path, loaded: LoadedModel) -> None:
    opened = load_bundle(bundle, loaded.model)
    caches = [opened.new_cache(sinks=3, window=7), opened.new_cache(window=7), opened.new_cache()]
    assert [(cache.sinks, cache.window) for cache in caches] == [(3, 7), (0, 7), (0, 0)]


def test_codecs_come_back_as_they_were_fitted(finished: Path, bundle: Path, loaded: LoadedModel) -> None:
    evaluator = evaluator_of(finished / "experiment.yaml", {})
    opened = load_bundle(bundle, loaded.model)
    fitted = evaluator.codecs.plan(opened.spec)
    assert set(fitted) == set(opened.plan) != set()
    for site, codec in opened.plan.items():
        tensors = fitted[site].state_dict()
        assert set(tensors) == set(codec.state_dict())
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in codec.state_dict().items())


def test_another_model_is_refused(bundle: Path, llama_folder: Path) -> None:
    sentence = refusal(bundle, tiny.build("llama", seed=1))
    assert str(bundle) in sentence
    assert str(llama_folder) in sentence
    assert "weights" in sentence


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"head_dim": 8}], ids=["layers", "width"])
def test_a_model_of_another_shape_is_refused(bundle: Path, change: dict[str, int]) -> None:
    sentence = refusal(bundle, tiny.build("llama", **change))
    assert "4 layers of width 32" in sentence
    assert ("3 layers" in sentence) or ("width 16" in sentence)


def test_the_same_model_in_another_dtype_is_taken(bundle: Path) -> None:
    for model in (tiny.build("llama"), tiny.build("llama").to(torch.bfloat16)):
        assert load_bundle(bundle, model).new_cache().get_seq_length() == 0


@pytest.mark.parametrize("at", [3, 40, -1], ids=["length", "header", "data"])
def test_a_flipped_byte_is_refused(bundle: Path, loaded: LoadedModel, at: int) -> None:
    path = bundle / "codecs.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert str(path) in refusal(bundle, loaded.model)


def test_a_missing_codec_file_is_refused(bundle: Path, loaded: LoadedModel) -> None:
    (bundle / "codecs.safetensors").unlink()
    assert "codecs.safetensors" in refusal(bundle, loaded.model)


def test_an_edited_configuration_is_refused(bundle: Path, loaded: LoadedModel) -> None:
    path = bundle / "leankv_config.json"
    config = json.loads(path.read_text())
    config["sinks"] = 4
    path.write_text(json.dumps(config))
    assert str(path) in refusal(bundle, loaded.model)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '"x"', "\x00\xff"])
def test_a_damaged_configuration_is_refused(bundle: Path, loaded: LoadedModel, text: str) -> None:
    path = bundle / "leankv_config.json"
    path.write_bytes(text.encode("latin-1"))
    assert str(path) in refusal(bundle, loaded.model)


def test_a_missing_configuration_is_refused(bundle: Path, loaded: LoadedModel) -> None:
    (bundle / "leankv_config.json").unlink()
    assert "leankv_config.json" in refusal(bundle, loaded.model)


def test_a_missing_folder_is_refused(tmp_path: Path, loaded: LoadedModel) -> None:
    assert str(tmp_path / "none") in refusal(tmp_path / "none", loaded.model)


def test_the_card_tells_what_it_is(finished: Path, bundle: Path) -> None:
    summary, card = json.loads((finished / "summary.json").read_text()), (bundle / "README.md").read_text()
    layers = ", ".join(map(str, summary["selected_layers"]))
    for words in (
        summary["model"],
        layers,
        "ae:4x16",
        "protocol strict",
        f"{summary['base_ppl']:.3f}",
        f"{summary['ppl']:.3f}",
        f"{summary['kl']:.4g} nats a token",
        "Mean KLD",
        "Same top p",
    ):
        assert words in card


def test_the_code_on_the_card_runs(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (bundle / "README.md").read_text(), flags=re.DOTALL)
    exec(code.replace("PATH/TO/THIS/FOLDER", str(bundle)), {})
    assert capsys.readouterr().out.startswith("The city of")


def test_the_bundle_knows_its_experiment(finished: Path, bundle: Path) -> None:
    config = read_bundle_config(bundle)
    assert config["experiment"]["plan"] == "ae:4x16"
    assert config["results"] == json.loads((finished / "summary.json").read_text())

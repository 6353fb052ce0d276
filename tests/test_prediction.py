"""Costs predicted from gradients, and sweeps that screen or predict."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from leankv.cache.lean_cache import LeanCache
from leankv.config.loading import load_experiment
from leankv.models.observers import GradientCache, RecordingCache
from leankv.progress import Silent
from leankv.report.sweep import format_prediction, sweep_markdown
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.predict import predict_costs
from leankv.studies.sweep import sweep
from leankv.studies.workspace import Workspace
from tests import tiny


class NudgedCache(RecordingCache):
    """Adds `step` to one number of one layer's keys or values."""

    def __init__(self, config: Any, layer: int, part: str, at: tuple[int, ...], step: float):
        super().__init__(config, lambda *_: None)
        self.nudge = layer, part, at, step

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]
        layer, part, at, step = self.nudge
        if layer_idx == layer:
            (key_states if part == "k" else value_states)[at] += step
        return super().update(key_states, value_states, layer_idx)


@pytest.mark.parametrize("part", ["k", "v"])
def test_gradients_are_those_of_the_cached_vectors(model: Any, part: str) -> None:
    """Against central differences; several of these models normalise in float32 whatever their own precision."""
    model = model.double()
    tokens = tiny.tokens(1, 20)

    def loss(cache: Any) -> torch.Tensor:
        return cross_entropy(model(tokens, past_key_values=cache).logits[0, :-1], tokens[0, 1:], reduction="sum")

    cache = GradientCache(model.config)
    loss(cache).backward()
    for layer, at in [(0, (0, 1, 3, 5)), (2, (0, 0, 10, 2)), (3, (0, 1, 0, 0))]:
        _, gradient = cache.states_and_gradients(layer, part)
        with torch.no_grad():
            up, down = (loss(NudgedCache(model.config, layer, part, at, step)) for step in (5e-3, -5e-3))
        assert gradient is not None
        assert gradient[at].item() == pytest.approx(((up - down) / 1e-2).item(), rel=2e-2, abs=5e-3)


def run_with(settings: dict[str, Any], **changes: Any) -> PlanEvaluator:
    overrides = {**settings, **{name.replace("__", "."): value for name, value in changes.items()}}
    return PlanEvaluator(Workspace.open(load_experiment(None, overrides), Silent()))


def test_a_lossless_codec_is_predicted_to_cost_nothing(settings: dict[str, Any]) -> None:
    run = run_with(settings, plan="identity")
    assert predict_costs(run, 10.0) == {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}


def test_a_coarser_codec_is_predicted_to_cost_more(settings: dict[str, Any], tmp_path: Path) -> None:
    coarse = run_with(settings, plan="mean")
    fine = run_with(settings, plan="pca:16", output_dir=str(tmp_path / "fine"))
    cost = {name: predict_costs(run, 10.0) for name, run in {"coarse": coarse, "fine": fine}.items()}
    assert all(cost["coarse"][layer] > cost["fine"][layer] > 0 for layer in range(4))


def watched(layer: Any, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What a cache layer's `update` will have returned: keys, then values."""
    read: list[torch.Tensor] = []
    update = layer.update

    def watch(*states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        read.extend(update(*states))
        return read[0], read[1]

    monkeypatch.setattr(layer, "update", watch)
    return read


def test_codecs_that_look_back_are_predicted_from_the_error_that_their_layer_alone_makes(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a pass of the model itself through a cache with that layer alone compressed."""
    monkeypatch.setattr("leankv.studies.predict.BLOCKS", 1)
    plan = {"k": "share:-2", "v": "resid(share:-2,pca:4)"}
    run = run_with(settings, model__dtype="float32", protocol__sinks=3, plan=plan)
    predicted = predict_costs(run, 10.0)
    workspace = run.workspace
    tokens, model = workspace.blocks("calibration").tokens[-1:], workspace.loaded.model
    gradients = GradientCache(model.config)
    logits = model(tokens, past_key_values=gradients).logits
    cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum").backward()
    for layer in range(4):
        cache = LeanCache(model.config, run.codecs.plan(workspace.plan.only([layer])), sinks=3, window=0)
        read = watched(cache.layers[layer], monkeypatch)
        with torch.no_grad():
            model(tokens, past_key_values=cache)  # up to this layer the states are the exact ones
        rise = 0.0
        for part, seen in zip(("k", "v"), read, strict=True):
            states, g = gradients.states_and_gradients(layer, part)
            assert g is not None
            error = (states - seen).transpose(1, 2).flatten(2)[0]
            for each in g.transpose(1, 2).flatten(2)[0]:
                rise += 0.5 * (error @ each).square().mean().item() / tokens.shape[1]
        assert math.log1p(predicted[layer] / 10.0) == pytest.approx(min(rise, 20.0), rel=1e-3)


def test_predictions_stand_beside_measurements(settings: dict[str, Any]) -> None:
    table = sweep(run_with(settings, sweep__predict=True))
    assert (table["predicted_delta_ppl"] > 0).all()
    words = format_prediction(table)
    assert words is not None
    assert words in sweep_markdown(table).replace("Costs predicted", "costs predicted")


def test_a_screened_sweep_spends_less_and_says_how_much(settings: dict[str, Any], tmp_path: Path) -> None:
    exact = sweep(run_with(settings, data__selection_blocks=6))
    screened = sweep(
        run_with(settings, data__selection_blocks=6, sweep__screen=True, output_dir=str(tmp_path / "screened"))
    )
    block = settings["data.block_length"] - 1
    assert exact["tokens"].tolist() == [6 * block] * 4
    assert sorted(screened["tokens"].tolist()) == [2 * block, 2 * block, 6 * block, 6 * block]
    both = exact.merge(screened, on="layer", suffixes=("", "_screened"))
    whole = both[both["tokens_screened"] == both["tokens"]]
    for name in ("delta_ppl", "delta_ppl_low", "delta_ppl_high"):
        assert whole[f"{name}_screened"].tolist() == pytest.approx(whole[name].tolist(), rel=1e-9)
    assert "tokens" in sweep_markdown(screened)


def test_a_stopped_screening_measures_nothing_again(settings: dict[str, Any]) -> None:
    first = run_with(settings, data__selection_blocks=6, sweep__screen=True)
    table, folder = sweep(first), first.workspace.folder
    assert folder is not None
    cells = {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    again = sweep(run_with(settings, data__selection_blocks=6, sweep__screen=True))
    pd.testing.assert_frame_equal(table, again)
    assert cells == {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    kinds = [json.loads(path.read_text())["kind"] for path in cells]
    assert set(kinds) == {"capture", "nats-selection"}

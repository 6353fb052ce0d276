"""Bundles of plans that differ from layer to layer, and bundles that nothing was measured of."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from leankv.cache.bundle import Bundle, load_bundle
from leankv.cache.plan import PlanSpec
from leankv.codecs import FAMILIES
from leankv.evaluation.perplexity import measure_nats
from leankv.models.loading import describe
from tests.run_folders import refuse, succeed
from tests.test_bundle import evaluator_of, run_all

pytestmark = pytest.mark.whole_runs

MIXED = {"k": "int:4", "v": "resid(share:-1,transform:0.3)", "layers": {"0": {"k": "none"}, "2": "pca:8"}}


def test_a_plan_of_several_recipes_is_swept_chosen_and_shipped(settings: dict[str, Any]) -> None:
    """Layers with recipes of their own, a part left exact, and codecs that predict from layers of other recipes."""
    folder = run_all({**settings, "plan": MIXED, "selection.budget": "500%"})
    summary = json.loads((folder / "summary.json").read_text())
    table = pd.read_csv(folder / "sweep.csv", keep_default_na=False)
    asked = PlanSpec.parse(MIXED).resolved(4)
    assert list(table["codec_k"]) == ["none", "int:4", "pca:8", "int:4"]
    assert list(table["codec_v"]) == [asked[layer, "v"].text for layer in range(4)]
    assert (table["fvu_k"] == 0).tolist() == [True, False, False, False]
    evaluator = evaluator_of(folder / "experiment.yaml", {})
    model = evaluator.workspace.loaded.model
    opened = load_bundle(folder / "bundle", model)
    assert opened.spec == asked.only(summary["selected_layers"])
    assert len(summary["selected_layers"]) > 1
    measured = evaluator.nats(opened.spec, "report")
    assert measured.perplexity == pytest.approx(summary["ppl"], rel=1e-12)
    protocol = evaluator.protocol
    blocks = evaluator.workspace.blocks("report")
    assert measure_nats(model, blocks, protocol, opened.new_cache().fresh).nats == measured.nats


def test_a_bundle_of_a_plan_nothing_was_measured_of(settings: dict[str, Any], tmp_path: Path) -> None:
    """With a card that says so; saved over another one, nothing of that is left."""
    evaluator = evaluator_of(None, settings)
    workspace = evaluator.workspace
    about = workspace.loaded.model.config, describe(workspace.loaded), asdict(workspace.experiment)
    plans = [PlanSpec.uniform(k="int:4"), PlanSpec.uniform(v="int:4").only([1])]
    for spec in plans:
        Bundle(evaluator.codecs.plan(spec), 2, 3, None, *about, {}).save(tmp_path / "b")
    opened = load_bundle(tmp_path / "b", workspace.loaded.model)
    assert opened.spec == plans[-1]
    assert opened.key_space == "post-rope"
    card = (tmp_path / "b" / "README.md").read_text()
    assert "Nothing was measured yet" in card
    assert str(plans[-1]) in card


OWN_FAMILY = """
import torch
from leankv.codecs import Recipe
from leankv.codecs.mean import Mean
from leankv.codecs.statistics import mean_of

class LabRecipe(Recipe):
    family = grammar = "lab-mean"

    def fit(self, data):
        return [LabMean(mean_of(x)) for x in data.train]

    def unfitted(self, width):
        return LabMean(torch.zeros(width))

class LabMean(Mean):
    def __init__(self, mean):
        super().__init__(mean)
        self.recipe = LabRecipe()
"""


def test_a_bundle_of_a_family_of_one_s_own_opens_for_who_names_it(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its module is imported because the user says so, never because the bundle does."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lab_of_mine.py").write_text(OWN_FAMILY)
    with monkeypatch.context() as patched:
        patched.setattr("leankv.codecs.registry.FAMILIES", dict(FAMILIES))
        evaluator = evaluator_of(None, {**settings, "plan": "lab_of_mine:LabRecipe"})
        workspace = evaluator.workspace
        about = workspace.loaded.model.config, describe(workspace.loaded), asdict(workspace.experiment)
        Bundle(evaluator.codecs.plan(workspace.plan), 2, 3, None, *about, {}).save(tmp_path / "b")
    commands = (
        ["eval-ppl", "--bundle", tmp_path / "b", "--blocks", 1],
        ["generate", "once there was", "--bundle", tmp_path / "b", "--max-new-tokens", 2],
    )
    for command in commands:
        sys.modules.pop("lab_of_mine", None)
        with monkeypatch.context() as patched:
            patched.setattr("leankv.codecs.registry.FAMILIES", dict(FAMILIES))
            assert "known after --register module:Recipe" in refuse(*command)
            assert "lab_of_mine" not in sys.modules
            succeed(*command, "--register", "lab_of_mine:LabRecipe")
    assert "no LabRecipe can be imported" in refuse(*command, "--register", "lab_of_yours:LabRecipe")
    assert "write module:Recipe" in refuse(*command, "--register", "lab")

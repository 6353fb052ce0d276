"""A plan is a value: equal where it says the same, hashable, and the same after YAML and JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leankv import UserError
from leankv.cache.plan import PlanSpec, Site, read_plan
from leankv.codecs.registry import parse_recipe
from leankv.config.loading import load_experiment
from leankv.config.plan_table import PARTS, recipes_by_layer

TEXTS = ("none", "int:4", "ae:4", "transform:s0.02", "resid(share:-2,transform:s0.02)")
recipes = st.sampled_from(TEXTS)
layers = st.lists(st.integers(0, 9), max_size=6, unique=True)


@st.composite
def plans(draw: Any) -> PlanSpec:
    plan = PlanSpec.uniform(k=draw(recipes), v=draw(recipes))
    for _ in range(draw(st.integers(0, 3))):
        plan = plan.with_layers(draw(layers), k=draw(st.none() | recipes), v=draw(st.none() | recipes))
    return plan


# -- a value ---------------------------------------------------------------------------------------------------------


@given(plans())
def test_a_plan_comes_back_from_its_table(plan: PlanSpec) -> None:
    back = PlanSpec.parse(json.loads(json.dumps(plan.table())))
    assert back == plan
    assert hash(back) == hash(plan)
    assert (back.key(), str(back)) == (plan.key(), str(plan))


@given(plans(), st.integers(10, 14))
def test_naming_every_layer_changes_nothing(plan: PlanSpec, n_layers: int) -> None:
    named = plan.resolved(n_layers)
    assert named.sites(n_layers) == plan.sites(n_layers)
    assert named.resolved(n_layers) == named
    assert all(named[layer, part] == plan[layer, part] for layer in range(n_layers) for part in ("k", "v"))


@given(plans(), layers, recipes)
def test_what_changes_nothing_leaves_an_equal_plan(plan: PlanSpec, some: list[int], recipe: str) -> None:
    changed = plan.with_layers(some, k=recipe, v=recipe)
    original = {Site(layer, part): plan[layer, part] for layer in some for part in ("k", "v")}
    assert changed.with_sites(original) == plan


@given(plans(), layers)
def test_only_leaves_all_else_exact(plan: PlanSpec, some: list[int]) -> None:
    only = plan.only(some, parts=["v"])
    for layer in range(10):
        assert only[layer, "k"] is None
        assert only[layer, "v"] == (plan[layer, "v"] if layer in some else None)


@given(plans())
def test_a_table_says_of_every_layer_what_the_plan_says(plan: PlanSpec) -> None:
    n_layers = 10
    expected = [{part: plan[layer, part] for part in PARTS} for layer in range(n_layers)]
    written = [{part: "none" if own is None else own.text for part, own in each.items()} for each in expected]
    assert recipes_by_layer(plan.table(), n_layers) == written


def test_the_example_of_the_readme() -> None:
    plan = PlanSpec.uniform("transform:s0.02").with_layers([0, 1], k="int:4")
    assert plan[0, "k"] == plan[1, "k"] == parse_recipe("int:4")
    assert plan[0, "v"] == plan[2, "k"] == parse_recipe("transform:s0.02")
    assert plan.table() == {"k": "transform:s0.02", "v": "transform:s0.02", "layers": {"0-1": {"k": "int:4"}}}
    assert str(plan) == "transform:s0.02, but layers 0-1: k=int:4"


def test_spellings_of_one_recipe_make_one_plan() -> None:
    assert PlanSpec.uniform("ae:4") == PlanSpec.uniform("ae:4x128")
    assert PlanSpec.uniform("ae:4").key() == PlanSpec.uniform("ae:4x128").key()


def test_the_key_changes_with_a_family_s_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PlanSpec.uniform("int:4")
    before = plan.key()
    monkeypatch.setattr(type(plan.k), "revision", 999)
    assert plan.key() != before


# -- as it is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("plan: int:4\n", PlanSpec.uniform("int:4")),
        ("plan: {k: none, v: ae:4}\n", PlanSpec.uniform(v="ae:4")),
        ("plan: {v: ae:4}\n", PlanSpec.uniform(v="ae:4")),
        ("plan:\n  k: null\n  v: ae:4\n", PlanSpec.uniform(v="ae:4")),
        (
            "plan:\n  k: ae:4\n  v: ae:4\n  layers:\n    0-1: {k: int:4}\n    3: none\n",
            PlanSpec.uniform("ae:4").with_layers([0, 1], k="int:4").with_layers([3], k="none", v="none"),
        ),
        ("codec: {k: none, v: int:2}\n", PlanSpec.uniform(v="int:2")),  # as version 0.1 wrote it
        ("codec:\n  v: int:2\n", PlanSpec.uniform(k="ae:4", v="int:2")),
    ],
)
def test_yaml_says_it_in_a_line_or_in_a_table(tmp_path: Path, written: str, expected: PlanSpec) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(written, encoding="utf-8")
    experiment = load_experiment(path, {})
    assert PlanSpec.parse(experiment.plan) == expected
    path.write_text(experiment.to_yaml(), encoding="utf-8")
    assert load_experiment(path, {}) == experiment


def test_flags_change_one_part_of_a_plan() -> None:
    table = {"k": "ae:4", "v": "ae:4", "layers": {"0": "int:4"}}
    experiment = load_experiment(None, {"plan": table, "plan.k": "none"})
    expected = PlanSpec.uniform(v="ae:4").with_layers([0], v="int:4")
    assert PlanSpec.parse(experiment.plan) == expected


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("plan: 3\n", "plan must be a recipe"),
        ("plan: {q: int:4}\n", "no entry 'q'"),
        ("plan: {k: int:4, layers: int:2}\n", "plan.layers must be a table"),
        ("plan: {k: int:4, layers: {3-1: int:2}}\n", "runs backwards"),
        ("plan: {k: int:4, layers: {first: int:2}}\n", "not a list of layers"),
        ("plan: {k: int:4, layers: {all: int:2}}\n", "names all layers"),
        ("plan: {k: int:4, layers: {0-3000000000: int:2}}\n", "no model has so many"),
        ("plan: {k: int:4, layers: {0: {q: int:2}}}\n", "no entry 'q'"),
        ("plan: {k: int:4, layers: {0: [int:2]}}\n", "plan.layers.0 must be a recipe"),
        ("plan: none\n", "nothing would be compressed"),
        ("plan: {k: none, layers: {0: none, 1: {v: none}}}\n", "nothing would be compressed"),
    ],
)
def test_a_malformed_plan_is_one_sentence(tmp_path: Path, written: str, named: str) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(written, encoding="utf-8")
    with pytest.raises(UserError, match=named):
        load_experiment(path, {})


@pytest.mark.parametrize(
    ("written", "named"),
    [("{", "not valid JSON"), ('{"k": "nothing:4"}', "not understood"), ("[1]", "must be a recipe")],
)
def test_a_bad_plan_file_is_one_sentence(tmp_path: Path, written: str, named: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(written, encoding="utf-8")
    with pytest.raises(UserError, match=named):
        read_plan(path)
    with pytest.raises(UserError, match="cannot read the plan"):
        read_plan(tmp_path / "none.json")


def test_a_layer_that_the_model_lacks_is_named() -> None:
    with pytest.raises(UserError, match="names layer 9, but the model has layers 0 to 3"):
        PlanSpec.uniform("int:4").with_layers([9], k="none").resolved(4)

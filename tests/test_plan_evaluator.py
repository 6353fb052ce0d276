"""Plans in a workspace: what each site's codec is fitted to and keyed by, what plans cost, and workspaces in memory."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import Plan, PlanSpec, Site
from leankv.codecs import Codec, FitData
from leankv.codecs.share import as_context
from leankv.config.loading import load_experiment
from leankv.data.splits import TextSource
from leankv.errors import UserError
from leankv.evaluation.perplexity import measure_nats
from leankv.models.loading import load_model
from leankv.progress import Silent
from leankv.studies.codec_store import StoredCodec
from leankv.studies.compare import compare_caches
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.rate_map import map_rates, parse_recipes
from leankv.studies.sweep import sweep
from leankv.studies.workspace import Workspace
from tests.run_folders import evaluator_of, folder_of

pytestmark = pytest.mark.whole_runs

SHARE = "resid(share:-1,int:4)"
MIXED = PlanSpec.uniform("int:3").with_layers([0], k="none", v="pca:8").with_layers([2, 3], k=SHARE, v=SHARE)
"""Of four layers: exact, closed form, integers, and codecs that predict from codes and from one another."""


@pytest.fixture
def evaluator(settings: dict[str, Any], tmp_path: Path) -> PlanEvaluator:
    return evaluator_of(settings, tmp_path / "run", plan=MIXED.table())


def in_memory(settings: dict[str, Any], **changes: Any) -> PlanEvaluator:
    experiment = load_experiment(None, {**settings, **changes})
    source = TextSource(experiment.data)
    return PlanEvaluator(Workspace(experiment, load_model(experiment.model), source, Silent()))


def full_pass(evaluator: PlanEvaluator, plan: Plan, split: str = "selection") -> tuple[float, ...]:
    """The slow twin: nats of one pass through all layers."""
    model, protocol = evaluator.workspace.loaded.model, evaluator.protocol
    blocks = evaluator.workspace.blocks(split)
    cache = LeanCache(
        model.config, plan, sinks=protocol.sinks, window=protocol.window, rotation=evaluator.workspace.rotation
    )
    return measure_nats(model, blocks, protocol, cache.fresh).nats


def assert_same_codec(one: Codec, other: Codec) -> None:
    assert one.recipe == other.recipe
    tensors, others = one.state_dict(), other.state_dict()
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def keys(evaluator: PlanEvaluator, spec: PlanSpec) -> dict[Site, str]:
    return {site: evaluator.codecs.key(spec, site) for site in spec.sites(evaluator.workspace.n_layers)}


# -- a recipe for each site --------------------------------------------------------------------------------------------


def test_every_site_has_the_codec_of_its_recipe(evaluator: PlanEvaluator) -> None:
    plan = evaluator.codecs.plan(evaluator.workspace.plan)
    assert {site: codec.recipe.text for site, codec in plan.items()} == {
        (0, "v"): "pca:8",
        (1, "k"): "int:3",
        (1, "v"): "int:3",
        **{(layer, part): SHARE for layer in (2, 3) for part in ("k", "v")},
    }
    assert list(plan) == sorted(plan)


def test_a_recipe_that_takes_its_vectors_alone_gives_one_codec_whatever_plan_it_is_in(evaluator: PlanEvaluator) -> None:
    mixed = evaluator.codecs.codecs(MIXED)
    for recipe, sites in (("pca:8", [Site(0, "v")]), ("int:3", [Site(1, "k"), Site(1, "v")])):
        uniform = evaluator.codecs.codecs(PlanSpec.uniform(recipe))
        assert [uniform[site] for site in sites] == [mixed[site] for site in sites]


@pytest.mark.parametrize("split", ["selection", "report"])
def test_the_nats_of_a_mixed_plan_are_those_of_a_full_pass(evaluator: PlanEvaluator, split: str) -> None:
    for spec in (MIXED, MIXED.only([0, 3]), MIXED.only([2], ["v"]), PlanSpec()):
        assert evaluator.nats(spec, split).nats == full_pass(evaluator, evaluator.codecs.plan(spec), split)
    assert evaluator.base(split).nats != evaluator.nats(MIXED, split).nats


def test_plans_that_say_the_same_are_one_measurement(evaluator: PlanEvaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluator.nats(MIXED, "report")
    monkeypatch.setattr("leankv.studies.plan_evaluator.measure_nats", pytest.fail)
    monkeypatch.setattr("leankv.studies.codec_store.fit_codecs", pytest.fail)
    for spec in (MIXED.resolved(4), PlanSpec.parse(MIXED.table()), MIXED.with_layers([17], k="int:3")):
        assert evaluator.nats(spec, "report") == first
        assert evaluator.nats_path(spec, "report") == evaluator.nats_path(MIXED, "report")


def test_a_plan_that_does_not_suit_the_model_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    for table, words in (
        ({"k": "none", "layers": {"1": {"k": "pca:33"}}}, "width 32"),
        ({"k": "int:4", "layers": {"4": "int:2"}}, "names layer 4, but the model has layers 0 to 3"),
        ({"v": "share:-4"}, "looks outside of a model of 4 layers"),
    ):
        with pytest.raises(UserError, match=words):
            evaluator_of(settings, tmp_path, plan=table)


# -- codecs that predict from others -----------------------------------------------------------------------------------


def test_a_key_holds_those_of_the_sites_upstream_and_of_no_others(evaluator: PlanEvaluator) -> None:
    """Change one site's recipe: the keys that change are of that site and of those that predict from it."""
    before = keys(evaluator, MIXED)
    downstream = {
        (0, "k"): [],
        (0, "v"): [],
        (1, "k"): [(2, "k"), (2, "v"), (3, "k"), (3, "v")],
        (1, "v"): [(2, "k"), (2, "v"), (3, "k"), (3, "v")],
        (2, "k"): [(2, "v"), (3, "k"), (3, "v")],
        (2, "v"): [(3, "k"), (3, "v")],
        (3, "k"): [(3, "v")],
        (3, "v"): [],
    }
    for site, readers in downstream.items():
        for recipe in (*parse_recipes(["int:2"]), None):
            after = keys(evaluator, MIXED.with_sites({Site(*site): recipe}))
            changed = {other for other in before | after if before.get(other) != after.get(other)} - {site}
            assert changed == set(readers), site


def test_the_key_of_a_codec_given_exact_vectors_is_the_same_in_every_plan(evaluator: PlanEvaluator) -> None:
    (recipe,) = parse_recipes([SHARE])
    alone = PlanSpec().with_sites({Site(2, "k"): recipe})
    elsewhere = alone.with_layers([0, 3], k="int:4", v="pca:8").with_layers([2], v="int:4")
    assert evaluator.codecs.key(alone, Site(2, "k")) == evaluator.codecs.key(elsewhere, Site(2, "k"))
    assert evaluator.codecs.codecs(alone)[Site(2, "k")] == evaluator.codecs.codecs(elsewhere)[Site(2, "k")]


def test_keys_hold_the_revisions_of_the_codecs_upstream(
    evaluator: PlanEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(evaluator, MIXED)
    (recipe,) = parse_recipes(["int:3"])
    monkeypatch.setattr(type(recipe), "revision", 99)
    again = PlanEvaluator(evaluator.workspace)
    assert {site for site, key in keys(again, MIXED).items() if key == before[site]} == {(0, "v")}


@pytest.mark.parametrize(
    "spec", [MIXED, MIXED.only([2, 3]), MIXED.only([3])], ids=["codes", "exact and codes", "exact"]
)
def test_a_codec_is_fitted_given_what_its_own_plan_leaves_of_its_context(
    evaluator: PlanEvaluator, spec: PlanSpec
) -> None:
    """By the recipe itself, one site after the other; what stays exact is handed on as it is."""
    codecs, activations, fitting = evaluator.codecs, evaluator.codecs.activations.of(range(4)), evaluator.codecs.fitting
    plan, first_heldout = codecs.plan(spec), codecs.fitting.first_heldout(activations.manifest)
    sites = spec.sites(4)
    left: dict[Site, torch.Tensor] = {}
    for site in [Site(layer, part) for layer in range(4) for part in ("k", "v")]:
        x = fitting.read(activations, site)
        left[site] = as_context(x)
        if site not in sites:
            continue
        sources = []
        if sites[site].n_context_layers:
            sources = [Site(site.layer - 1, "k"), Site(site.layer - 1, "v")]
            sources += [Site(site.layer, "k")] if site.part == "v" else []
        known = torch.cat([left[source] for source in sources], dim=1) if sources else x[:, :0].float()
        data = FitData(
            x[None, :first_heldout],
            x[None, first_heldout:],
            context=known[None, :first_heldout],
            heldout_context=known[None, first_heldout:],
            training=fitting.training,
        )
        (expected,) = sites[site].fit(data)
        assert_same_codec(plan[site], expected)
        left[site] = as_context(expected.decode(expected.encode(x, known), known))


def test_plans_fitted_together_have_the_codecs_of_each_fitted_by_itself(
    evaluator: PlanEvaluator, settings: dict[str, Any], tmp_path: Path
) -> None:
    """With what lies there already, and in one pass over the text."""
    specs = [MIXED.only([3]), MIXED, PlanSpec.uniform(SHARE), PlanSpec.uniform("int:3")]
    evaluator.codecs.fit(specs[:1])
    evaluator.codecs.fit(specs)
    for number, spec in enumerate(specs):
        alone = evaluator_of(settings, tmp_path / str(number), plan=MIXED.table()).codecs.codecs(spec)
        together = evaluator.codecs.codecs(spec)
        assert list(together) == list(alone)
        for site, stored in together.items():
            assert (stored.key, stored.fvu) == (alone[site].key, alone[site].fvu)
            assert_same_codec(stored.codec, alone[site].codec)


def test_a_layer_swept_is_fitted_as_it_is_measured_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    """Not as in the plan of all layers: the layers before it are exact."""
    evaluator = evaluator_of(settings, tmp_path, plan=SHARE)
    table = sweep(evaluator).set_index("layer")
    base = full_pass(evaluator, {})
    plan = evaluator.workspace.plan
    for layer in range(4):
        codecs = evaluator.codecs.codecs(plan.only([layer]))
        assert table.loc[layer, "fvu_v"] == codecs[Site(layer, "v")].fvu
        measured = evaluator.nats(plan.only([layer]))
        assert measured.nats == full_pass(evaluator, {site: stored.codec for site, stored in codecs.items()})
        assert (measured.nats == base) is False
    # Layer 0 predicts from nothing but its own keys, so its codecs are those of the plan of all layers too.
    files = {path.name for path in (tmp_path / "codecs").iterdir()}
    assert len(files) == 8
    evaluator.codecs.fit([plan])
    assert len(list((tmp_path / "codecs").iterdir())) == 8 + 6


# -- in memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder to which anything could be written unasked: the working and the temporary one, empty."""
    folder = tmp_path / "nowhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    ("plan", "key_space"), [("ae:4x16", "post-rope"), (MIXED.table(), "pre-rope")], ids=["uniform", "mixed"]
)
def test_a_sweep_without_a_folder_is_the_one_with_a_folder(
    settings: dict[str, Any], tmp_path: Path, nowhere: Path, plan: Any, key_space: str
) -> None:
    changes = {"plan": plan, "codec.key_space": key_space, "fit.error_metric": "gradient"}
    held = sweep(in_memory(settings, **changes, output_dir=str(nowhere / "never")))
    assert not list(nowhere.rglob("*"))
    stored = sweep(evaluator_of(settings, tmp_path / "run", **changes))
    pd.testing.assert_frame_equal(held.drop(columns="seconds"), stored.drop(columns="seconds"), check_exact=True)


def test_a_map_and_a_comparison_without_a_folder(settings: dict[str, Any], tmp_path: Path, nowhere: Path) -> None:
    """All that is measured in memory, of look-back codecs too, is what a folder would hold."""
    held, stored = in_memory(settings), evaluator_of(settings, tmp_path / "run")
    recipes, plans = parse_recipes(["int:3", SHARE]), {"mixed": MIXED, "part": MIXED.only([1, 2])}
    tables = [
        (map_rates(each, recipes, "1-2"), compare_caches(each, plans, split="selection").drop(columns="seconds"))
        for each in (held, stored)
    ]
    for in_memory_table, on_disk in zip(*tables, strict=True):
        pd.testing.assert_frame_equal(in_memory_table, on_disk, check_exact=True)
    assert not list(nowhere.rglob("*"))
    assert (folder_of(stored) / "map.csv").is_file()


def test_memory_keeps_what_was_fitted_and_measured(
    settings: dict[str, Any], nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = in_memory(settings)
    first, codecs = evaluator.nats(MIXED, "report"), evaluator.codecs.codecs(MIXED)
    for name in ("plan_evaluator.measure_nats", "codec_store.fit_codecs", "codec_store.fit_in_context"):
        monkeypatch.setattr(f"leankv.studies.{name}", pytest.fail)
    monkeypatch.setattr("leankv.studies.activation_store.vectors_in_memory", pytest.fail)
    evaluator.codecs.forget()  # where there is no folder to read them from again, nothing is forgotten
    assert evaluator.nats(MIXED, "report") == first
    again = evaluator.codecs.codecs(MIXED)
    assert all(isinstance(stored, StoredCodec) and again[site] is stored for site, stored in codecs.items())


def test_memory_keeps_no_more_of_a_codec_than_a_file_would(settings: dict[str, Any], nowhere: Path) -> None:
    """Fitted, a codec may be a view of all principal components, or of all codecs that were fitted with it."""
    for recipe in ("pca:4", "ae:4x16", "transform:1", "share:-1"):
        for codec in in_memory(settings, plan=recipe).codecs.plan(PlanSpec.uniform(recipe).only([1, 2])).values():
            tensors = codec.state_dict().values()
            assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == codec.nbytes


def test_another_window_shares_the_codecs(settings: dict[str, Any], nowhere: Path) -> None:
    evaluator = in_memory(settings, **{"protocol.kind": "stream", "protocol.chunk": 8, "protocol.window": 6})
    wide, narrow = evaluator, evaluator.with_window(2)
    assert narrow.codecs is wide.codecs
    for each in (wide, narrow):
        assert each.nats(MIXED).nats == pytest.approx(full_pass(each, each.codecs.plan(MIXED)), rel=1e-6)
    assert wide.nats(MIXED).nats != narrow.nats(MIXED).nats
    assert wide.base() == narrow.base()
    assert replace(wide.protocol, window=2) == narrow.protocol

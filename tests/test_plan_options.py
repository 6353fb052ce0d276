"""What a search of plans chooses from: families, sites, and codecs at each context."""

import pytest

from leankv.cache.plan import PlanSpec, Site
from leankv.codecs import parse_recipe
from leankv.config.loading import load_experiment
from leankv.progress import Silent
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.plan_options import claim_of, search_recipes, search_sites
from leankv.studies.plan_search import PlanSearch
from leankv.studies.workspace import Workspace

pytestmark = pytest.mark.whole_runs


def test_layers_that_may_be_chosen_bound_a_search(search_config, tmp_path):
    experiment = load_experiment(search_config, {"output_dir": str(tmp_path / "run"), "selection.layers": "1-2"})
    workspace = Workspace.open(experiment, Silent())
    assert {site.layer for site in search_sites(workspace, experiment.selection)} == {1, 2}


def test_families_stand_for_their_rates():
    recipes = [recipe.text for recipe in search_recipes("nuq, resid(share,transform), int:5", "gradient")]
    assert recipes[:3] == ["nuq:4+1", "nuq:3+1", "nuq:2+1"]
    assert "resid(share:-2q8,transform:s0.02)" in recipes
    assert recipes[-1] == "int:5"
    by_rate = [recipe.text for recipe in search_recipes("transform", "none")]
    assert all(":s" not in text for text in by_rate)
    assert (by_rate[0], by_rate[-1]) == ("transform:4", "transform:0.25"), "from fine to coarse, as steps are"


def test_ladders_of_a_reference_do_not_depend_on_the_plan_they_stand_in(search_config, tmp_path):
    experiment = load_experiment(search_config, {"output_dir": str(tmp_path / "run")})
    evaluator = PlanEvaluator(Workspace.open(experiment, Silent()))
    search = PlanSearch(evaluator, evaluator.workspace.experiment.selection)
    sites = search_sites(evaluator.workspace, evaluator.workspace.experiment.selection)
    last = sites[-1]
    share = next(recipe for recipe in search.recipes if recipe.n_context_layers)
    alone, with_others = PlanSpec().with_sites({last: share}), PlanSpec.uniform("int:2").with_sites({last: share})
    codecs = search.evaluator.codecs
    assert codecs.key(alone, last) == codecs.key(with_others, last)
    fitted_to_itself = search.unreferenced.codecs
    assert fitted_to_itself.key(alone, last) != fitted_to_itself.key(with_others, last)
    assert codecs.key(search.reference, last) == fitted_to_itself.key(search.reference, last)
    # A plan's own codecs are counted as the options that it was put together from.
    choice = search.start(0.1)
    for minimize, memory in (("live", 0.0), ("all-in", search.space.codec_bytes(choice) + 7)):
        claim = claim_of(search.evaluator, search.plan(choice), minimize, 7)
        assert claim.size == pytest.approx(search.space.size(choice) + memory)
        assert claim.codec_bytes == search.space.codec_bytes(choice) > 0


def test_what_predicts_is_counted_as_codecs_claim_that_are_fitted_to_its_context(search_config, tmp_path):
    """Behind coarse sites they claim more than behind fine ones; at contexts that were fitted to nothing is guessed."""
    ladder = [f"resid(share:-1,transform:s{step})" for step in (0.005, 0.01, 0.02, 0.04)]
    asked = {"output_dir": str(tmp_path / "run"), "selection.recipes": ",".join(ladder), "selection.minimize": "stored"}
    evaluator = PlanEvaluator(Workspace.open(load_experiment(search_config, asked), Silent()))
    search = PlanSearch(evaluator, evaluator.workspace.experiment.selection)
    space = search.space
    checked, grows = 0, 0
    for place, reference in enumerate(ladder):
        fitted = evaluator.with_reference(PlanSpec.uniform(reference))
        for site, options in zip(space.sites, space.options, strict=True):
            (exact,) = (option for option in options if option.name == "none")
            for option in options:
                if option.name == "none":
                    continue
                claim = claim_of(fitted, PlanSpec().with_sites({site: parse_recipe(option.name)}), "stored", 0)
                level = place * (len(option.sizes) - 1) // 3
                assert claim.size == pytest.approx(space.base - exact.size + option.sizes[level])
                grows += option.sizes[-1] > 1.01 * option.sizes[0]
                checked += 1
    assert checked > 30
    assert grows > checked / 4
    assert [site for site, context in zip(space.sites, space.contexts, strict=True) if not context] == [Site(0, "k")]

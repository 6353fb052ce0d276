"""LeanKV from Python: on any loaded model and any text, with the command line's numbers, and nothing written."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import leankv
from leankv.cache.default_cache import METHOD
from leankv.cache.plan import Site
from leankv.cache.plan_checksum import checksum_of
from leankv.config.loading import load_experiment
from leankv.models.fingerprint import fingerprint
from leankv.progress import Silent
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.workspace import Workspace
from tests import tiny

BLOCK = 48


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.build("llama")


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return tiny.tokens(8, BLOCK)


@pytest.fixture(scope="module")
def other() -> torch.Tensor:
    return tiny.tokens(4, BLOCK, seed=1)


@pytest.fixture(scope="module")
def bundle(llama: Any, text: torch.Tensor) -> leankv.Bundle:
    plan = leankv.PlanSpec.uniform("transform:s0.02").with_layers([0, 1], k="int:4g8")
    return leankv.fit(plan, llama, None, text, sinks=2, window=8)


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every test of this file runs in a folder of its own; what it writes it names itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    yield
    assert {path.name for path in tmp_path.iterdir()} <= {"temporary", "asked for"}
    assert not list((tmp_path / "temporary").iterdir())


# -- fit, perplexity -------------------------------------------------------------------------------------------------


def test_a_bundle_is_of_the_plan_it_was_fitted_for(bundle: leankv.Bundle) -> None:
    expected = leankv.PlanSpec.uniform("transform:s0.02").with_layers([0, 1], k="int:4g8").resolved(4)
    assert bundle.spec == expected
    assert (bundle.sinks, bundle.window, bundle.key_space) == (2, 8, "pre-rope")


def test_the_numbers_are_those_of_a_run_in_a_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**settings, "output_dir": str(tmp_path / "asked for"), "plan": {"k": "int:4g8", "v": "transform:1"}}
    changes = {"fit.error_metric": "gradient", "codec.key_space": "auto"}
    workspace = Workspace.open(load_experiment(None, {**settings, **changes}), Silent())
    evaluator = PlanEvaluator(workspace)
    text = workspace.blocks("calibration").tokens
    model, tokenizer = workspace.loaded.model, workspace.loaded.tokenizer
    sinks = workspace.experiment.protocol.sinks
    given = leankv.PlanSpec.parse({"k": "int:4g8", "v": "transform:1"})
    bundle = leankv.fit(given, model, tokenizer, text, sinks=sinks, window=0)
    for site, codec in evaluator.codecs.plan(workspace.plan).items():
        for name, tensor in codec.state_dict().items():
            assert torch.equal(bundle.plan[site].state_dict()[name], tensor), f"{name} of {site}"
    pair = evaluator.pair(workspace.plan, "report", "report")
    report = leankv.perplexity(
        model, tokenizer, workspace.blocks("report").tokens, bundle=bundle, protocol=workspace.experiment.protocol.kind
    )
    assert report.base_ppl == pair.base.perplexity
    assert report.kl == pair.divergence.kl.value
    assert report.top1 == pair.divergence.top1.value
    assert report.ppl == pytest.approx(pair.compressed.perplexity, rel=1e-12)


def test_a_report_says_what_compressing_costs(llama: Any, other: torch.Tensor, bundle: leankv.Bundle) -> None:
    report = leankv.perplexity(llama, None, other, bundle=bundle, chunk=8)
    base = leankv.perplexity(llama, None, other, chunk=8)
    assert (base.base_ppl, base.tokens) == (report.base_ppl, 4 * (BLOCK - 1))
    assert base.ppl is base.kl is base.interval is None
    assert report.ppl is not None
    assert report.interval is not None
    assert report.delta_percent == pytest.approx(100 * (report.ppl / report.base_ppl - 1))
    assert report.interval[0] < report.delta_ppl < report.interval[1]
    assert report.divergence is not None
    assert report.divergence.kl.value == report.kl > 0
    assert report.protocol.window == bundle.window


def test_text_may_be_a_string_documents_or_blocks(llama: Any) -> None:
    tokenizer, text = tiny.tokenizer(), tiny.text(600)
    documents = text.split("\n")
    ids = torch.tensor(tokenizer(text)["input_ids"])
    blocks = ids[: len(ids) // BLOCK * BLOCK].reshape(-1, BLOCK)
    ways = [leankv.perplexity(llama, tokenizer, each, block_length=BLOCK) for each in (text, documents, blocks)]
    assert ways[0] == ways[1] == ways[2]


def test_a_plan_with_a_context_is_fitted_to_what_it_leaves(llama: Any, text: torch.Tensor, other: torch.Tensor) -> None:
    share = "resid(share:-1,transform:s0.05)"
    mixed = leankv.PlanSpec.uniform(share).with_layers([1], k="int:2g8", v="none")
    bundles = {
        name: leankv.fit(plan, llama, None, text, window=0)
        for name, plan in {"mixed": mixed, "uniform": leankv.PlanSpec.uniform(share)}.items()
    }
    assert Site(1, "v") not in bundles["mixed"].plan
    for site, same in ((Site(0, "k"), True), (Site(0, "v"), True), (Site(2, "k"), False)):
        tensors = [bundle.plan[site].state_dict() for bundle in bundles.values()]
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0]) == same, site
    report = leankv.perplexity(llama, None, other, bundle=bundles["mixed"], chunk=8)
    assert report.kl is not None
    assert 0 < report.kl < 0.1


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda model: leankv.fit("int:4", model, None, tiny.tokens(1, BLOCK)), "2 are needed"),
        (lambda model: leankv.fit("int:4", model, tiny.tokenizer(), "short"), "2 are needed"),
        (lambda model: leankv.fit("int:4", model, None, torch.zeros(3, 4)), "whole numbers of shape"),
        (lambda model: leankv.fit("nothing:4", model, None, tiny.tokens(3, BLOCK)), "not understood"),
        (lambda model: leankv.perplexity(model, None, tiny.tokens(2, BLOCK), protocol="fast"), "protocol.kind"),
        (lambda model: leankv.Cache(model, "transform:1"), "leankv.fit takes it"),
        (lambda model: leankv.fit("int:4", model.train(), None, tiny.tokens(3, BLOCK)), "call model.eval()"),
        (lambda model: leankv.perplexity(model.train(), None, tiny.tokens(3, BLOCK)), "call model.eval()"),
        (lambda model: leankv.fit("int:4", model, None, "a text"), "needs a tokenizer"),
        (lambda model: leankv.fit("int:4", model, tiny.tokenizer(), "a text", block_length=1), "at least 2"),
        (lambda model: leankv.fit("int:4", model, None, torch.full((3, 8), 400)), "token ids beyond"),
        (lambda model: leankv.capture(model, None, tiny.tokens(3, BLOCK), layers=[9]), "model's last layer"),
        (lambda model: leankv.capture(model, None, tiny.tokens(3, BLOCK), layers=[-1]), "numbers from 0 on"),
        (lambda model: leankv.Cache(model, "int:4g7"), "do not divide the width"),
        (lambda model: leankv.Cache(model, "int:4", key_space="pre_rope"), "codec.key_space"),
        (lambda model: leankv.Cache(model, "int:4", sinks=-1), "protocol.sinks"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(call: Any, named: str) -> None:
    with pytest.raises(leankv.UserError, match=named.replace("(", r"\(").replace(")", r"\)")):
        call(tiny.build("llama"))


def test_a_bundle_of_another_model_is_refused(bundle: leankv.Bundle, other: torch.Tensor) -> None:
    stranger = tiny.build("llama", seed=1)
    with pytest.raises(leankv.UserError, match="other weights"):
        leankv.perplexity(stranger, None, other, bundle=bundle)
    with pytest.raises(leankv.UserError, match="other weights"), leankv.compressed(stranger, bundle):
        pass


def test_fitting_leaves_the_model_as_it_was(llama: Any, text: torch.Tensor) -> None:
    """Under the gradient metric too, and whatever a notebook says of gradients."""
    with torch.no_grad():
        bundle = leankv.fit("ae:4x16", llama, None, text)
    assert all(parameter.grad is None for parameter in llama.parameters())
    again = leankv.fit("ae:4x16", llama, None, text)
    for site, codec in bundle.plan.items():
        assert all(
            torch.equal(tensor, again.plan[site].state_dict()[name]) for name, tensor in codec.state_dict().items()
        )


# -- generate --------------------------------------------------------------------------------------------------------


def generated(model: Any, prompt: torch.Tensor, **more: Any) -> torch.Tensor:
    mask = torch.ones_like(prompt)
    tokens: torch.Tensor = model.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, **more)
    return tokens


def test_generate_reads_the_bundle_s_cache(llama: Any, other: torch.Tensor, bundle: leankv.Bundle) -> None:
    cache = bundle.new_cache()
    tokens = generated(llama, other[:1], past_key_values=cache)
    stock = DynamicCache(config=llama.config)
    generated(llama, other[:1], past_key_values=stock)
    assert cache.get_seq_length() == stock.get_seq_length() == tokens.shape[1] - 1
    held = sum(tensor.nbytes for layer in stock.layers for tensor in (layer.keys, layer.values))
    assert cache.nbytes() < held / 2


def test_within_the_context_generate_uses_the_bundle(llama: Any, other: torch.Tensor, bundle: leankv.Bundle) -> None:
    expected = generated(llama, other[:2], past_key_values=bundle.new_cache())
    with leankv.compressed(llama, bundle) as model:
        assert torch.equal(generated(model, other[:2]), expected)
        assert torch.equal(generated(llama, other[:2]), expected), "a fresh cache each time"
        own = DynamicCache(config=llama.config)
        generated(llama, other[:2], past_key_values=own)
        assert own.get_seq_length() > 0, "a cache that is given is used"
    assert METHOD not in vars(llama)


def test_the_context_ends_with_an_error_too(llama: Any, bundle: leankv.Bundle) -> None:
    with pytest.raises(RuntimeError, match="mine"), leankv.compressed(llama, bundle):
        raise RuntimeError("mine")
    assert METHOD not in vars(llama)


def test_a_padded_batch_is_generated_as_its_rows_are(llama: Any, other: torch.Tensor, bundle: leankv.Bundle) -> None:
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), other[:1, :20]], dim=1)
    mask = (torch.arange(25) >= 5).long()[None]
    with leankv.compressed(llama, bundle):
        alone = generated(llama, other[:1, :20])[:, 20:]
        batch = llama.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, 25:]
    assert torch.equal(alone, batch)


@pytest.mark.parametrize("recipe", ["int:4g8", "rot:4", "identity"])
def test_a_cache_that_needs_no_text(llama: Any, other: torch.Tensor, recipe: str) -> None:
    cache = leankv.Cache(llama, recipe, sinks=2, window=4)
    tokens = generated(llama, other[:1], past_key_values=cache)
    assert cache.get_seq_length() == tokens.shape[1] - 1
    if recipe == "identity":
        assert torch.equal(tokens, generated(llama, other[:1]))


def test_caches_that_need_no_text_are_made_as_a_bundle_s_are(llama: Any, other: torch.Tensor) -> None:
    """Encoding as seldom, and sharing codecs; the model is run once for all of them."""
    model, runs = copy.deepcopy(llama), []
    model.register_forward_pre_hook(lambda *given: runs.append(1))
    caches = [leankv.Cache(model, "int:4g8", sinks=2, window=4, key_space="auto") for _ in range(2)]
    first = len(runs)
    caches.append(leankv.Cache(model, "int:4g8", sinks=2, window=4, key_space="auto"))
    assert len(runs) == first
    assert caches[0].plan[Site(0, "k")] is caches[2].plan[Site(0, "k")]
    bundle = leankv.fit("int:4g8", model, None, tiny.tokens(2, BLOCK), sinks=2, window=4)
    assert caches[0].encode_every == bundle.new_cache().encode_every
    for cache in caches:
        expected = generated(model, other[:1], past_key_values=bundle.new_cache())
        assert torch.equal(generated(model, other[:1], past_key_values=cache), expected)
    runs.clear()
    leankv.Cache(model.to(torch.bfloat16), "int:4g8")
    assert runs, "its tables have another dtype now"


# -- save, load ------------------------------------------------------------------------------------------------------


def test_a_bundle_comes_back_from_disk(llama: Any, other: torch.Tensor, bundle: leankv.Bundle) -> None:
    bundle.save("asked for")
    loaded = leankv.load("asked for", llama)
    assert loaded.spec == bundle.spec
    expected = generated(llama, other[:1], past_key_values=bundle.new_cache())
    assert torch.equal(generated(llama, other[:1], past_key_values=loaded.new_cache()), expected)
    assert "int:4g8" in Path("asked for/README.md").read_text(encoding="utf-8")
    with pytest.raises(leankv.UserError, match="other weights"):
        leankv.load("asked for", tiny.build("llama", seed=1))


def test_weights_are_hashed_once_and_not_for_each_cache(
    llama: Any, bundle: leankv.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle.save("asked for")
    calls = []
    monkeypatch.setattr("leankv.cache.bundle.fingerprint", lambda model: calls.append(1) or fingerprint(model))
    loaded = leankv.load("asked for", llama)
    for _ in range(3):
        loaded.new_cache()
    assert len(calls) == 1
    hashed = []
    monkeypatch.setattr("leankv.cache.bundle.checksum_of", lambda *plan: hashed.append(1) or checksum_of(*plan))
    for number in range(3):
        loaded.new_cache().save(f"asked for/saved {number}")
    assert len(hashed) == 1


# -- sweep, capture --------------------------------------------------------------------------------------------------


def test_a_sweep_in_memory_is_that_in_a_folder(llama: Any, text: torch.Tensor, other: torch.Tensor) -> None:
    asked: dict[str, Any] = {"recipe": "int:2g8", "selection_text": other, "sinks": 0}
    table = leankv.sweep(llama, None, text, **asked)
    stored = leankv.sweep(llama, None, text, **asked, folder="asked for")
    assert list(table["layer"]) == [0, 1, 2, 3]
    assert table.drop(columns="seconds").equals(stored.drop(columns="seconds"))
    cells = {path: path.stat().st_mtime_ns for path in Path("asked for/cells").glob("*.json")}
    again = leankv.sweep(llama, None, text, **asked, folder="asked for")
    assert again.equals(stored)
    assert cells == {path: path.stat().st_mtime_ns for path in Path("asked for/cells").glob("*.json")}


def test_a_folder_of_another_sweep_is_refused(llama: Any, text: torch.Tensor) -> None:
    leankv.sweep(llama, None, text, recipe="int:2g8", folder="asked for")
    with pytest.raises(leankv.UserError, match="was begun with plan int:2g8, not int:4g8"):
        leankv.sweep(llama, None, text, recipe="int:4g8", folder="asked for")


def test_a_folder_of_another_model_or_text_is_refused(llama: Any, text: torch.Tensor, other: torch.Tensor) -> None:
    def swept(model: Any = llama, text: torch.Tensor = text, selection_text: torch.Tensor = other) -> Any:
        return leankv.sweep(model, None, text, recipe="mean", selection_text=selection_text, folder="asked for")

    table = swept()
    for changed, named in (
        ({"model": tiny.build("llama", seed=1)}, "another model"),
        ({"text": tiny.tokens(8, BLOCK, seed=5)}, "another text"),
        ({"selection_text": tiny.tokens(4, BLOCK, seed=5)}, "another selection text"),
    ):
        with pytest.raises(leankv.UserError, match=f"was begun with {named} than is given now; choose another folder"):
            swept(**changed)
    assert swept().equals(table)


def test_what_is_refused_claims_no_folder(llama: Any, text: torch.Tensor) -> None:
    with pytest.raises(leankv.UserError, match="does not suit"):
        leankv.sweep(llama, None, text, recipe="pca:9999", folder="asked for")
    leankv.sweep(llama, None, text, recipe="int:2g8", layers=[0], folder="asked for")


def test_a_sweep_measures_on_text_it_was_not_fitted_to(llama: Any, text: torch.Tensor) -> None:
    table = leankv.sweep(llama, None, text, recipe="int:2g8", sinks=0)
    assert set(table["tokens"]) == {2 * (BLOCK - 1)}, "a fifth of eight blocks"
    asked: dict[str, Any] = {"recipe": "int:2g8", "sinks": 0, "selection_text": text[-2:]}
    assert list(table["ppl"]) == list(leankv.sweep(llama, None, text[:-2], **asked)["ppl"])


def test_captured_vectors_are_those_of_the_cache(llama: Any, text: torch.Tensor) -> None:
    vectors = leankv.capture(llama, None, text)
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(text[:1], past_key_values=cache)
    keys = cache.layers[3].keys.transpose(1, 2).flatten(2)[0]
    assert list(vectors) == [0, 1, 2, 3]
    assert vectors[3].k.shape == vectors[3].v.shape == (8 * BLOCK, 32)
    assert torch.equal(vectors[3].k[:BLOCK], keys)
    assert list(leankv.capture(llama, None, text, layers=[2])) == [2]
    assert leankv.capture(llama, None, tiny.tokens(40, 16), layers="3")[3].k.shape == (40 * 16, 32), "all blocks"
    assert not torch.equal(leankv.capture(llama, None, text, key_space="pre-rope")[3].k, vectors[3].k)


# -- the face --------------------------------------------------------------------------------------------------------


def test_every_name_is_there() -> None:
    for name in leankv.__all__:
        assert getattr(leankv, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        leankv.nothing  # noqa: B018


def test_plans_are_json(bundle: leankv.Bundle) -> None:
    assert leankv.PlanSpec.parse(json.loads(json.dumps(bundle.spec.table()))) == bundle.spec

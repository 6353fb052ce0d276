"""A prefix store: prompts on disk as codes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import leankv
from leankv import PrefixStore, UserError
from leankv.cache.bundle import Bundle
from leankv.cache.pages import PAGE
from leankv.cache.plan import PlanSpec
from leankv.config.experiment import ProtocolConfig
from leankv.data.blocks import Blocks
from leankv.evaluation.perplexity import exact_window, measure_nats
from leankv.storage.page_folder import PageFolder
from tests import tiny
from tests.test_encode_all import bundle_of

pytestmark = pytest.mark.whole_runs

RECIPES = ["int:4", "resid(share:-2,transform:s0.3)", "k=none v=resid(share:-1,int:3)"]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.build("llama", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def bundle(llama: Any) -> Bundle:
    return bundle_of(llama, "transform:s0.3")


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return tiny.tokens(1, length, seed=seed)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.page"))


@torch.no_grad()
def next_logits(model: Any, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of what a cache does not hold yet."""
    return model(tokens[:, cache.get_seq_length() :], past_key_values=cache).logits


@pytest.mark.parametrize(("architecture", "recipe"), tiny.with_each(RECIPES, RECIPES[1]))
def test_a_stored_prefix_costs_what_the_protocol_measures(architecture: str, tmp_path: Path, recipe: str) -> None:
    """The same nats as without a disk in between, on every architecture."""
    model = tiny.build(architecture, max_position_embeddings=2048)
    bundle = dataclasses.replace(bundle_of(model, recipe), window=10**6)  # what follows stays exact, as in the protocol
    protocol = ProtocolConfig("prefix", sinks=bundle.sinks, prefix_length=2 * PAGE, continuation=20)
    text = prompt(2 * PAGE + 20)
    measured = measure_nats(
        model, Blocks(text, "report", "random"), protocol, lambda: bundle.new_cache(window=exact_window(protocol))
    )
    store = PrefixStore(tmp_path, bundle, model)
    assert store.add(text) == 2
    cache = store.cache_for(text)
    assert cache.get_seq_length() == 2 * PAGE
    log_p = next_logits(model, cache, text)[0, :-1].float().log_softmax(dim=1)
    nats = -log_p.gather(1, text[0, 2 * PAGE + 1 :, None]).sum(dtype=torch.float64)
    assert abs(float(nats) - measured.nats[0]) / measured.tokens_per_block < 1e-6


def test_pages_that_go_while_a_prompt_is_computed_are_written_again(
    llama: Any, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process that makes room; a gap would make all that is behind it worthless."""
    store, text = PrefixStore(tmp_path, bundle, llama), prompt(3 * PAGE)
    store.add(text[:, :PAGE])
    computed = store._computed

    def meanwhile(tokens: torch.Tensor) -> Any:
        assert store.drop(None) > 0
        return computed(tokens)

    monkeypatch.setattr(store, "_computed", meanwhile)
    assert store.add(text) == 3
    assert store.stored_tokens(text) == 3 * PAGE


def test_more_sinks_than_a_page_holds_are_refused(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keeps 300 sinks exact"):
        PrefixStore(tmp_path, dataclasses.replace(bundle, sinks=300), llama)


def test_prompts_that_begin_alike_share_pages(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, bundle, llama)
    system = prompt(2 * PAGE)
    one, other = (torch.cat([system, prompt(PAGE, seed)], dim=1) for seed in (1, 2))
    assert store.add(one, "one") == 3
    assert store.add(one) == 0
    assert store.add(other, "other") == 1
    assert len(files(tmp_path)) == 4
    assert store.stored_tokens(torch.cat([system, prompt(9, 5)], dim=1)) == 2 * PAGE
    assert {(own.title, own.tokens, own.shared) for own in store.prefixes()} == {
        ("one", 3 * PAGE, 2 * PAGE),
        ("other", 3 * PAGE, 2 * PAGE),
    }
    freed = store.drop(one)
    assert freed > 0
    assert store.stored_tokens(other) == 3 * PAGE
    assert [own.title for own in store.prefixes()] == ["other"]
    assert store.drop() > 0
    assert not files(tmp_path)


def test_generation_from_a_store_is_generation_from_a_cache(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    """A whole prompt that is stored leaves its last token to compute; pages come from another process's folder too."""
    text = prompt(PAGE)
    PrefixStore(tmp_path, bundle, llama).add(text)
    cache = PrefixStore(tmp_path, bundle, llama).cache_for(text)
    assert cache.get_seq_length() == PAGE - 1
    said = llama.generate(text, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert said.shape[1] == PAGE + 8
    empty = PrefixStore(tmp_path, bundle, llama).cache_for(prompt(PAGE, seed=4))
    assert empty.get_seq_length() == 0


def test_what_a_cache_holds_in_codes_can_be_put(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    """Until the prompt is computed exactly: then those pages are made anew."""
    bundle = dataclasses.replace(bundle, window=30)
    text = prompt(3 * PAGE + 10)
    cache = bundle.new_cache()
    with torch.no_grad():
        for piece in text.split(100, dim=1):
            llama(piece, past_key_values=cache)
    store = PrefixStore(tmp_path, bundle, llama)
    assert store.put(cache, text) == 2  # of three pages, the exact window lies in the last
    assert store.put(cache, text) == 0
    assert store.cache_for(text).get_seq_length() == 2 * PAGE
    before = {path: path.read_bytes() for path in files(tmp_path)}
    assert store.add(text) == 3
    assert any(path.read_bytes() != before[path] for path in before)
    assert store.put(cache, text) == 0
    with pytest.raises(UserError, match="one row"):
        store.put(cache, text[:, :5])


@pytest.mark.parametrize("whose", ["another bundle's", "another model's", "other sinks", "no bundle's", "stock"])
def test_a_cache_of_another_bundle_is_not_put(llama: Any, bundle: Bundle, tmp_path: Path, whose: str) -> None:
    store, text = PrefixStore(tmp_path, bundle, llama), prompt(PAGE)
    cache = {
        "another bundle's": lambda: bundle_of(llama, "int:4").new_cache(),
        "another model's": lambda: dataclasses.replace(
            bundle, made_for={**bundle.made_for, "fingerprint": "0" * 64}
        ).new_cache(),
        "other sinks": lambda: bundle.new_cache(sinks=9),
        "no bundle's": lambda: leankv.Cache(llama, "int:4"),
        "stock": DynamicCache,
    }[whose]()
    with torch.no_grad():
        llama(text, past_key_values=cache)
    with pytest.raises(UserError, match="its own bundle, with its 2 sinks"):
        store.put(cache, text)
    assert not files(tmp_path)


def test_a_sliding_window_has_dropped_what_could_be_put(tmp_path: Path) -> None:
    model = tiny.build("mistral", max_position_embeddings=2048)
    bundle = bundle_of(model, "int:4")
    cache, text = bundle.new_cache(), prompt(2 * PAGE)
    with torch.no_grad():
        model(text, past_key_values=cache)
    assert PrefixStore(tmp_path, bundle, model).put(cache, text) == 0


def test_what_was_used_longest_ago_goes_first(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, bundle, llama)
    first, second, third = (prompt(2 * PAGE, seed) for seed in (1, 2, 3))
    store.add(first)
    size = sum(path.stat().st_size for path in files(tmp_path))
    store = PrefixStore(tmp_path, bundle, llama, max_bytes=int(2.1 * size))
    store.add(second)
    store.cache_for(first)
    store.add(third)
    kept = [store.stored_tokens(text) for text in (first, second, third)]
    assert kept == [2 * PAGE, 0, 2 * PAGE]
    tight = PrefixStore(tmp_path, bundle, llama, max_bytes=size // 2)
    with pytest.raises(UserError, match="raise max_bytes"):
        tight.add(prompt(2 * PAGE, 9))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= size // 2


def test_what_does_not_fit_takes_no_others_with_it(tmp_path: Path) -> None:
    """Neither pages that could make no room for it, nor the one that it was to replace."""
    pages = PageFolder(tmp_path, max_bytes=1000)
    for key in ("a", "b"):
        pages.add(key, lambda path: path.write_bytes(bytes(200)))
    pages.add("first", lambda path: path.write_bytes(bytes(500)))
    with pytest.raises(UserError, match="raise max_bytes"):
        pages.add("next", lambda path: path.write_bytes(bytes(600)), kept=["first", "next"])
    with pytest.raises(UserError, match="raise max_bytes"):
        pages.add("first", lambda path: path.write_bytes(bytes(1001)), replace=True)
    assert sorted(pages.keys()) == ["a", "b", "first"]


def test_bundles_do_not_see_each_others_pages(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    other = leankv.fit(PlanSpec.uniform("int:3"), llama, None, tiny.tokens(8, 40, seed=1), sinks=2, error_metric="none")
    text = prompt(PAGE + 5)
    PrefixStore(tmp_path, bundle, llama).add(text)
    store = PrefixStore(tmp_path, other, llama)
    assert store.stored_tokens(text) == 0
    assert store.prefixes() == []
    more_sinks = PrefixStore(tmp_path, dataclasses.replace(bundle, sinks=9), llama)
    assert more_sinks.stored_tokens(text) == 0

"""Coding whole what a cache holds exact."""

from typing import Any

import pytest
import torch

import leankv
from leankv.cache.bundle import Bundle
from leankv.cache.layers import LeanLayer
from leankv.cache.lean_cache import LeanCache
from leankv.cache.part_store import UNBOUNDED, PartStore
from leankv.cache.plan import PlanSpec, Site
from leankv.config.experiment import ProtocolConfig
from leankv.models.geometry import find_geometry
from tests import tiny
from tests.oracles import Rounding, held_tensors, plan_of

PREFIX, CONTINUATION = 18, 6  # the prefix is longer than the sliding windows of the tiny models that have one
PROTOCOL = ProtocolConfig("prefix", sinks=2, prefix_length=PREFIX, continuation=CONTINUATION)
RECIPES = ["int:4", "transform:s0.3", "resid(share:-2,transform:s0.3)", "k=int:3 v=resid(share:-1,int:3)"]


def bundle_of(model: Any, recipe: str, key_space: str = "auto") -> Bundle:
    """A plan fitted to random tokens, with two sinks."""
    parts = dict(part.split("=") for part in recipe.split()) if "=" in recipe else {"k": recipe, "v": recipe}
    return leankv.fit(
        PlanSpec.uniform(**parts),
        model,
        None,
        tiny.tokens(8, 40, seed=1),
        sinks=PROTOCOL.sinks,
        window=0,
        key_space=key_space,
        error_metric="none",
    )


def stores_of(cache: LeanCache) -> list[PartStore]:
    return [part for layer in cache.layers if isinstance(layer, LeanLayer) for part in layer.parts.values()]


@pytest.mark.parametrize(("architecture", "recipe"), tiny.with_each(RECIPES, RECIPES[2]))
def test_what_is_coded_whole_is_what_a_cache_without_a_window_codes(model: Any, recipe: str) -> None:
    """Given the same keys and values, in one go and again for those that came after; batches of two."""
    bundle = bundle_of(model, recipe)
    whole, as_they_come = bundle.new_cache(window=UNBOUNDED), bundle.new_cache(window=0)
    generator = torch.Generator().manual_seed(0)
    for tokens in (11, 0, 5):
        for layer, (heads, dim) in enumerate((own.kv_heads, own.head_dim) for own in find_geometry(model).layers):
            k, v = torch.randn(2, 2, heads, tokens, dim, generator=generator)
            if tokens:
                exact = whole.update(k, v, layer)
                as_they_come.update(k, v, layer)
                assert all(torch.equal(got[:, :, -tokens:], own) for got, own in zip(exact, (k, v), strict=True))
        whole.encode_all()  # a second time in between changes nothing
    for one, other in zip(stores_of(whole), stores_of(as_they_come), strict=True):
        assert one.window_rows is None
        assert torch.equal(one.sink_rows, other.sink_rows) if other.sink_rows is not None else one.sink_rows is None
        assert one.seen == other.seen == 16
        assert all(
            torch.equal(*each) for each in zip(one.code.whole().tensors(), other.code.whole().tensors(), strict=True)
        )
    assert whole.nbytes() == as_they_come.nbytes()
    assert not [t for t in held_tensors(whole.layers) if t.dtype == torch.float16 and t.shape[-1] == 32], "shown"


def test_a_window_is_coded_too_and_fills_again() -> None:
    """Uncompressed layers are left as they are."""
    model = tiny.build("llama")
    cache = LeanCache(model.config, {Site(1, "k"): Rounding(32)}, sinks=2, window=5)
    with torch.no_grad():
        model(tiny.tokens(1, 20), past_key_values=cache)
        before = [t.clone() for t in held_tensors(cache.layers[1].parts["v"])]
        cache.encode_all()
        assert [torch.equal(*each) for each in zip(before, held_tensors(cache.layers[1].parts["v"]), strict=True)]
        keys = cache.layers[1].parts["k"]
        assert (keys.sink_rows.shape[2], keys.code.shape[1], keys.window_rows) == (2, 18, None)
        model(tiny.tokens(1, 3), past_key_values=cache)
        assert (keys.sink_rows.shape[2], keys.code.shape[1], keys.window_rows.shape[2]) == (2, 18, 3)


def test_an_empty_cache_and_one_of_sinks_alone_have_nothing_to_code() -> None:
    model = tiny.build("llama")
    cache = LeanCache(model.config, plan_of(model, Rounding), sinks=8, window=UNBOUNDED)
    cache.encode_all()
    with torch.no_grad():
        model(tiny.tokens(1, 7), past_key_values=cache)
    cache.encode_all()
    assert cache.get_seq_length() == 7
    assert all(store.code is None and store.sink_rows is not None for store in stores_of(cache))


@pytest.mark.parametrize("recipe", ["int:4", "resid(share:-2,transform:s0.3)"])
def test_equally_padded_rows_go_on_as_they_do_alone(model: Any, recipe: str) -> None:
    """Sinks begin where the padding ends; keys are taken at their own positions."""
    bundle, padding = bundle_of(model, recipe), 6
    tokens = tiny.tokens(2, PREFIX + CONTINUATION)
    padded = torch.cat([torch.zeros(2, padding, dtype=torch.int64), tokens], dim=1)
    mask = (torch.arange(padded.shape[1]) >= padding).long().expand(2, -1)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    prefix = padding + PREFIX
    with torch.no_grad():
        alone = bundle.new_cache(window=UNBOUNDED)
        model(tokens[:, :PREFIX], past_key_values=alone)
        alone.encode_all()
        expected = model(tokens[:, PREFIX:], past_key_values=alone).logits
        cache = bundle.new_cache(mask[:, :prefix], window=UNBOUNDED)
        model(
            padded[:, :prefix],
            attention_mask=mask[:, :prefix],
            position_ids=positions[:, :prefix],
            past_key_values=cache,
        )
        cache.encode_all()
        got = model(
            padded[:, prefix:], attention_mask=mask, position_ids=positions[:, prefix:], past_key_values=cache
        ).logits
    # Codes may flip where a number lies on a border, hence a few wider differences.
    assert (got - expected).abs().median() < 1e-3

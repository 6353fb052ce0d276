"""Bytes of real caches: held, stored, at the peak of a step, and the ratios that follow."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from leankv import compiled
from leankv.cache.lean_cache import LeanCache
from leankv.cache.memory import held_bytes
from leankv.cache.plan import Plan, Site
from leankv.codecs import Codec, FitData, TrainingSettings, codec_from_tensors, parse_recipe
from leankv.evaluation.cache_bytes import PIECE, CacheBytes, codec_memory, measure_bytes
from leankv.models.geometry import find_geometry
from tests import tiny

SETTINGS = TrainingSettings(epochs=1, batch_tokens=32, learning_rate=1e-3, seed=0)
LAYERS, WIDTH = 4, 32  # of the tiny Llama


def codec(spec: str) -> Codec:
    vectors = torch.randn(1, 256, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    (fitted,) = parse_recipe(spec).fit(FitData(vectors, vectors, training=SETTINGS))
    return fitted


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.build("llama").bfloat16()


def measured(model: Any, plan: Plan, context: int, sinks: int = 0, window: int = 0) -> CacheBytes:
    def make_cache() -> LeanCache:
        return LeanCache(model.config, plan, sinks=sinks, window=window)

    return measure_bytes(model, find_geometry(model), tiny.tokens(1, context), make_cache, plan, settled=sinks + window)


def test_a_cache_counted_by_hand(llama: Any) -> None:
    """Keys of two layers in 4 float16 numbers each but for 2 sinks and a window of 5; 300 tokens, no whole pieces."""
    plan = {Site(layer, "k"): codec("pca:4") for layer in (1, 2)}
    bytes_ = measured(llama, plan, 300, sinks=2, window=5)
    vector, code = 2 * WIDTH, 2 * 4
    assert bytes_.context == 300
    assert bytes_.base == 300 * LAYERS * 2 * vector
    assert bytes_.held == bytes_.stored == 300 * 6 * vector + 2 * (7 * vector + 293 * code)
    assert bytes_.code_ratio_live == bytes_.code_ratio_stored == vector / code
    assert bytes_.base_growth == PIECE * 2 * vector  # half a fill and all of it, in whole pieces
    assert bytes_.cache_ratio == bytes_.base / bytes_.held
    assert bytes_.all_in_ratio == bytes_.base / (bytes_.held + bytes_.codecs + bytes_.peak_step)


def test_what_a_sliding_window_drops_is_not_saved() -> None:
    """After 128 tokens it still holds all, 2 exact sinks among them; after 256 it holds 139, the sinks no more."""
    model = tiny.build("gemma3", sliding_window=140).bfloat16()
    geometry = find_geometry(model)
    whole = [number for number, layer in enumerate(geometry.layers) if layer.sliding_window is None]
    assert 0 < len(whole) < len(geometry.layers)
    assert geometry.width == WIDTH
    plan = {Site(layer, "k"): codec("pca:4") for layer in range(len(geometry.layers))}
    bytes_ = measured(model, plan, 300, sinks=2, window=5)
    vector, code = 2 * WIDTH, 2 * 4
    assert bytes_.code_ratio_live == bytes_.code_ratio_stored == vector / code
    assert bytes_.base_growth == PIECE * len(whole) * vector
    windows_only = tiny.build("mistral", sliding_window=140).bfloat16()
    none = measured(windows_only, {Site(0, "k"): codec("pca:4")}, 300, sinks=2, window=5)
    assert none.code_ratio_live is none.code_ratio_stored is None
    assert none.cache_ratio is not None

    class Elsewhere(DynamicCache):
        """Holds nothing in its layers that would tell which bytes are whose."""

        def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            self.copies = {**getattr(self, "copies", {}), layer_idx: found}
            return found

    theirs = measure_bytes(model, geometry, tiny.tokens(1, 512), lambda: Elsewhere(config=model.config))
    assert theirs.code_ratio_live is theirs.code_ratio_stored is None
    assert theirs.cache_ratio is not None


def test_the_context_decides_what_is_known(llama: Any) -> None:
    """Where half a fill is still held exact, growth is not that of codes."""
    plan = {Site(0, part): codec("int:4") for part in "kv"}
    assert measured(llama, plan, 40, window=21).code_ratio_live is None
    assert measured(llama, plan, 40, window=20).code_ratio_live == pytest.approx(
        32 * 16 / codec("int:4").bits_per_token
    )
    assert measured(llama, {}, 40).code_ratio_live is None  # nothing is compressed


def test_a_codec_of_no_bytes(llama: Any) -> None:
    plan = {Site(layer, part): codec("mean") for layer in range(LAYERS) for part in "kv"}
    bytes_ = measured(llama, plan, 20)
    assert (bytes_.held, bytes_.cache_ratio, bytes_.code_ratio_live) == (0, None, None)
    assert bytes_.all_in_ratio is not None


def test_caches_of_others(llama: Any) -> None:
    """Everything of theirs is compressed; what they hold is what they store."""

    def make_cache() -> Any:
        return DynamicCache(config=llama.config)

    geometry, model = find_geometry(llama), llama
    longer = measure_bytes(model, geometry, tiny.tokens(1, 512), make_cache)  # the model's last position
    assert longer.cache_ratio == longer.code_ratio_live == longer.code_ratio_stored == 1
    assert measure_bytes(model, geometry, tiny.tokens(1, 500), make_cache).code_ratio_live is None


def test_steps_beyond_the_last_learned_position() -> None:
    model = tiny.build("gpt2").bfloat16()
    bytes_ = measure_bytes(model, find_geometry(model), tiny.tokens(1, 512), lambda: DynamicCache(config=model.config))
    assert bytes_.cache_ratio == 1


@pytest.mark.parametrize("spec", ["identity", "transform:2"])
def test_a_step_takes_what_it_decodes(llama: Any, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec's step decodes a layer's keys and values into tensors of their own; the stock one copies them to grow."""
    monkeypatch.setattr(compiled, "serves", lambda tensor: False)
    plan = {Site(layer, part): codec(spec) for layer in range(LAYERS) for part in "kv"}
    context = 500
    coded, stock = measured(llama, plan, context), measured(llama, {}, context)
    layer = 2 * context * WIDTH * 2
    assert coded.peak_step > layer
    assert layer // 2 < stock.peak_step < 2 * layer


def test_a_step_by_compiled_loops_decodes_nothing_that_is_held(llama: Any) -> None:
    plan = {Site(layer, part): codec("transform:2") for layer in range(LAYERS) for part in "kv"}
    context = 500
    assert measured(llama, plan, context).peak_step < 2 * context * WIDTH * 2 / 2


def test_memory_of_codecs_has_what_decoding_builds() -> None:
    """Parameters, and what stands beside them, each storage once; the same whether it has decoded or not."""
    fitted = codec("transform:2")
    loaded = codec_from_tensors(fitted.recipe.text, WIDTH, fitted.state_dict())
    before = codec_memory([loaded])
    loaded.decode(loaded.encode(torch.randn(3, WIDTH)))
    assert codec_memory([loaded, loaded]) == before
    # Where each integer lies; no second copy of the matrices, and no tables.
    assert loaded.nbytes < before < loaded.nbytes + 32 * WIDTH
    nested = codec("resid(pca:8,int:2)")
    assert codec_memory([nested]) >= nested.nbytes


def test_counting_leaves_the_cache_as_it_is(llama: Any) -> None:
    caches = []

    def make_cache() -> Any:
        caches.append(DynamicCache(config=llama.config))
        return caches[-1]

    bytes_ = measure_bytes(llama, find_geometry(llama), tiny.tokens(1, 30), make_cache)
    (cache,) = caches
    assert cache.get_seq_length() == 32  # two steps more
    assert held_bytes(cache) == bytes_.held * 32 // 30

"""The arithmetic of bytes against the bytes that caches really hold."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from leankv.cache.footprint import Footprint
from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import Plan, Site
from leankv.codecs import Codec, FitData, TrainingSettings, parse_recipe
from leankv.models.geometry import Geometry, LayerGeometry, find_geometry
from tests import tiny

pytestmark = pytest.mark.whole_runs

SETTINGS = TrainingSettings(epochs=1, batch_tokens=32, learning_rate=1e-3, seed=0)
BELOW_WINDOW, ABOVE_WINDOW = 9, 40  # the sliding windows of the tiny models are 12 tokens


@pytest.fixture
def model(architecture: str) -> Any:
    """A tiny model of each architecture in turn, in 16 bits."""
    return tiny.build(architecture).bfloat16()


def codec(spec: str, width: int) -> Codec:
    vectors = torch.randn(1, 32, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    (fitted,) = parse_recipe(spec).fit(FitData(vectors, vectors, training=SETTINGS))
    return fitted


def plan(geometry: Geometry, specs: dict[str, str], layers: range) -> Plan:
    return {
        Site(layer, part): codec(spec, geometry.layers[layer].width) for layer in layers for part, spec in specs.items()
    }


def footprint(geometry: Geometry, codecs: Plan, sinks: int, window: int) -> Footprint:
    bits = {site: own.bits_per_token for site, own in codecs.items()}
    return Footprint(geometry, bits, sinks, window)


@torch.no_grad()
def feed(model: Any, cache: Any, tokens: int, at_a_time: int) -> None:
    for chunk in tiny.tokens(1, tokens).split(at_a_time, dim=1):
        model(input_ids=chunk, past_key_values=cache, use_cache=True)


def take_in(geometry: Geometry, cache: LeanCache, tokens: int, at_a_time: int) -> None:
    """What a model would hand the cache; bytes do not depend on the numbers."""
    for chunk in torch.arange(tokens).split(at_a_time):
        for number, layer in enumerate(geometry.layers):
            k, v = (torch.ones(1, layer.kv_heads, len(chunk), layer.width_of(part) // layer.kv_heads) for part in "kv")
            cache.update(k.bfloat16(), v.bfloat16(), number)


@pytest.mark.parametrize("specs", [{"k": "ae:4x8", "v": "pca:3"}, {"v": "identity"}, {"k": "mean"}], ids=str)
def test_a_compressed_cache_holds_the_bytes_computed(model: Any, specs: dict[str, str]) -> None:
    geometry = find_geometry(model)
    codecs = plan(geometry, specs, range(4))
    exact_rows = [(0, 0), (4, 0), (0, 5), (4, 5), (3, 20)]
    for tokens, (sinks, window) in itertools.product((BELOW_WINDOW, ABOVE_WINDOW), exact_rows):
        expected = footprint(geometry, codecs, sinks, window).compressed_bytes(tokens)
        for at_a_time in (tokens, 7, 1):
            cache = LeanCache(model.config, codecs, sinks=sinks, window=window)
            take_in(geometry, cache, tokens, at_a_time)
            assert cache.nbytes() == expected, f"{sinks} sinks, window {window}: {at_a_time} of {tokens} at a time"


@pytest.mark.parametrize("tokens", [BELOW_WINDOW, ABOVE_WINDOW])
def test_layers_left_alone_count_in_full(model: Any, tokens: int) -> None:
    """What they hold is counted; transformers' sliding layers keep views, and so the memory behind them, for longer."""
    geometry = find_geometry(model)
    codecs = plan(geometry, {"k": "ae:4x8", "v": "ae:4x8"}, range(1, 3))
    cache = LeanCache(model.config, codecs, sinks=2, window=3)
    constants = cache.nbytes()  # stock sliding layers hold their window as a tensor
    feed(model, cache, tokens, tokens)
    for stock in (cache.layers[0], cache.layers[3]):
        stock.keys, stock.values = stock.keys.clone(), stock.values.clone()
    assert cache.nbytes() - constants == footprint(geometry, codecs, 2, 3).compressed_bytes(tokens)


def test_the_uncompressed_cache_is_the_stock_one(model: Any) -> None:
    """Fed at once, and token by token."""
    footprint, grown = Footprint(find_geometry(model), {}, 0, 0), DynamicCache(config=model.config)
    for before, tokens in itertools.pairwise((0, 1, BELOW_WINDOW, 11, 12, 13, ABOVE_WINDOW)):
        whole = DynamicCache(config=model.config)
        feed(model, whole, tokens, tokens)
        feed(model, grown, tokens - before, 1)
        for cache in (whole, grown):
            held = sum(
                states.numel() * states.element_size()
                for layer in cache.layers
                for states in (layer.keys, layer.values)
            )
            assert footprint.base_bytes(tokens) == held, tokens


@pytest.mark.parametrize("tokens", [1, BELOW_WINDOW, ABOVE_WINDOW])
def test_an_empty_plan_changes_nothing(model: Any, tokens: int) -> None:
    nothing = Footprint(find_geometry(model), {}, 4, 5)
    assert nothing.compressed_bytes(tokens) == nothing.base_bytes(tokens)
    assert nothing.cache_ratio(tokens) == 1


def leanllama(layers: range) -> Footprint:
    """80 layers of 8 heads x 128, some of them with K and V in 4 float16 numbers each."""
    geometry = Geometry((LayerGeometry(8, 128, None),) * 80)
    return Footprint(geometry, {Site(layer, part): 64 for layer in layers for part in "kv"}, 0, 0)


def test_leanllama_ratios() -> None:
    """256x in the layers compressed; 20 of 80 layers make it 1.33x for the whole cache, not 256x or 64x."""
    twenty = leanllama(range(40, 60))
    assert twenty.cache_ratio(4096) == pytest.approx(80 / (60 + 20 / 256))
    assert twenty.cache_ratio(4096) == pytest.approx(1.33, abs=0.005)
    assert leanllama(range(80)).cache_ratio(4096) == pytest.approx(256)


def test_a_cache_counted_by_hand() -> None:
    """Ten tokens of width 8: keys in 16 bits each but for 2 sinks and a window of 3, values as they are."""
    one = Footprint(Geometry((LayerGeometry(2, 4, None),)), {Site(0, "k"): 16}, sinks=2, window=3)
    assert one.base_bytes(10) == 2 * 10 * 16
    assert one.compressed_bytes(10) == 10 * 16 + 5 * 16 + 5 * 2
    assert one.cache_ratio(10) == 320 / 250


def test_a_sliding_window_counted_by_hand() -> None:
    """A window of 12 holds 11 tokens; of 4 sinks one is left after 14 tokens, and none after 15."""
    one = Footprint(Geometry((LayerGeometry(1, 8, 12),)), {Site(0, "k"): 16, Site(0, "v"): 16}, sinks=4, window=0)
    assert one.base_bytes(100) == 2 * 11 * 16
    assert one.compressed_bytes(11) == 2 * (4 * 16 + 7 * 2)
    assert one.compressed_bytes(14) == 2 * (1 * 16 + 10 * 2)
    assert one.compressed_bytes(15) == one.compressed_bytes(100) == 2 * 11 * 2


def test_codes_of_no_bytes_leave_the_other_part() -> None:
    geometry = Geometry((LayerGeometry(1, 8, None),))
    assert Footprint(geometry, {Site(0, "k"): 0}, 0, 0).cache_ratio(50) == 2


def test_keys_and_values_of_different_widths_counted_by_hand() -> None:
    """Keys of 2 heads of 4 numbers in 16 bits, values of 2 heads of 3 numbers as they are."""
    layer = LayerGeometry(2, 4, None, v_head_dim=3)
    assert [layer.width_of(part) for part in "kv"] == [8, 6]
    one = Footprint(Geometry((layer,)), {Site(0, "k"): 16}, sinks=0, window=0)
    assert one.base_bytes(10) == 10 * (16 + 12)
    assert one.compressed_bytes(10) == 10 * (2 + 12)
    assert one.geometry.bytes_per_token == 16 + 12


layer_geometries = st.builds(LayerGeometry, st.integers(1, 4), st.sampled_from([2, 8]), st.none() | st.integers(2, 30))


@st.composite
def footprints(draw: st.DrawFn) -> Footprint:
    """Any geometry under a plan whose codes are no larger than what they stand for."""
    layers = tuple(draw(st.lists(layer_geometries, min_size=1, max_size=5)))
    bits: dict[Site, float] = {}
    for layer in draw(st.sets(st.integers(0, len(layers) - 1))):
        parts = draw(st.sets(st.sampled_from("kv"), min_size=1))
        bits |= {Site(layer, part): draw(st.integers(0, 16 * layers[layer].width)) for part in sorted(parts)}
    return Footprint(Geometry(layers), bits, draw(st.integers(0, 8)), draw(st.integers(0, 8)))


@given(footprints(), st.integers(1, 100))
def test_a_smaller_code_never_makes_a_larger_cache(footprint: Footprint, tokens: int) -> None:
    assert 0 <= footprint.compressed_bytes(tokens) <= footprint.base_bytes(tokens)

"""Caches of one bundle on several devices at once. The second device is `meta`, on which tensors have no numbers."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import torch

import leankv
from leankv.cache.lean_cache import LeanCache
from leankv.cache.on_device import codec_on
from leankv.cache.plan import PlanSpec
from leankv.codecs import Codec
from leankv.models.geometry import find_geometry
from tests import tiny
from tests.oracles import Rounding, fitted_plan

META = torch.device("meta")


def fill(model: Any, cache: LeanCache, device: torch.device) -> None:
    """Keys and values of five tokens in every layer."""
    for layer, geometry in enumerate(find_geometry(model).layers):
        k, v = (torch.zeros(1, geometry.kv_heads, 5, geometry.head_dim, device=device) for _ in "kv")
        cache.update(k, v, layer)


def devices(codec: Codec) -> set[str]:
    return {tensor.device.type for tensor in codec.state_dict().values()}


@torch.no_grad()
def test_caches_of_one_plan_on_two_devices_do_not_disturb_each_other() -> None:
    model = tiny.build("llama")
    plan = fitted_plan(model)
    here, elsewhere, alone = (LeanCache(model.config, plan, sinks=1, window=2) for _ in range(3))
    first, second = tiny.tokens(2, 20).split([12, 8], dim=1)
    for chunk in (first, second):
        expected = model(chunk, past_key_values=alone).logits
    model(first, past_key_values=here)
    fill(model, elsewhere, META)
    assert torch.equal(model(second, past_key_values=here).logits, expected)
    assert all(devices(codec) == {"cpu"} for codec in plan.values())
    assert all(here.codecs[site] is codec for site, codec in plan.items()), "no copy where none is needed"
    assert all(devices(codec) == {"meta"} for codec in elsewhere.codecs.values())
    assert elsewhere.codecs.keys() == plan.keys()


def test_caches_on_one_device_share_their_codecs_as_do_their_copies() -> None:
    model = tiny.build("llama")
    plan = fitted_plan(model)
    caches = [LeanCache(model.config, plan, sinks=0, window=0) for _ in range(2)]
    for cache in caches:
        fill(model, cache, META)
    for site, codec in caches[0].codecs.items():
        assert caches[1].codecs[site] is copy.deepcopy(caches[0]).codecs[site] is codec


def test_a_cache_that_is_emptied_may_go_on_elsewhere() -> None:
    model = tiny.build("llama")
    plan = fitted_plan(model)
    cache = LeanCache(model.config, plan, sinks=0, window=0)
    fill(model, cache, META)
    cache.reset()
    fill(model, cache, torch.device("cpu"))
    assert all(cache.codecs[site] is codec for site, codec in plan.items())


def test_a_cache_that_was_saved_goes_on_wherever_keys_come(tmp_path: Path) -> None:
    """Its exact layers too."""
    model = tiny.build("llama")
    plan = PlanSpec.uniform("int:4").only([1])
    bundle = leankv.fit(plan, model, None, tiny.tokens(8, 40, seed=1), sinks=2, window=3, error_metric="none")
    cache = bundle.new_cache()
    with torch.no_grad():
        model(tiny.tokens(1, 20), past_key_values=cache)
    cache.save(tmp_path / "cache")
    back = leankv.load_cache(tmp_path / "cache", bundle)
    fill(model, back, META)
    exact = [back.layers[layer] for layer in (0, 2, 3)]
    assert {rows.device.type for layer in exact for rows in (layer.keys, layer.values)} == {"meta"}
    assert back.get_seq_length() == 25


def test_copies_live_as_long_as_their_codec() -> None:
    (codec, *_) = fitted_plan(tiny.build("llama")).values()
    there = weakref.ref(codec_on(codec, META))
    gc.collect()
    assert there() is codec_on(codec, META)
    del codec
    gc.collect()
    assert there() is None


def test_a_codec_without_tensors_is_everywhere() -> None:
    codec = Rounding(8)
    assert codec_on(codec, META) is codec

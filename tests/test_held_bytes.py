"""The ruler of bytes, and what it says of the compressed cache, for every codec in every key space."""

import gc
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from leankv.cache.layers import LeanLayer
from leankv.cache.lean_cache import LeanCache
from leankv.cache.memory import held_bytes
from leankv.cache.plan import Site
from leankv.codecs import Codec
from leankv.models.rope import KeyRotation
from tests import tiny
from tests.codec_vectors import WIDTH, fit, vectors
from tests.test_codecs import SPECS

BATCH, SINKS, WINDOW = 2, 2, 3
LAYERS = 3  # so that the last one has all that `share:-2` looks at


def seen_by_the_collector(thing: Any) -> int:
    """Bytes of all tensors that Python's garbage collector can reach from `thing`, modules and globals left out."""
    stops = (type, ModuleType, torch.nn.Module, PreTrainedConfig)
    found: dict[int, Any] = {}
    rest = [thing]
    while rest:
        own = rest.pop()
        if id(own) in found or isinstance(own, stops) or (isinstance(own, dict) and "__builtins__" in own):
            continue
        found[id(own)] = own
        rest += gc.get_referents(own)
    tensors = [own for own in found.values() if isinstance(own, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def codes_and_rows(cache: LeanCache) -> int:
    """What the layers must hold: codes as large as their numbers, sinks and window in float32."""
    total = 0
    for layer in cache.layers:
        assert isinstance(layer, LeanLayer)
        for part in layer.parts.values():
            codes = part.code.whole().tensors() if part.code is not None else []
            coded = len(part) - SINKS - (0 if part.window_rows is None else part.window_rows.shape[2])
            assert part.code is None or part.code.shape == (BATCH, coded)
            total += sum(t.numel() * t.element_size() for t in codes) + BATCH * (len(part) - coded) * WIDTH * 4
    return total


@pytest.fixture(scope="session")
def narrow() -> Any:
    """A tiny Llama whose keys are as wide as the vectors that codecs are tried on."""
    return tiny.build("llama", head_dim=WIDTH // 2, num_hidden_layers=LAYERS)


@pytest.fixture(scope="session")
def codecs() -> dict[str, Codec]:
    """spec -> a codec fitted to it."""
    train = vectors(sites=1, tokens=128)
    return {spec: fit(spec, train)[0] for spec in SPECS}


@pytest.mark.parametrize("key_space", ["post-rope", "pre-rope"])
@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_a_cache_counts_every_byte_that_it_holds(
    narrow: Any, codecs: dict[str, Codec], spec: str, key_space: str
) -> None:
    """After growth, in one piece and token by token, crop, a change of beams, and as a copy."""
    rotation = KeyRotation(narrow) if key_space == "pre-rope" else None
    plan = {Site(layer, part): codecs[spec] for layer in range(LAYERS) for part in "kv"}
    cache = LeanCache(narrow.config, plan, sinks=SINKS, window=WINDOW, rotation=rotation)
    assert cache.nbytes() == seen_by_the_collector(cache) == 0

    def check() -> None:
        assert cache.nbytes() == seen_by_the_collector(cache) == codes_and_rows(cache) > 0

    for chunk in tiny.tokens(BATCH, 12).split([9, 1, 2], dim=1):
        narrow(chunk, past_key_values=cache)
        check()
    cache.crop(-5)
    check()
    cache.reorder_cache(torch.tensor([1, 1]))
    check()
    narrow(tiny.tokens(BATCH, 3), past_key_values=cache)
    check()
    cache.reset()
    assert cache.nbytes() == seen_by_the_collector(cache) == 0


@pytest.mark.parametrize("spec", ["int:8g12", "resid(share:-2,transform:1)"])
@torch.no_grad()
def test_nothing_but_codes_grows_with_the_text(narrow: Any, codecs: dict[str, Codec], spec: str) -> None:
    """A rotation that kept tables, or a store that kept what it decoded, would."""
    rotation = KeyRotation(narrow)
    cache = LeanCache(
        narrow.config, {Site(layer, "k"): codecs[spec] for layer in range(LAYERS)}, sinks=0, window=0, rotation=rotation
    )
    for chunk in tiny.tokens(1, 300).split(100, dim=1):
        narrow(chunk, past_key_values=cache)
        rows = sum(layer.parts["v"].window_rows.nbytes for layer in cache.layers)
        codes = sum(layer.parts["k"].code.nbytes for layer in cache.layers)
        assert cache.nbytes() == rows + codes
        assert held_bytes(rotation) == 0


class Holder:
    def __init__(self) -> None:
        self.kept = torch.zeros(10)

    def method(self) -> None: ...


def closure_over(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def with_default(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    def function(kept: torch.Tensor = tensor) -> torch.Tensor:
        return kept

    return function


@pytest.mark.parametrize(
    "hide",
    [
        lambda: Holder().method,
        lambda: partial(Holder().method),
        lambda: partial(print, torch.zeros(10)),
        lambda: partial(print, end=torch.zeros(10)),
        lambda: closure_over(torch.zeros(10)),
        lambda: with_default(torch.zeros(10)),
        lambda: [torch.zeros(10)].append,
    ],
    ids=["method", "partial of a method", "partial", "keyword", "closure", "default", "built-in method"],
)
def test_tensors_that_functions_hold_are_counted(hide: Callable[[], Any]) -> None:
    assert held_bytes({"function": hide()}) == 40


def test_what_is_not_the_caches_own_is_not_counted() -> None:
    model = torch.nn.Linear(3, 3)
    assert held_bytes([model, model.forward, partial(model.forward, 1), torch, print, closure_over]) == 0

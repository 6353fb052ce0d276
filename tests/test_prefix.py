"""The protocol `prefix`: against saving a cache, reading it back and decoding; and the bytes of a prefix."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from leankv.cache.layers import LeanLayer
from leankv.cache.lean_cache import LeanCache
from leankv.cache.part_store import UNBOUNDED
from leankv.codecs import Code
from leankv.config.experiment import ProtocolConfig
from leankv.data.blocks import Blocks
from leankv.errors import UserError
from leankv.evaluation.base_pass import BasePass
from leankv.evaluation.cache_bytes import measure_bytes
from leankv.evaluation.exact_prefixes import ExactPrefixes
from leankv.evaluation.paired import PairedRun, measure_pair
from leankv.evaluation.perplexity import BlockNats, compare, measure_nats
from leankv.models.geometry import find_geometry
from leankv.storage.memory_budget import MemoryBudget
from tests import tiny
from tests.oracles import Rounding, identity_plan, plan_of
from tests.test_encode_all import CONTINUATION, PREFIX, PROTOCOL, RECIPES, bundle_of

pytestmark = pytest.mark.whole_runs


@pytest.fixture
def blocks() -> Blocks:
    """Three blocks, a few tokens longer than prefix and continuation."""
    return Blocks(tiny.tokens(3, PREFIX + CONTINUATION + 3), "report", "random tokens")


def nats(model: Any, blocks: Blocks, plan: Any, protocol: ProtocolConfig = PROTOCOL) -> BlockNats:
    return measure_nats(
        model, blocks, protocol, lambda: LeanCache(model.config, plan, sinks=protocol.sinks, window=UNBOUNDED)
    )


def per_token(measured: BlockNats) -> list[float]:
    return [own / measured.tokens_per_block for own in measured.nats]


# -- the protocol ------------------------------------------------------------------------------------------------------


def read_back(cache: LeanCache) -> LeanCache:
    """A fresh cache, made of what `serialize` gives of each part's codes and of the sinks as they are."""
    fresh = cache.fresh()
    for layer, back in zip(cache.layers, fresh.layers, strict=True):
        assert isinstance(layer, LeanLayer)
        assert isinstance(back, LeanLayer)
        back.lazy_initialization(*[torch.empty(0, dtype=layer.dtype, device=layer.device)] * 2)
        for part, store in layer.parts.items():
            other, codec = back.parts[part], store.codec
            assert codec is not None
            assert store.window_rows is None
            data = codec.serialize(store.code.whole().flatten())
            code: Code = codec.deserialize(data, store.code.shape[1])
            other.restore(store.seen, store.sink_rows, code.unflatten(1), None)
            if other.space is not None:
                other.space.begin(1)
    return fresh


@pytest.mark.parametrize(("architecture", "recipe"), tiny.with_each(RECIPES, RECIPES[2]))
def test_it_is_saving_a_cache_reading_it_back_and_decoding(model: Any, blocks: Blocks, recipe: str) -> None:
    """To 1e-6 nats, but where fewer tokens are decoded as they leave a sliding window: then the products that a codec
    predicts by have other last bits, and a context in 16 bits may move by one. The model itself runs in float64, where
    one pass over several tokens and one for each differ by nothing that could be seen."""
    bundle = bundle_of(model, recipe)
    model = model.double()
    saved: list[LeanCache] = []

    class Saving(LeanCache):
        def encode_all(self) -> None:
            super().encode_all()
            saved.append(read_back(self))

    def make_cache() -> LeanCache:
        return Saving(model.config, bundle.plan, sinks=PROTOCOL.sinks, window=UNBOUNDED, rotation=bundle.rotation)

    measured = measure_nats(model, blocks, PROTOCOL, make_cache)
    base = nats(model, blocks, {})
    slides = any(layer.sliding_window for layer in find_geometry(model).layers)
    close, tokens = 1e-4 if slides and "share" in recipe else 1e-6, CONTINUATION - 1
    for number, (block, cache) in enumerate(zip(blocks.tokens, saved, strict=True)):
        total = 0.0
        for place in range(PREFIX, PREFIX + tokens):
            with torch.no_grad():
                logits = model(block[None, [place]], past_key_values=cache).logits[0, -1].double()
            total -= float(logits.log_softmax(dim=0)[block[place + 1]])
        assert measured.nats[number] / tokens == pytest.approx(total / tokens, abs=close)
        assert abs(measured.nats[number] - base.nats[number]) / tokens > 1e-5


def test_lossless_codecs_cost_exactly_nothing(model: Any, blocks: Blocks) -> None:
    cost = compare(nats(model, blocks, {}), nats(model, blocks, identity_plan(model)))
    assert (cost.delta_ppl, cost.interval) == (0.0, (0.0, 0.0))
    assert cost.tokens == 3 * (CONTINUATION - 1)


@torch.no_grad()
def log_probabilities(model: Any, blocks: Blocks, plan: Any) -> torch.Tensor:
    """`[blocks, C - 1, V]` in float64: what the continuation's tokens but the last predict, of whole logits."""
    found = []
    for block in blocks.tokens:
        cache = LeanCache(model.config, plan, sinks=PROTOCOL.sinks, window=UNBOUNDED)
        model(block[None, :PREFIX], past_key_values=cache)
        cache.encode_all()
        rest = block[None, PREFIX : PREFIX + CONTINUATION]
        found.append(model(rest, past_key_values=cache).logits[0, :-1].double().log_softmax(dim=-1))
    return torch.stack(found)


def pair(model: Any, blocks: Blocks, plan: Any, protocol: ProtocolConfig = PROTOCOL) -> PairedRun:
    base_pass = BasePass(model, lambda: LeanCache(model.config, {}, sinks=0, window=0), MemoryBudget(1 << 30))

    def make_cache() -> LeanCache:
        return LeanCache(model.config, plan, sinks=protocol.sinks, window=UNBOUNDED)

    first = measure_pair(model, blocks, protocol, base_pass, make_cache)
    again = measure_pair(model, blocks, protocol, base_pass, make_cache)  # the base repeated from what was kept
    assert (first.base.nats, first.divergence) == (again.base.nats, again.divergence)
    return first


def test_perplexity_and_divergence_are_those_of_the_continuation_alone(model: Any, blocks: Blocks) -> None:
    plan = plan_of(model, Rounding)
    measured = pair(model, blocks, plan)
    log_p, log_q = (log_probabilities(model, blocks, own) for own in ({}, plan))
    labels = blocks.tokens[:, PREFIX + 1 : PREFIX + CONTINUATION, None]
    for run, own in ((measured.base, log_p), (measured.compressed, log_q)):
        expected = -own.gather(2, labels).mean(dim=(1, 2))
        assert per_token(run) == pytest.approx(expected.tolist(), abs=1e-5)
        assert run.tokens_per_block == CONTINUATION - 1
        assert run.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=2)
    assert measured.divergence.kl.value == pytest.approx(kl.mean().item(), abs=1e-5)
    same = (log_p.argmax(dim=2) == log_q.argmax(dim=2)).double().mean().item()
    assert measured.divergence.top1.value == pytest.approx(100 * same)
    assert measured.base.nats == nats(model, blocks, {}).nats
    assert measured.compressed.nats == nats(model, blocks, plan).nats


def test_the_base_run_is_a_plain_forward_pass(model: Any, blocks: Blocks) -> None:
    """What lies behind the continuation plays no part."""
    with torch.no_grad():
        logits = model(blocks.tokens[:, : PREFIX + CONTINUATION]).logits.double().log_softmax(dim=-1)
    labels = blocks.tokens[:, PREFIX + 1 : PREFIX + CONTINUATION]
    expected = -logits[:, PREFIX:-1].gather(2, labels[:, :, None]).mean(dim=(1, 2))
    measured = nats(model, blocks, {})
    assert per_token(measured) == pytest.approx(expected.tolist(), abs=1e-5)
    shorter = replace(blocks, tokens=blocks.tokens[:, : PREFIX + CONTINUATION])
    assert nats(model, shorter, plan_of(model, Rounding)).nats == nats(model, blocks, plan_of(model, Rounding)).nats


def test_prefixes_that_are_computed_once_give_the_same_bits(model: Any, blocks: Blocks) -> None:
    """With memory for none, and for all."""
    protocol = replace(PROTOCOL, batch_size=2)
    prefixes = [ExactPrefixes(model, MemoryBudget(memory)) for memory in (0, 1 << 30)]
    for recipe in RECIPES[1:3]:
        bundle = bundle_of(model, recipe)
        plain, *shared = (
            measure_nats(model, blocks, protocol, lambda: bundle.new_cache(window=UNBOUNDED), prefixes=own)  # noqa: B023
            for own in (None, *prefixes)
        )
        assert all(own.nats == plain.nats for own in shared)


def test_batches_of_blocks_agree_with_single_blocks(model: Any, blocks: Blocks) -> None:
    plan = plan_of(model, Rounding)
    batched = pair(model, blocks, plan, replace(PROTOCOL, batch_size=2)).compressed
    assert per_token(batched) == pytest.approx(per_token(nats(model, blocks, plan)), abs=1e-4)


def test_a_continuation_reads_itself_exactly(model: Any, blocks: Blocks) -> None:
    """A prefix of one token behind no sinks is the only thing that is coded."""
    protocol = ProtocolConfig("prefix", sinks=0, prefix_length=1, continuation=CONTINUATION)
    coded = nats(model, blocks, plan_of(model, Rounding), protocol)
    strict = measure_nats(
        model,
        replace(blocks, tokens=blocks.tokens[:, : CONTINUATION + 1]),
        ProtocolConfig("strict", sinks=0),
        lambda: LeanCache(model.config, plan_of(model, Rounding), sinks=0, window=0),
    )
    base = nats(model, blocks, {}, protocol)
    assert all(own != exact for own, exact in zip(coded.nats, base.nats, strict=True))
    assert sum(coded.nats) != pytest.approx(sum(strict.nats), abs=1e-2)


def test_blocks_that_are_too_short_are_refused(blocks: Blocks) -> None:
    model = tiny.build("llama")
    short = replace(blocks, tokens=blocks.tokens[:, : PREFIX + CONTINUATION - 1])
    asked = (
        f"prefix of {PREFIX} tokens and a continuation of {CONTINUATION} need blocks of {PREFIX + CONTINUATION} tokens"
    )
    with pytest.raises(UserError, match=f"{asked}, not"):
        nats(model, short, {})


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_a_prefix_coded_whole() -> None:
    """Keys of two layers in 4 float16 numbers each behind two sinks; all else as it is."""
    model = tiny.build("llama")
    codecs = bundle_of(model, "pca:4").plan
    plan = {site: codec for site, codec in codecs.items() if site.part == "k" and site.layer in (1, 2)}
    caches = []

    def make_cache() -> LeanCache:
        caches.append(LeanCache(model.config, plan, sinks=2, window=UNBOUNDED))
        return caches[-1]

    bytes_ = measure_bytes(model, find_geometry(model), tiny.tokens(1, 300), make_cache, plan, settled=2)
    vector, code = 4 * 32, 2 * 4
    assert bytes_.held == bytes_.stored == 300 * 6 * vector + 2 * (2 * vector + 298 * code)
    assert bytes_.stored_ratio == bytes_.cache_ratio == bytes_.base / bytes_.held
    assert bytes_.code_ratio_live == bytes_.code_ratio_stored == vector / 2 / code
    assert bytes_.context == 300
    (cache,) = caches
    exact = LeanCache(model.config, plan, sinks=2, window=UNBOUNDED)
    with torch.no_grad():
        model(tiny.tokens(1, 300), past_key_values=exact)
    exact.encode_all()
    codes = [own.layers[2].parts["k"].code.whole()["z"].float() for own in (cache, exact)]
    assert (codes[0] - codes[1]).abs().max() < 1e-2, "no key was computed beside codes of those before it"

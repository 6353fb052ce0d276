"""Perplexity against plain loops, the protocols against each other, and the paired interval against scipy."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

from leankv import UserError
from leankv.cache.lean_cache import LeanCache
from leankv.config.experiment import ProtocolConfig
from leankv.data.blocks import Blocks
from leankv.evaluation.perplexity import BlockNats, compare, feeding_of, measure_nats
from tests import tiny
from tests.oracles import Rounding, SlowCache, fitted_plan, identity_plan, plan_of

pytestmark = pytest.mark.whole_runs

PROTOCOLS = {
    "strict": ProtocolConfig("strict"),
    "stream": ProtocolConfig("stream", sinks=2, window=5, chunk=7),
    "decode": ProtocolConfig("decode", sinks=2, window=5),
}
CLOSE = 1e-4  # nats a token


@pytest.fixture
def blocks() -> Blocks:
    """Three blocks, longer than the sliding window."""
    return Blocks(tiny.tokens(3, 17), "report", "random tokens")


@pytest.fixture(params=list(PROTOCOLS))
def protocol(request: pytest.FixtureRequest) -> ProtocolConfig:
    """Each protocol in turn."""
    return PROTOCOLS[request.param]


def nats(model: Any, blocks: Blocks, protocol: ProtocolConfig, plan: Any = None, cache: Any = LeanCache) -> BlockNats:
    return measure_nats(
        model, blocks, protocol, lambda: cache(model.config, plan or {}, sinks=protocol.sinks, window=protocol.window)
    )


def per_token(measured: BlockNats) -> list[float]:
    return [own / measured.tokens_per_block for own in measured.nats]


def test_base_perplexity_is_that_of_a_plain_loop(model: Any, blocks: Blocks, protocol: ProtocolConfig) -> None:
    with torch.no_grad():
        expected = [model(input_ids=block[None], labels=block[None]).loss.item() for block in blocks.tokens]
    measured = nats(model, blocks, protocol)
    assert per_token(measured) == pytest.approx(expected, abs=CLOSE)
    assert measured.tokens_per_block == blocks.tokens.shape[1] - 1
    assert measured.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=CLOSE)


def test_identity_codecs_cost_exactly_nothing(model: Any, blocks: Blocks, protocol: ProtocolConfig) -> None:
    cost = compare(nats(model, blocks, protocol), nats(model, blocks, protocol, identity_plan(model)))
    assert cost.delta_ppl == 0.0
    assert cost.delta_percent == 0.0
    assert cost.interval == (0.0, 0.0)


def test_a_lossy_codec_costs_what_the_oracle_cache_costs(model: Any, blocks: Blocks, protocol: ProtocolConfig) -> None:
    """Attention reads decode(encode(x)) in place of x, and the figures say so."""
    plan = plan_of(model, Rounding)
    measured = nats(model, blocks, protocol, plan)
    assert per_token(measured) == pytest.approx(per_token(nats(model, blocks, protocol, plan, SlowCache)), abs=1e-6)
    base = nats(model, blocks, protocol)
    assert all(abs(got - exact) > 1e-3 for got, exact in zip(measured.nats, base.nats, strict=True))


def test_fitted_codecs_cost_what_the_oracle_cache_costs(model: Any, blocks: Blocks) -> None:
    plan = fitted_plan(model)
    measured = nats(model, blocks, PROTOCOLS["strict"], plan)
    oracle = nats(model, blocks, PROTOCOLS["strict"], plan, SlowCache)
    assert per_token(measured) == pytest.approx(per_token(oracle), abs=CLOSE)
    assert compare(nats(model, blocks, PROTOCOLS["strict"]), measured).delta_ppl != 0


@pytest.mark.parametrize("sinks", [0, 3])
def test_strict_is_decode_without_a_window(model: Any, blocks: Blocks, sinks: int) -> None:
    plan = plan_of(model, Rounding)
    strict = nats(model, blocks, ProtocolConfig("strict", sinks=sinks), plan)
    decode = nats(model, blocks, ProtocolConfig("decode", sinks=sinks), plan)
    assert per_token(strict) == pytest.approx(per_token(decode), abs=CLOSE)


@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (2, 5), (0, 14)])
def test_stream_of_single_tokens_is_decode(blocks: Blocks, sinks: int, window: int) -> None:
    for length in (2, blocks.tokens.shape[1]):
        assert feeding_of(ProtocolConfig("stream", chunk=1), length) == feeding_of(ProtocolConfig("decode"), length)
    model = tiny.build("gemma3")  # full and sliding layers
    plan = plan_of(model, Rounding)
    stream = nats(model, blocks, ProtocolConfig("stream", sinks=sinks, window=window, chunk=1), plan)
    decode = nats(model, blocks, ProtocolConfig("decode", sinks=sinks, window=window), plan)
    assert per_token(stream) == pytest.approx(per_token(decode), abs=CLOSE)


def test_a_window_as_long_as_the_block_costs_nothing(model: Any, blocks: Blocks) -> None:
    protocol = ProtocolConfig("decode", window=blocks.tokens.shape[1])
    base, measured = nats(model, blocks, protocol), nats(model, blocks, protocol, plan_of(model, Rounding))
    assert per_token(measured) == pytest.approx(per_token(base), abs=1e-6)


def test_batches_of_blocks_agree_with_single_blocks(model: Any, blocks: Blocks, protocol: ProtocolConfig) -> None:
    plan = plan_of(model, Rounding)
    single = nats(model, blocks, protocol, plan)
    batched = nats(model, blocks, replace(protocol, batch_size=2), plan)
    assert len(batched.nats) == len(single.nats) == 3
    assert per_token(batched) == pytest.approx(per_token(single), abs=CLOSE)


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    base = BlockNats((310.0, 290.5, 355.25, 301.0), tokens_per_block=100, seconds=0)
    compressed = BlockNats((322.0, 294.0, 371.5, 309.75), tokens_per_block=100, seconds=0)
    cost = compare(base, compressed)
    test = stats.ttest_rel([n / 100 for n in compressed.nats], [n / 100 for n in base.nats])
    low, high = test.confidence_interval(0.95)
    assert cost.interval == pytest.approx((cost.base_ppl * math.expm1(low), cost.base_ppl * math.expm1(high)))
    assert cost.interval[0] < cost.delta_ppl < cost.interval[1]
    assert cost.delta_ppl == pytest.approx(cost.ppl - cost.base_ppl)
    assert cost.delta_percent == pytest.approx(100 * (cost.ppl / cost.base_ppl - 1))
    assert cost.tokens == 400


def test_one_block_has_no_interval() -> None:
    cost = compare(BlockNats((10.0,), 5, 0), BlockNats((11.0,), 5, 0))
    assert cost.interval is None
    assert cost.ppl == pytest.approx(math.exp(11 / 5))


def test_progress_is_told_of_every_block(blocks: Blocks) -> None:
    model, steps = tiny.build("llama"), []
    protocol = ProtocolConfig(batch_size=2)
    measure_nats(
        model, blocks, protocol, lambda: LeanCache(model.config, {}, sinks=0, window=0), lambda: steps.append(1)
    )
    assert len(steps) == len(blocks)


def test_weights_that_are_not_numbers_are_refused(blocks: Blocks) -> None:
    model = tiny.build("llama")
    model.lm_head.weight.data[7] = math.nan
    with pytest.raises(UserError, match="block 0 of the report split is not finite"):
        nats(model, blocks, PROTOCOLS["strict"])

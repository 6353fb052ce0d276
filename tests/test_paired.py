"""Base and compressed model side by side: against log-softmax in float64, and against separate runs bit for bit."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import DynamicCache, OPTConfig, OPTForCausalLM

from leankv import UserError
from leankv.cache.lean_cache import LeanCache
from leankv.config.experiment import ProtocolConfig
from leankv.data.blocks import Blocks
from leankv.evaluation import perplexity
from leankv.evaluation.base_pass import BasePass
from leankv.evaluation.divergence import divergence_columns, divergence_of, jackknife
from leankv.evaluation.paired import PairedRun, measure_pair
from leankv.evaluation.perplexity import measure_nats
from leankv.models import logits
from leankv.report.divergence import DIVERGENCE_COLUMNS, divergence_rows
from leankv.storage.memory_budget import MemoryBudget
from tests import tiny
from tests.oracles import Rounding, identity_plan, plan_of
from tests.run_folders import evaluator_of

pytestmark = pytest.mark.whole_runs

PROTOCOLS = [
    ProtocolConfig("strict", sinks=0),
    ProtocolConfig("strict", batch_size=2),
    ProtocolConfig("stream", sinks=2, window=5, chunk=7),
    ProtocolConfig("decode", sinks=2, window=5),
]

SHORT = 16  # tokens, longer than the sliding window, for the protocol that feeds token by token


@pytest.fixture
def blocks() -> Blocks:
    """Three blocks, longer than the sliding window."""
    return Blocks(tiny.tokens(3, 29), "report", "random tokens")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces shorter than these blocks, so that there are several, and the last one is short."""
    monkeypatch.setattr(logits, "HEAD_ROWS", 12)
    monkeypatch.setattr(perplexity, "LOGIT_ROWS", 5)
    monkeypatch.setattr("leankv.evaluation.paired.LOGIT_ROWS", 5)


@pytest.fixture
def capped() -> Any:
    """A Gemma whose logits are soft-capped hard enough to change every probability."""
    return tiny.build("gemma3", final_logit_softcapping=2.0)


def caches(model: Any, plan: Any, protocol: ProtocolConfig) -> tuple[Any, Any]:
    return (
        lambda: LeanCache(model.config, {}, sinks=0, window=0),
        lambda: LeanCache(model.config, plan, sinks=protocol.sinks, window=protocol.window),
    )


def pair(model: Any, blocks: Blocks, protocol: ProtocolConfig, plan: Any) -> PairedRun:
    make_base, make_cache = caches(model, plan, protocol)
    return measure_pair(model, blocks, protocol, BasePass(model, make_base, MemoryBudget(1 << 30)), make_cache)


@torch.no_grad()
def log_probabilities(model: Any, blocks: Blocks, protocol: ProtocolConfig, make_cache: Any) -> torch.Tensor:
    """`[blocks, tokens, V]` in float64, of whole logits, one block and one chunk after the other."""
    chunk = {"strict": 29, "stream": protocol.chunk, "decode": 1}[protocol.kind]
    found = []
    for block in blocks.tokens:
        cache = make_cache()
        pieces = block[None].split(chunk, dim=1)
        found.append(torch.cat([model(piece, past_key_values=cache, use_cache=True).logits[0] for piece in pieces]))
    return torch.stack(found)[:, :-1].double().log_softmax(dim=-1)


def check_against_whole_logits(model: Any, blocks: Blocks, protocol: ProtocolConfig) -> PairedRun:
    plan = plan_of(model, Rounding)
    measured = pair(model, blocks, protocol, plan)
    log_p, log_q = (log_probabilities(model, blocks, protocol, make) for make in caches(model, plan, protocol))
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).numpy()
    labels = blocks.tokens[:, 1:, None]
    change = (log_q.exp().gather(2, labels) - log_p.exp().gather(2, labels))[..., 0].numpy()
    same = (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).numpy()
    found = measured.divergence
    assert kl.mean() > 1e-4  # so that the following says something
    assert not same.all()
    assert found.kl.value == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_median.value == pytest.approx(np.percentile(kl, 50), rel=1e-3)
    assert found.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-4)
    assert found.kl_p999 == pytest.approx(np.percentile(kl, 99.9), rel=1e-4)
    assert found.rms_dp.value == pytest.approx(100 * np.sqrt((change**2).mean()), rel=1e-4)
    assert found.top1.value == pytest.approx(100 * same.mean())
    assert found.block_kl == pytest.approx(kl.sum(axis=1), rel=1e-4)
    assert found.block_same == tuple(same.sum(axis=1))
    assert found.block_squared_dp == pytest.approx((change**2).sum(axis=1), rel=1e-4)
    nats = -log_q.gather(2, labels)[..., 0].sum(dim=1)
    assert measured.compressed.nats == pytest.approx(nats.tolist(), rel=1e-5)
    return measured


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: f"{protocol.kind}-{protocol.batch_size}")
def test_figures_are_those_of_whole_logits_and_nats_those_of_separate_runs_bit_for_bit(
    model: Any, blocks: Blocks, protocol: ProtocolConfig
) -> None:
    if protocol.kind == "decode":
        blocks = replace(blocks, tokens=blocks.tokens[:, :SHORT])
    measured = check_against_whole_logits(model, blocks, protocol)
    make = caches(model, plan_of(model, Rounding), protocol)
    base, compressed = (measure_nats(model, blocks, protocol, each) for each in make)
    assert measured.base.nats == base.nats
    assert measured.compressed.nats == compressed.nats
    assert measured.base.tokens_per_block == base.tokens_per_block


def test_soft_capping_stays_the_models_own(capped: Any, blocks: Blocks) -> None:
    check_against_whole_logits(capped, blocks, PROTOCOLS[0])


def in_short(protocol: ProtocolConfig) -> str:
    return f"{protocol.kind}, batches of {protocol.batch_size}"


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=in_short)
def test_the_base_model_runs_once_for_many_plans_and_gives_the_same_bits(model: Any, protocol: ProtocolConfig) -> None:
    """And with memory for one block, the others are run again."""
    runs_once(model, protocol, SHORT if protocol.kind == "decode" else 29)


# Token by token, every length is alike.
@pytest.mark.parametrize("length", [30, 8])
@pytest.mark.parametrize("protocol", [p for p in PROTOCOLS if p.kind != "decode"], ids=in_short)
def test_so_it_does_where_the_last_token_is_fed_alone_or_never(protocol: ProtocolConfig, length: int) -> None:
    runs_once(tiny.build("gemma3"), protocol, length)


def runs_once(model: Any, protocol: ProtocolConfig, length: int) -> None:
    blocks = Blocks(tiny.tokens(3, length), "report", "random tokens")
    make_base, make_cache = caches(model, plan_of(model, Rounding), protocol)
    expected = measure_nats(model, blocks, protocol, make_base).nats
    made: list[int] = []

    def counted() -> Any:
        made.append(1)
        return make_base()

    kept = BasePass(model, counted, MemoryBudget(1 << 30))
    first, second = (measure_pair(model, blocks, protocol, kept, make_cache) for _ in range(2))
    assert first.base.nats == second.base.nats == expected
    assert second.divergence == first.divergence
    batches = len(blocks.tokens.split(protocol.batch_size))
    assert len(made) == batches
    one_block = protocol.batch_size * length * model.config.hidden_size * 4
    short = BasePass(model, counted, MemoryBudget(one_block))
    first, second = (measure_pair(model, blocks, protocol, short, make_cache) for _ in range(2))
    assert first.base.nats == second.base.nats == expected
    assert len(made) == batches + batches + batches - 1


def test_identity_codecs_change_nothing(model: Any, blocks: Blocks) -> None:
    found = pair(model, blocks, PROTOCOLS[2], identity_plan(model)).divergence
    assert found.kl_p99 == found.kl_p999 == 0
    for figure in (found.kl, found.kl_median, found.rms_dp):
        assert figure.value == 0
        assert figure.interval == (0, 0)
    assert found.top1.value == 100
    assert found.top1.interval == (100, 100)


def test_no_more_logits_than_a_piece_are_held(model: Any, blocks: Blocks) -> None:
    """In a strict pass, where the chunk is the whole block, the head sees `HEAD_ROWS` tokens at most."""
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *call: rows.append(call[2].shape[:-1].numel()))
    protocol = ProtocolConfig("strict", batch_size=2)
    # A batch of two blocks of 28 predicted tokens in five pieces, and a single block in three.
    pieces = [12, 12, 12, 12, 8, 12, 12, 4]
    measure_nats(model, blocks, protocol, lambda: LeanCache(model.config, {}, sinks=0, window=0))
    assert rows == pieces
    pair(model, blocks, protocol, {})
    assert sorted(rows) == sorted(3 * pieces)


@torch.no_grad()
def test_models_whose_body_lies_deeper_are_cut_in_pieces_too(blocks: Blocks) -> None:
    """OPT's forward pass calls a decoder inside of its base model, and projects what comes out."""
    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=16,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    inputs = blocks.tokens[:1]
    pieces = list(logits.piecewise_logits(model, inputs, DynamicCache(config=model.config), 28))
    assert [piece.shape[1] for piece in pieces] == [12, 12, 4]
    assert torch.cat(pieces, dim=1) == pytest.approx(model(inputs).logits[:, :28], abs=1e-6)


def test_the_models_forward_pass_is_its_own_again_afterwards(model: Any, blocks: Blocks) -> None:
    with torch.no_grad():
        before = model(blocks.tokens).logits
    pair(model, blocks, PROTOCOLS[0], {})
    assert "forward" not in model.get_decoder().__dict__
    with torch.no_grad():
        assert torch.equal(model(blocks.tokens).logits, before)


def test_a_mean_has_the_interval_of_a_t_test() -> None:
    values = np.random.default_rng(0).gamma(1, size=(6, 50))
    found = jackknife(values, lambda some: float(some.mean()), 0.0)
    low, high = stats.ttest_1samp(values.mean(axis=1), 0).confidence_interval(0.95)
    assert found.interval == pytest.approx((low, high))


def test_a_root_mean_square_has_about_the_interval_of_the_delta_method() -> None:
    change = np.random.default_rng(0).normal(scale=0.02, size=(40, 500))
    found = divergence_of(change**2, change > 0, change).rms_dp
    squares = np.square(change).mean(axis=1)
    half = stats.t.ppf(0.975, 39) * squares.std(ddof=1) / math.sqrt(40) / (2 * math.sqrt(squares.mean()))
    assert found.interval is not None
    assert found.interval[1] - found.interval[0] == pytest.approx(200 * half, rel=0.02)


def test_intervals_of_the_median_hold_the_true_one_at_their_rate() -> None:
    """Blocks of tokens whose scale differs from block to block, as texts do; the truth from very many blocks."""
    rng = np.random.default_rng(1)

    def sample(blocks: int) -> Any:
        return rng.gamma(2, size=(blocks, 300)) * np.exp(rng.normal(scale=0.3, size=(blocks, 1)))

    truth = np.median(sample(10_000))
    held = 0
    for _ in range(300):
        interval = jackknife(sample(8), lambda values: float(np.median(values)), 0.0).interval
        assert interval is not None
        held += interval[0] <= truth <= interval[1]
    assert held / 300 == pytest.approx(0.95, abs=0.04)


def test_shares_stay_shares() -> None:
    same = np.ones((3, 10), dtype=bool)
    same[0, 0] = False
    zeros = np.zeros((3, 10))
    found = divergence_of(zeros, same, zeros).top1
    assert found.value == pytest.approx(100 * 29 / 30)
    assert found.interval is not None
    assert found.interval[1] == 100.0


def test_one_block_has_figures_without_intervals(blocks: Blocks) -> None:
    model = tiny.build("llama")
    measured = pair(model, blocks.take([0]), PROTOCOLS[0], plan_of(model, Rounding))
    columns = divergence_columns(measured.divergence)
    assert columns["kl"] is not None
    assert columns["kl"] > 0
    assert [name for name, value in columns.items() if value is None] == [
        name for name in DIVERGENCE_COLUMNS if name.endswith(("_low", "_high"))
    ]
    assert ["not known" in text for _, text in divergence_rows(columns)] == [True, True, False, False, True, True]


def test_a_run_is_the_same_after_json(blocks: Blocks) -> None:
    model = tiny.build("llama")
    measured = pair(model, blocks, PROTOCOLS[0], plan_of(model, Rounding))
    assert PairedRun.from_cell(json.loads(json.dumps(measured.cell()))) == measured
    assert set(measured.cell()["base"]) == {"nats", "tokens", "seconds"}, "names of stored cells"


def test_a_divergence_without_end_is_refused(blocks: Blocks) -> None:
    """A token that the base model allows and the other rules out."""

    def ruled_out(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) % 2 == 0:  # base and compressed take turns
            output[..., 319] = -math.inf
        return output

    model = tiny.build("llama")
    calls: list[int] = []
    model.lm_head.register_forward_hook(ruled_out)
    with pytest.raises(UserError, match="block 0 of the report split is not finite"):
        pair(model, blocks, PROTOCOLS[0], {})


def test_a_token_that_both_rule_out_counts_nothing(blocks: Blocks) -> None:
    """Vocabularies that are padded to a round size have such tokens."""
    model, plan = tiny.build("llama"), plan_of(tiny.build("llama"), Rounding)

    def ruled_out(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        output[..., 319] = -math.inf
        return output

    model.lm_head.register_forward_hook(ruled_out)
    assert 1e-3 < pair(model, blocks, PROTOCOLS[0], plan).divergence.kl.value < 10


@pytest.mark.parametrize("split", ["selection", "report"])
def test_pairs_are_stored(
    settings: dict[str, Any], tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = evaluator_of(settings, tmp_path, plan="int:4")
    plan, config = evaluator.workspace.plan, evaluator.workspace.loaded.model.config
    measured = evaluator.pair(plan.only([1, 2]), split, "pair")
    assert measured.base.nats == evaluator.base(split).nats
    assert measured.compressed.nats == evaluator.nats(plan.only([1, 2]), split).nats
    assert measured.divergence.kl.value > 0
    some = evaluator.pair(plan.only([1, 2]), split, "pair", block_ids=[1])
    assert some.base.nats == measured.base.nats[1:2]
    by_others = evaluator.baseline_pair(lambda: DynamicCache(config=config), {"baseline": "x"}, split, "x")
    assert by_others.divergence.kl.value == 0
    assert by_others.base.nats == measured.base.nats

    def never(*args: Any) -> None:
        raise AssertionError("what was stored is measured again")

    monkeypatch.setattr("leankv.studies.plan_evaluator.measure_pair", never)
    assert evaluator.pair(plan.only([2, 1]), split, "pair") == measured
    with pytest.raises(AssertionError):
        evaluator.pair(plan.only([1]), split, "pair")
    (cell,) = [path for path in (tmp_path / "cells").glob(f"pair-{split}-*") if "baseline" in path.read_text()]
    assert cell.stat().st_size < 8_000


def test_batches_agree_with_single_blocks(blocks: Blocks) -> None:
    model = tiny.build("llama")
    plan, protocol = plan_of(model, Rounding), ProtocolConfig("stream", sinks=2, window=5, chunk=7)
    single, batched = pair(model, blocks, protocol, plan), pair(model, blocks, replace(protocol, batch_size=2), plan)
    assert batched.divergence.block_kl == pytest.approx(single.divergence.block_kl, rel=1e-3)
    assert batched.divergence.block_same == single.divergence.block_same


def test_all_that_keep_something_share_one_budget() -> None:
    memory = MemoryBudget(100)
    states = torch.zeros(15)
    memory.charge(states)
    assert memory.left == 40
    more = torch.zeros(20)
    memory.charge(more)
    assert memory.left == 0
    del states, more
    assert memory.left == 100

"""Suffix replay gives the numbers of a full pass, bit for bit."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import Plan
from leankv.config.experiment import ModelConfig, ProtocolConfig
from leankv.data.blocks import Blocks
from leankv.evaluation.perplexity import exact_window, measure_nats
from leankv.evaluation.replay import Replay
from leankv.models.loading import load_model
from leankv.storage.files import DISK_SHARE
from leankv.storage.memory_budget import MemoryBudget
from tests import tiny
from tests.oracles import fitted_plan

pytestmark = pytest.mark.whole_runs

PROTOCOLS = [
    ProtocolConfig(kind="strict"),
    ProtocolConfig(kind="strict", sinks=2, batch_size=2),
    ProtocolConfig(kind="stream", sinks=2, window=5, chunk=7),
    ProtocolConfig(kind="prefix", sinks=2, prefix_length=20, continuation=8),
    ProtocolConfig(kind="decode", sinks=1, window=3),
]
BLOCKS = Blocks(tiny.tokens(3, 30), "selection", "random")
TWO_BLOCKS = BLOCKS.take([0, 1])
GROWING = [(), (3,), (0,), (2, 3), (1, 2), (0, 2), (0, 2, 3), (0, 1, 2), (0, 2, 3)]
"""Layers that are compressed, plan after plan."""
SHORT_BLOCKS = Blocks(tiny.tokens(2, 16), "selection", "random")
"""Longer than the sliding window, for the protocol that feeds token by token."""
MEMORY = 1 << 30


def of_layers(codecs: Plan, layers: Sequence[int]) -> Plan:
    """The codecs of these layers."""
    return {site: codec for site, codec in codecs.items() if site.layer in layers}


def lossy_plan(model: Any, layers: tuple[int, ...]) -> Plan:
    """Fitted codecs for these layers."""
    return of_layers(fitted_plan(model, dimensions=2), layers)


def full_pass(model: Any, plan: Plan, protocol: ProtocolConfig, blocks: Blocks = BLOCKS) -> tuple[float, ...]:
    """The obvious twin: every layer run, nothing remembered."""
    return measure_nats(
        model,
        blocks,
        protocol,
        # As replays do: with every vector decoded once, products are over the same rows (tests/test_decoded_once.py).
        lambda: LeanCache(model.config, plan, sinks=protocol.sinks, window=exact_window(protocol), decode_once=True),
    ).nats


def in_short(protocol: ProtocolConfig) -> str:
    return f"{protocol.kind}-{protocol.batch_size}"


@pytest.mark.parametrize("protocol", PROTOCOLS[:3], ids=in_short)
def test_every_single_layer_and_a_growing_plan_match_full_passes(
    model: Any, protocol: ProtocolConfig, tmp_path: Path
) -> None:
    match_full_passes(model, protocol, tmp_path, GROWING)


@pytest.mark.parametrize("protocol", PROTOCOLS[3:], ids=in_short)
def test_so_they_do_under_every_protocol(protocol: ProtocolConfig, tmp_path: Path) -> None:
    """Full and sliding layers; what the others' attention is makes no difference to how tokens are fed."""
    match_full_passes(tiny.build("gemma3"), protocol, tmp_path, [(), (3,), (1, 2), (0, 2), (0, 2, 3)])


def match_full_passes(model: Any, protocol: ProtocolConfig, tmp_path: Path, plans: Sequence[tuple[int, ...]]) -> None:
    blocks = SHORT_BLOCKS if protocol.kind == "decode" else BLOCKS if protocol.batch_size > 1 else TWO_BLOCKS
    replay = Replay(model, blocks, protocol, MemoryBudget(MEMORY), tmp_path)
    codecs = lossy_plan(model, (0, 1, 2, 3))
    for chosen in plans:
        plan = of_layers(codecs, chosen)
        measured = replay.measure(plan, extends_to_supersets=bool(chosen[1:]))
        assert measured.nats == full_pass(model, plan, protocol, blocks), chosen


def test_layers_before_the_first_change_are_not_run(tmp_path: Path) -> None:
    model = tiny.build("llama")
    replay = Replay(model, BLOCKS, PROTOCOLS[0], MemoryBudget(MEMORY), tmp_path)
    codecs = lossy_plan(model, (1, 2, 3))
    replay.measure(of_layers(codecs, [2]), extends_to_supersets=True)
    runs = [0] * 4
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: runs.__setitem__(number, runs[number] + 1))
    replay.measure(of_layers(codecs, [2, 3]), extends_to_supersets=True)  # grows the plan measured last
    assert runs == [0, 0, 0, 3]
    replay.measure(of_layers(codecs, [1, 2]))  # {2, 3} was left out
    assert runs == [0, 3, 3, 6]


@pytest.mark.parametrize("architecture", ["gemma3", "gpt2"])
def test_hidden_states_spill_to_files_that_vanish(model: Any, tmp_path: Path) -> None:
    replay = Replay(model, BLOCKS, PROTOCOLS[2], MemoryBudget(0), tmp_path)
    codecs = lossy_plan(model, (1, 3))
    for chosen in [(1,), (3,), (1, 3)]:
        plan = of_layers(codecs, chosen)
        assert replay.measure(plan, extends_to_supersets=True).nats == full_pass(model, plan, PROTOCOLS[2])
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny.build("gemma3")
    before = list(model.model.layers)
    replay = Replay(model, BLOCKS, PROTOCOLS[0], MemoryBudget(MEMORY), tmp_path)

    def interrupt() -> None:
        raise KeyboardInterrupt

    replay.measure({})
    with pytest.raises(KeyboardInterrupt):
        replay.measure(lossy_plan(model, (2,)), interrupt)
    assert list(model.model.layers) == before
    assert all(not layer._forward_pre_hooks for layer in before)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: f"{p.kind}-{p.batch_size}")
def test_some_blocks_in_any_order_match_a_full_pass(protocol: ProtocolConfig, tmp_path: Path) -> None:
    model = tiny.build("mistral")
    replay = Replay(model, BLOCKS, replace(protocol, batch_size=1), MemoryBudget(MEMORY), tmp_path)
    plan = lossy_plan(model, (2,))
    whole = full_pass(model, plan, replace(protocol, batch_size=1))
    assert replay.measure(plan, block_ids=[2, 0]).nats == (whole[2], whole[0])
    assert replay.measure(plan).nats == whole


@pytest.mark.parametrize("architecture", ["gemma3", "gpt2"])
@pytest.mark.parametrize("every", [2, 3])
def test_where_the_disk_is_too_small_some_layers_are_kept(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    config = model.config.get_text_config(decoder=True)
    of_all = len(model_layers := list(range(4))) * BLOCKS.tokens.numel() * config.hidden_size * 4
    usage = shutil.disk_usage(tmp_path)._replace(free=int(of_all / (every - 0.5) / DISK_SHARE))
    monkeypatch.setattr("leankv.storage.files.shutil.disk_usage", lambda folder: usage)
    replay = Replay(model, BLOCKS, PROTOCOLS[1], MemoryBudget(0), tmp_path)
    assert replay.every == every
    codecs = lossy_plan(model, tuple(model_layers))
    for chosen in [(3,), (2,), (1,), (1, 3), (1, 2, 3)]:
        plan = of_layers(codecs, chosen)
        assert replay.measure(plan, extends_to_supersets=bool(chosen[1:])).nats == full_pass(
            model, plan, PROTOCOLS[1]
        ), chosen


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: f"{p.kind}-{p.batch_size}")
def test_a_quantized_model_replays_bit_for_bit(protocol: ProtocolConfig, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "wide", tiny.build("llama", hidden_size=64))  # NF4 on the CPU wants multiples of 64
    model = load_model(ModelConfig(str(folder), device="cpu", dtype="bfloat16", load_in_4bit=True)).model
    replay = Replay(model, BLOCKS, protocol, MemoryBudget(MEMORY), tmp_path)
    codecs = lossy_plan(model, (0, 2, 3))
    for chosen in [(3,), (0,), (2,), (2, 3)]:
        plan = of_layers(codecs, chosen)
        assert replay.measure(plan, extends_to_supersets=bool(chosen[1:])).nats == full_pass(model, plan, protocol), (
            chosen
        )

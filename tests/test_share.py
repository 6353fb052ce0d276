"""Codecs that predict from earlier layers: fitted in a chain, and read in a cache, against slow twins."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from leankv.cache import LeanCache, earlier_layers
from leankv.capture import Activations, capture
from leankv.codecs import Codec, parse_spec
from leankv.codecs.share import as_context
from leankv.data import Blocks
from leankv.errors import UserError
from leankv.experiment import FitConfig, ProtocolConfig
from leankv.fit import FittedCodec, Fitting, Problem, fit_chain
from leankv.model import LoadedModel, find_geometry
from leankv.part_store import PartStore
from leankv.perplexity import measure_nats
from leankv.progress import Silent
from leankv.replay import Replay
from leankv.rope import KeyRotation
from tests import tiny
from tests.oracles import SlowChain, held_tensors

SPEC = "resid(share:-2,transform:s0.3)"
BLOCKS = Blocks(tiny.tokens(3, 40, seed=3), "selection", "random")


def loaded(model: Any) -> LoadedModel:
    return LoadedModel(model, tiny.tokenizer(), "tiny", find_geometry(model), "", {})


def rotation_of(name: str, model: Any) -> KeyRotation | None:
    return None if name == "gpt2" else KeyRotation(model)


def captured(model: Any, folder: Path, rotation: KeyRotation | None) -> Activations:
    blocks = Blocks(tiny.tokens(8, 40, seed=1), "calibration", "random")
    return capture(loaded(model), blocks, folder, range(4), 2, {}, Silent(), rotation)


def fitted(
    model: Any,
    activations: Activations,
    specs: dict[str, str],
    last: int = 3,
    sinks: int = 0,
    back: int = 2,
    memory_bytes: int = 1 << 30,
) -> dict[Problem, FittedCodec]:
    windows = [layer.window for layer in find_geometry(model).layers]
    found: dict[Problem, FittedCodec] = {}
    fit_chain(
        activations,
        {part: parse_spec(text) for part, text in specs.items()},
        {layer: earlier_layers(windows, layer, back) for layer in range(last + 1)},
        Fitting(FitConfig(), torch.float32, 0, sinks, torch.device("cpu"), memory_bytes),
        {},
        found.__setitem__,
        Silent(),
    )
    return found


def plan_of(found: dict[Problem, FittedCodec], layers: tuple[int, ...] = (0, 1, 2, 3)) -> dict[int, dict[str, Codec]]:
    plan: dict[int, dict[str, Codec]] = {}
    for (layer, part), own in found.items():
        if layer in layers:
            plan.setdefault(layer, {})[part] = own.codec
    return plan


@torch.no_grad()
def logits(model: Any, cache: Any, tokens: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    return torch.cat([model(piece, past_key_values=cache).logits for piece in tokens.split(chunks, dim=1)], dim=1)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize(
    ("sinks", "window", "chunks"),
    [(0, 0, [11]), (2, 3, [5, 4, 1, 1]), (1, 0, [4, 7])],
    ids=["strict", "stream", "sink"],
)
@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (3,)], ids=["all", "one"])
def test_a_chain_of_codecs_reads_as_its_oracle_does(
    name: str, tmp_path: Path, sinks: int, window: int, chunks: list[int], layers: tuple[int, ...]
) -> None:
    """Uncompressed layers that are looked at included; a batch of two; what is shown to readers is gone afterwards."""
    model = tiny.build(name)
    rotation = rotation_of(name, model)
    plan = plan_of(fitted(model, captured(model, tmp_path / "a", rotation), {"k": SPEC, "v": SPEC}), layers)
    tokens = tiny.tokens(2, 11, seed=7)
    cache = LeanCache(model.config, plan, sinks, window, rotation=rotation)
    slow = SlowChain(model.config, plan, sinks, window, rotation)
    expected = logits(model, slow, tokens, chunks)
    first = logits(model, cache, tokens, chunks)
    # Other shapes of products have other last bits, and where such a number lies between two of float16, a context
    # moves by one. A few such moves change the median by less than this; one in every number changes it by 0.04.
    assert (first - expected).abs().median() < 2e-3
    held = cache.nbytes()
    cache.reset()
    again = logits(model, cache, tokens, chunks)
    assert torch.equal(again, first)
    assert cache.nbytes() == held
    codes = [t for layer in plan for part in cache.layers[layer].parts.values() for t in held_tensors(part)]
    assert all(t.dtype in (torch.uint8, model.dtype) for t in codes)


@pytest.mark.parametrize("parts", [("k", "v"), ("v",)])
def test_what_readers_need_takes_16_bits_and_is_gone_after_the_step(
    parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers before and a layer's own keys at the most; nothing for layers that none looks at."""
    model = tiny.build("llama", num_hidden_layers=6)
    rotation = KeyRotation(model)
    activations = capture(loaded(model), BLOCKS, tmp_path / "a", range(6), 2, {}, Silent(), rotation)
    plan = plan_of(fitted(model, activations, dict.fromkeys(parts, SPEC), last=5), tuple(range(6)))
    cache = LeanCache(model.config, plan, rotation=rotation)
    held: list[tuple[int, int]] = []
    read = PartStore.read

    def watched(store: PartStore, like: torch.Tensor) -> torch.Tensor:
        # Codes of all that came before, and 16-bit context of the layers that are still to be looked at.
        wide = {id(t): t for t in held_tensors(cache.layers) if t.dtype == torch.float16 and t.shape[-1] == 32}
        held.append((len(wide), sum(t.untyped_storage().nbytes() for t in wide.values())))
        return read(store, like)

    monkeypatch.setattr(PartStore, "read", watched)
    logits(model, cache, tiny.tokens(2, 24), [20, 4])
    assert not [t for t in held_tensors(cache.layers) if t.shape[-1:] == (32,)]
    assert max(stores for stores, _ in held) == 5
    assert max(size for _, size in held) == 5 * 2 * 24 * 32 * 2


def test_a_padded_beam_search_through_a_chain_of_values_only(tmp_path: Path) -> None:
    model = tiny.build("llama")
    rotation = KeyRotation(model)
    plan = plan_of(fitted(model, captured(model, tmp_path / "a", rotation), {"v": "resid(share:-2,identity)"}))
    tokens, mask = tiny.tokens(2, 11), torch.ones(2, 11, dtype=torch.int64)
    tokens[0, :4], mask[0, :4] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3}
    expected = model.generate(tokens, past_key_values=DynamicCache(config=model.config), **settings)
    lean = LeanCache(model.config, plan, 1, 2, mask, rotation=rotation)
    assert torch.equal(model.generate(tokens, past_key_values=lean, **settings), expected)


def test_a_codec_is_fitted_to_the_layers_that_it_looks_at_itself(tmp_path: Path) -> None:
    """Though the other part's codecs look at more."""
    model = tiny.build("llama")
    activations = captured(model, tmp_path / "a", None)
    alone, beside = (fitted(model, activations, {"v": "share:-1"}, back=back) for back in (1, 2))
    for problem, own in alone.items():
        for name, tensor in own.codec.state_dict().items():
            assert torch.equal(beside[problem].codec.state_dict()[name], tensor)


def test_a_chain_decoded_in_pieces_reads_as_decoded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    rotation = KeyRotation(model)
    plan = plan_of(fitted(model, captured(model, tmp_path / "a", rotation), {"k": SPEC, "v": SPEC}))
    tokens = tiny.tokens(2, 30, seed=7)
    expected = logits(model, LeanCache(model.config, plan, 2, 3, rotation=rotation), tokens, [25, 5])
    monkeypatch.setattr(
        "leankv.part_store.PIECE", 24
    )  # from 24 tokens at a time in the first layer to 4 in the last ones
    got = logits(model, LeanCache(model.config, plan, 2, 3, rotation=rotation), tokens, [25, 5])
    assert (got - expected).abs().median() < 2e-3  # as above


def test_contexts_beyond_float16_stay_finite() -> None:
    assert as_context(torch.tensor([1e6, -1e38, 3.0])).tolist() == [65504, -65504, 3]


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (2,), (1, 3)])
def test_replay_runs_the_layers_that_are_looked_at(tmp_path: Path, layers: tuple[int, ...]) -> None:
    model = tiny.build("llama")
    rotation = KeyRotation(model)
    plan = plan_of(fitted(model, captured(model, tmp_path / "a", rotation), {"k": SPEC, "v": SPEC}), layers)
    protocol = ProtocolConfig("stream", 2, 4, 16)
    cache = LeanCache(model.config, plan, 2, 4, rotation=rotation)
    replay = Replay(model, BLOCKS, protocol, 1 << 30, tmp_path, rotation)
    expected = measure_nats(model, BLOCKS, protocol, cache.fresh).nats
    assert replay.measure(plan).nats == expected
    without_the_last = {layer: plan[layer] for layer in layers[:-1]}
    replay.measure(without_the_last, may_grow=True)
    assert replay.measure(plan).nats == expected


def test_codecs_are_fitted_beside_what_the_layers_before_give(tmp_path: Path) -> None:
    """The regression of each layer on decoded vectors, by the library; and a part without a codec is read exact."""
    model = tiny.build("llama")
    activations = captured(model, tmp_path / "a", None)
    found = fitted(model, activations, {"v": "resid(share:-1,int:3)"})
    rows = 7 * 40  # the last of the eight blocks is held out
    for layer in (1, 3):
        codec: Any = found[layer, "v"].codec
        before: Any = found[layer - 1, "v"].codec
        assert (layer, "k") not in found
        decoded = activations.read(layer - 1, "v")
        if layer == 1:  # the only layer whose predecessor looks at nothing but its own keys
            own = activations.read(0, "k").half()
            decoded = before.decode_beside(before.encode_beside(decoded, own), own)
            reference = torch.cat([own, decoded.half(), activations.read(1, "k").half()], dim=1)[:rows].float()
            x = activations.read(1, "v")[:rows]
            centred = (reference - reference.mean(dim=0)).double()
            expected = torch.linalg.lstsq(centred, (x - x.mean(dim=0)).double()).solution
            predicted = codec.first.decode_beside(codec.first.encode(x), reference)
            torch.testing.assert_close(predicted, (centred @ expected).float() + x.mean(dim=0), rtol=0.02, atol=0.02)


def test_a_chain_up_to_a_layer_does_not_depend_on_those_behind_it(tmp_path: Path) -> None:
    model = tiny.build("llama")
    activations = captured(model, tmp_path / "a", None)
    short, whole = (fitted(model, activations, {"k": SPEC, "v": SPEC}, last) for last in (1, 3))
    for problem, own in short.items():
        for name, tensor in own.codec.state_dict().items():
            assert torch.equal(whole[problem].codec.state_dict()[name], tensor)


def test_a_chain_keeps_to_the_memory_budget_or_names_the_least_that_works(tmp_path: Path) -> None:
    model = tiny.build("llama")
    activations = captured(model, tmp_path / "a", None)
    with pytest.raises(UserError, match="--memory-budget") as refused:
        fitted(model, activations, {"k": SPEC, "v": SPEC}, memory_bytes=100_000)
    least = round(1e9 * float(str(refused.value).rpartition(" ")[2]))
    assert least > 8 * 40 * 32 * 2 * 5, "five parts of context, at the very least"
    fitted(model, activations, {"k": SPEC, "v": SPEC}, memory_bytes=least)
    with pytest.raises(UserError, match="--memory-budget"):
        fitted(model, activations, {"k": SPEC, "v": SPEC}, memory_bytes=least - 2000)


def test_layers_with_another_window_are_passed_over() -> None:
    windows = [12, 12, None, 12, None]
    assert [earlier_layers(windows, layer, 2) for layer in range(5)] == [[], [0], [], [1, 0], [2]]

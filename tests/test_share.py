"""Codecs that predict from earlier layers: fitted given what a plan leaves of those, and read in a cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from leankv.cache.lean_cache import LeanCache
from leankv.cache.part_store import PartStore
from leankv.cache.plan import Plan, PlanSpec, Site
from leankv.calibration.activations import Activations
from leankv.calibration.capture import capture
from leankv.calibration.fit import FittedCodec, Fitting
from leankv.calibration.fit_in_context import SiteInContext, fit_in_context
from leankv.codecs import Codec, FitData, TrainingSettings, parse_recipe
from leankv.codecs.share import as_context
from leankv.config.experiment import FitConfig, ProtocolConfig
from leankv.data.blocks import Blocks
from leankv.errors import UserError
from leankv.evaluation.perplexity import measure_nats
from leankv.evaluation.replay import Replay
from leankv.models.geometry import find_geometry
from leankv.models.loading import LoadedModel
from leankv.models.rope import KeyRotation
from leankv.models.structure import earlier_layers
from leankv.progress import Silent
from leankv.storage.memory_budget import MemoryBudget
from tests import tiny
from tests.oracles import SlowChain, held_tensors

pytestmark = pytest.mark.whole_runs

SPEC = "resid(share:-2,transform:s0.3)"
SHARED = "resid(share:-1,int:3)"
BLOCKS = Blocks(tiny.tokens(3, 40, seed=3), "selection", "random")


def loaded(model: Any) -> LoadedModel:
    return LoadedModel(model, tiny.tokenizer(), "tiny", find_geometry(model), "", {})


def rotation_of(name: str, model: Any) -> KeyRotation | None:
    return None if name == "gpt2" else KeyRotation(model)


def captured(model: Any, folder: Path, rotation: KeyRotation | None) -> Activations:
    blocks = Blocks(tiny.tokens(8, 40, seed=1), "calibration", "random")
    return capture(loaded(model), blocks, folder, range(4), 2, {}, Silent(), rotation)


def context_of(model: Any, spec: PlanSpec, site: Site) -> list[Site]:
    """The sites that a plan's recipe for `site` predicts from."""
    recipe, windows = spec[site], [layer.sliding_window for layer in find_geometry(model).layers]
    if recipe is None or not recipe.n_context_layers:
        return []
    layers = earlier_layers(windows, site.layer, recipe.n_context_layers)
    return [Site(layer, part) for layer in layers for part in "kv"] + [Site(site.layer, "k")] * (site.part == "v")


def fitted(
    model: Any,
    activations: Activations,
    spec: PlanSpec,
    layers: int = 4,
    memory_bytes: int = 1 << 30,
    known: Plan | None = None,
) -> dict[Site, FittedCodec]:
    """The codecs of a plan's sites in the first `layers` layers; those that are `known` are fitted already."""
    found: dict[Site, FittedCodec] = {}
    fit_in_context(
        activations,
        {
            site: SiteInContext(spec[site], (known or {}).get(site), context_of(model, spec, site))
            for site in (Site(layer, part) for layer in range(layers) for part in "kv")
        },
        Fitting(FitConfig(), torch.float32, 0, 0, torch.device("cpu"), memory_bytes),
        {},
        found.__setitem__,
    )
    return found


def plan_of(found: dict[Site, FittedCodec]) -> dict[Site, Codec]:
    return {site: own.codec for site, own in found.items()}


def same_tensors(one: FittedCodec, other: FittedCodec) -> bool:
    tensors, others = one.codec.state_dict(), other.codec.state_dict()
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


@torch.no_grad()
def logits(model: Any, cache: Any, tokens: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    return torch.cat([model(piece, past_key_values=cache).logits for piece in tokens.split(chunks, dim=1)], dim=1)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (3,)], ids=["all", "one"])
def test_a_chain_of_codecs_reads_as_its_oracle_does(name: str, tmp_path: Path, layers: tuple[int, ...]) -> None:
    """Uncompressed layers that are looked at included; a batch of two; what is shown to readers is gone afterwards.

    As in a strict pass, in a stream, and behind a sink.
    """
    model = tiny.build(name)
    rotation = rotation_of(name, model)
    spec = PlanSpec.uniform(SPEC).only(layers)
    plan = plan_of(fitted(model, captured(model, tmp_path / "a", rotation), spec))
    tokens = tiny.tokens(2, 11, seed=7)
    for sinks, window, chunks in ((0, 0, [11]), (2, 3, [5, 4, 1, 1]), (1, 0, [4, 7])):
        cache = LeanCache(model.config, plan, sinks=sinks, window=window, rotation=rotation)
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
        held_parts = [t for layer in layers for part in cache.layers[layer].parts.values() for t in held_tensors(part)]
        codes = [t for t in held_parts if t.nbytes]
        assert all(t.dtype in (torch.uint8, model.dtype) for t in codes)


@pytest.mark.parametrize("parts", [("k", "v"), ("v",)])
def test_what_readers_need_takes_16_bits_and_is_gone_after_the_step(
    parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers before and a layer's own keys at the most; nothing for layers that none looks at."""
    model = tiny.build("llama", num_hidden_layers=6)
    rotation = KeyRotation(model)
    activations = capture(loaded(model), BLOCKS, tmp_path / "a", range(6), 2, {}, Silent(), rotation)
    plan = plan_of(fitted(model, activations, PlanSpec.uniform(SPEC).only(range(6), parts), layers=6))
    cache = LeanCache(model.config, plan, sinks=0, window=0, rotation=rotation)
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
    spec = PlanSpec.uniform(v="resid(share:-2,identity)")
    plan = plan_of(fitted(model, captured(model, tmp_path / "a", rotation), spec))
    tokens, mask = tiny.tokens(2, 11), torch.ones(2, 11, dtype=torch.int64)
    tokens[0, :4], mask[0, :4] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3}
    expected = model.generate(tokens, past_key_values=DynamicCache(config=model.config), **settings)
    lean = LeanCache(model.config, plan, sinks=1, window=2, attention_mask=mask, rotation=rotation)
    assert torch.equal(model.generate(tokens, past_key_values=lean, **settings), expected)


def upstream(model: Any, spec: PlanSpec, site: Site) -> set[Site]:
    """The sites that a site's codec was fitted to, directly and through others."""
    own = context_of(model, spec, site)
    return {*own, *(further for source in own for further in upstream(model, spec, source))}


MIXED = (
    PlanSpec.uniform(k="int:3", v=SHARED)
    .with_layers([1], k="none")
    .with_layers([2], v="pca:4")
    .with_layers([3], k="share:-2")
)
"""Integers, components, exact keys, and codecs that predict from one layer and from two."""


@pytest.mark.parametrize(("layers", "spec"), [(3, PlanSpec.uniform(SHARED)), (4, MIXED)], ids=["uniform", "mixed"])
def test_a_codec_depends_on_the_plan_s_sites_upstream_and_on_nothing_else(
    tmp_path: Path, layers: int, spec: PlanSpec
) -> None:
    model = tiny.build("llama")
    activations = captured(model, tmp_path / "a", None)
    before = fitted(model, activations, spec, layers)
    for changed in (Site(layer, part) for layer in range(layers) for part in "kv"):
        recipe = None if changed.layer % 2 and spec[changed] is not None else parse_recipe("int:2")
        after = fitted(model, activations, spec.with_sites({changed: recipe}), layers)
        for site in (before.keys() & after.keys()) - {changed}:
            depends = changed in upstream(model, spec, site)
            assert same_tensors(before[site], after[site]) != depends, (site, changed, recipe)


def test_codecs_that_are_fitted_already_serve_as_context(tmp_path: Path) -> None:
    """Those behind them are the same as if all had been fitted together, and none is fitted again."""
    model = tiny.build("llama")
    activations = captured(model, tmp_path / "a", None)
    whole = fitted(model, activations, MIXED)
    known = {site: codec for site, codec in plan_of(whole).items() if site.layer < 2}
    rest = fitted(model, activations, MIXED, known=known)
    assert rest.keys() == whole.keys() - known.keys()
    assert all(same_tensors(own, whole[site]) for site, own in rest.items())


def test_alone_a_codec_is_fitted_to_exact_vectors(tmp_path: Path) -> None:
    """In 16 bits, as a cache shows them; and not to what another plan leaves of them."""
    model = tiny.build("llama")
    activations = captured(model, tmp_path / "a", None)
    found = fitted(model, activations, PlanSpec.uniform(SHARED).only([3]))
    assert set(found) == {Site(3, "k"), Site(3, "v")}
    rows = 7 * 40  # the last of the eight blocks is held out
    x = activations.read(3, "k")[None]
    context = torch.cat([activations.read(2, "k"), activations.read(2, "v")], dim=1).half()[None]
    training = TrainingSettings(epochs=1, batch_tokens=32, learning_rate=1e-2, seed=0)
    data = FitData(
        x[:, :rows], x[:, rows:], context=context[:, :rows], heldout_context=context[:, rows:], training=training
    )
    (expected,) = parse_recipe(SHARED).fit(data)
    own = found[Site(3, "k")].codec.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in expected.state_dict().items())
    whole = fitted(model, activations, PlanSpec.uniform(SHARED))
    assert not same_tensors(whole[Site(3, "k")], found[Site(3, "k")])


def test_a_chain_decoded_in_pieces_reads_as_decoded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    rotation = KeyRotation(model)
    plan = plan_of(fitted(model, captured(model, tmp_path / "a", rotation), PlanSpec.uniform(SPEC)))
    tokens = tiny.tokens(2, 30, seed=7)
    expected = logits(model, LeanCache(model.config, plan, sinks=2, window=3, rotation=rotation), tokens, [25, 5])
    monkeypatch.setattr(
        "leankv.cache.part_store.PIECE", 24
    )  # from 24 tokens at a time in the first layer to 4 in the last ones
    got = logits(model, LeanCache(model.config, plan, sinks=2, window=3, rotation=rotation), tokens, [25, 5])
    assert (got - expected).abs().median() < 2e-3  # as above


def test_contexts_beyond_float16_stay_finite() -> None:
    assert as_context(torch.tensor([1e6, -1e38, 3.0])).tolist() == [65504, -65504, 3]


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (2,), (1, 3)])
def test_replay_runs_the_layers_that_are_looked_at(tmp_path: Path, layers: tuple[int, ...]) -> None:
    model = tiny.build("llama")
    rotation = KeyRotation(model)
    spec = PlanSpec.uniform(SPEC).only(layers)
    plan = plan_of(fitted(model, captured(model, tmp_path / "a", rotation), spec))
    protocol = ProtocolConfig("stream", 2, 4, 16)
    cache = LeanCache(model.config, plan, sinks=2, window=4, rotation=rotation)
    replay = Replay(model, BLOCKS, protocol, MemoryBudget(1 << 30), tmp_path, rotation)
    expected = measure_nats(model, BLOCKS, protocol, cache.fresh).nats
    assert replay.measure(plan).nats == expected
    without_the_last = {site: codec for site, codec in plan.items() if site.layer in layers[:-1]}
    replay.measure(without_the_last, extends_to_supersets=True)
    assert replay.measure(plan).nats == expected


def test_codecs_are_fitted_given_what_the_layers_before_decode_to(tmp_path: Path) -> None:
    """The regression of each layer on decoded vectors, by the library; and a part without a codec is read exact."""
    model = tiny.build("llama")
    activations = captured(model, tmp_path / "a", None)
    found = fitted(model, activations, PlanSpec.uniform(v=SHARED))
    rows = 7 * 40  # the last of the eight blocks is held out
    for layer in (1, 3):
        codec: Any = found[Site(layer, "v")].codec
        before: Any = found[Site(layer - 1, "v")].codec
        assert Site(layer, "k") not in found
        decoded = activations.read(layer - 1, "v")
        if layer == 1:  # the only layer whose predecessor looks at nothing but its own keys
            own = activations.read(0, "k").half()
            decoded = before.decode(before.encode(decoded, own), own)
            context = torch.cat([own, decoded.half(), activations.read(1, "k").half()], dim=1)[:rows].float()
            x = activations.read(1, "v")[:rows]
            centred = (context - context.mean(dim=0)).double()
            expected = torch.linalg.lstsq(centred, (x - x.mean(dim=0)).double()).solution
            predicted = codec.first.decode(codec.first.encode(x), context)
            torch.testing.assert_close(predicted, (centred @ expected).float() + x.mean(dim=0), rtol=0.02, atol=0.02)


def test_a_chain_up_to_a_layer_does_not_depend_on_those_behind_it(tmp_path: Path) -> None:
    model = tiny.build("llama")
    activations = captured(model, tmp_path / "a", None)
    short, whole = (fitted(model, activations, PlanSpec.uniform(SPEC), layers) for layers in (2, 4))
    assert len(short) == 4
    assert all(same_tensors(own, whole[site]) for site, own in short.items())


def test_a_chain_keeps_to_the_memory_budget_or_names_the_least_that_works(tmp_path: Path) -> None:
    model = tiny.build("llama")
    activations = captured(model, tmp_path / "a", None)
    with pytest.raises(UserError, match="--memory-budget") as refused:
        fitted(model, activations, PlanSpec.uniform(SPEC), memory_bytes=100_000)
    least = round(1e9 * float(str(refused.value).rpartition(" ")[2]))
    assert least > 8 * 40 * 32 * 2 * 5, "five parts of context, at the very least"
    fitted(model, activations, PlanSpec.uniform(SPEC), memory_bytes=least)
    with pytest.raises(UserError, match="--memory-budget"):
        fitted(model, activations, PlanSpec.uniform(SPEC), memory_bytes=least - 2000)


def test_layers_with_another_window_are_passed_over() -> None:
    windows = [12, 12, None, 12, None]
    assert [earlier_layers(windows, layer, 2) for layer in range(5)] == [[], [0], [], [1, 0], [2]]

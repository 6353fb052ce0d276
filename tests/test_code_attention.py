"""Attention over codes says what attention over rebuilt keys and values says: every architecture, codec, key space."""

import copy
import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import transformers

from leankv.cache.code_attention import NAME, attention_over_codes, code_attention
from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import PlanSpec
from leankv.cache.reading import Keys, LayerReading, Values
from leankv.codecs import parse_recipe
from leankv.errors import UserError
from leankv.models.rope import find_rotation
from tests import tiny
from tests.test_codecs import SPECS
from tests.test_decoded_once import fitted

pytestmark = pytest.mark.whole_runs


def suits(spec: str, width: int) -> bool:
    try:
        parse_recipe(spec).check_width(width)
    except ValueError:
        return False
    return True


PREDICTING = "resid(share:-2,transform:s0.2)"


@pytest.fixture
def over_codes(model: Any) -> Any:
    """The same model under attention over codes."""
    other = copy.deepcopy(model)
    other.set_attn_implementation(NAME)
    return other


def caches(model: Any, other: Any, spec: PlanSpec, **given: Any) -> list[LeanCache]:
    plan, rotation = fitted(model, spec), find_rotation(model, False, lambda reason: None)
    return [LeanCache(each.config, plan, rotation=rotation, **given) for each in (model, other)]


def dense(keys: Keys, values: Values, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys themselves: products with unit vectors; and values: sums in which one has all the weight."""
    batch, heads, _, head_dim = like.shape
    rows = keys.scores(torch.eye(head_dim).expand(batch, heads, head_dim, head_dim)).mT
    return rows, values.weighted(torch.eye(len(keys)).expand(batch, heads, len(keys), len(keys)))


def assert_pieces_are_what_update_hands_out(
    model: Any, plan: Any, rotation: Any, sinks: int, window: int, queries: int, encode_every: int = 1
) -> None:
    """The same keys and values into two copies of a filled cache. Through a whole model, last bits may flip codes."""
    # What is predicted from is seen in 16 bits, where a last bit of a product over other rows may round another way.
    atol = 1e-2 if any(codec.n_context_layers for codec in plan.values()) else 3e-5
    stock = LeanCache(model.config, plan, sinks=sinks, window=window, encode_every=encode_every, rotation=rotation)
    with torch.no_grad():
        for length in (1, 9, 14, 1, 1):
            ours = copy.deepcopy(stock)
            piece = tiny.tokens(2, length, seed=length)
            given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            handed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            update = stock.update

            def watched(
                k: Any, v: Any, layer: int, given: Any = given, handed: Any = handed, update: Any = update
            ) -> Any:
                given[layer] = k, v
                handed[layer] = update(k, v, layer)
                return handed[layer]

            stock.update = watched  # type: ignore[method-assign]
            model(input_ids=piece, past_key_values=stock, use_cache=True)
            del stock.update
            for number, (keys, values) in given.items():
                layer: Any = ours.layers[number]
                layer.hands_out_codes = True
                reading, _ = ours.layers[number].update(keys, values)
                if isinstance(reading, torch.Tensor):  # a layer that the plan leaves alone
                    continue
                assert len(reading) == handed[number][0].shape[2]
                parts = [dense(k, v, keys) for _, k, v in reading.pieces(queries)]
                for place, expected in enumerate(handed[number]):
                    found = torch.cat([each[place] for each in parts], dim=2)
                    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=1e-5, atol=atol)
            assert ours.nbytes() == stock.nbytes()
            assert ours.get_seq_length() == stock.get_seq_length()


@pytest.mark.parametrize(
    ("architecture", "spec"), tiny.with_each(["int:4", PREDICTING, "resid(pca:4,int:4)"], PREDICTING)
)
@pytest.mark.parametrize(("sinks", "window", "encode_every"), [(0, 0, 1), (2, 3, 2)])
def test_pieces_are_what_update_hands_out(model: Any, spec: str, sinks: int, window: int, encode_every: int) -> None:
    plan = fitted(model, PlanSpec.uniform(spec).with_layers([2], v="none").with_layers([1], k="none"))
    rotation = find_rotation(model, False, lambda reason: None)
    assert_pieces_are_what_update_hands_out(model, plan, rotation, sinks, window, 1000, encode_every)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if suits(spec, 32)])
def test_pieces_of_every_codec(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leankv.cache.part_store.PIECE", 6)
    model = tiny.build("llama")
    assert_pieces_are_what_update_hands_out(model, fitted(model, PlanSpec.uniform(spec)), None, 1, 4, queries=1)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("spec", ["int:4", "transform:s0.2"])
def test_attention_is_that_of_sdpa(spec: str, mask: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leankv.cache.part_store.PIECE", 7)
    model = tiny.build("llama")
    plan = fitted(model, PlanSpec.uniform(spec))
    generator = torch.Generator().manual_seed(5)
    keys, values = torch.randn(2, 2, 2, 30, 16, generator=generator).unbind()
    query = 3 * torch.randn(2, 4, queries, 16, generator=generator)
    shown = torch.rand(2, 1, queries, 30, generator=generator) > 0.3
    shown[..., 0] = True
    given = {"none": None, "bool": shown, "float": torch.zeros(shown.shape).masked_fill(~shown, -1e9)}[mask]
    results = []
    for hands_out in (False, True):
        cache = LeanCache(model.config, plan, sinks=2, window=3)
        layer: Any = cache.layers[1]
        layer.hands_out_codes = hands_out
        read = layer.update(keys, values)
        module = model.model.layers[1].self_attn
        if mask == "none" and not hands_out and queries > 1:
            given_here: Any = torch.ones(queries, 30, dtype=torch.bool).tril(30 - queries)[None, None]
        else:
            given_here = given
        results.append(code_attention(module, query, *read, given_here, scaling=0.4)[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_padded_batches_are_continued_the_same(model: Any, over_codes: Any, how: dict[str, Any]) -> None:
    tokens, mask = tiny.tokens(2, 20, seed=3), torch.ones(2, 20, dtype=torch.long)
    tokens[0, :7] = mask[0, :7] = 0
    given = {"sinks": 2, "window": 3, "attention_mask": mask}
    texts = [
        each.generate(
            input_ids=tokens, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False, **how
        )
        for each, cache in zip(
            (model, over_codes), caches(model, over_codes, PlanSpec.uniform(PREDICTING), **given), strict=True
        )
    ]
    assert torch.equal(*texts)


def test_stock_caches_are_not_changed_by_it(model: Any, over_codes: Any) -> None:
    tokens = tiny.tokens(2, 20, seed=4)
    texts = [each.generate(input_ids=tokens, max_new_tokens=8, do_sample=False) for each in (model, over_codes)]
    assert torch.equal(*texts)


def test_pieces_are_all_tokens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, each in one piece, none longer than a piece may be."""
    monkeypatch.setattr("leankv.cache.part_store.PIECE", 6)
    model = tiny.build("llama")
    model.set_attn_implementation(NAME)
    plan = fitted(model, PlanSpec.uniform("int:4").with_layers([0], v="none"))
    cache = LeanCache(model.config, plan, sinks=2, window=3)
    seen: list[tuple[int, int]] = []
    stock = LayerReading.pieces

    def watched(reading: LayerReading, queries: int, by_loops: bool) -> Any:
        for first, keys, values in stock(reading, queries, by_loops):
            seen.append((first, len(keys)))
            yield first, keys, values

    monkeypatch.setattr(LayerReading, "pieces", watched)
    with torch.no_grad():
        model(input_ids=tiny.tokens(1, 23), past_key_values=cache, use_cache=True)
    layers = [seen[i : i + len(seen) // 4] for i in range(0, len(seen), len(seen) // 4)]
    for pieces in layers:
        assert [first for first, _ in pieces] == [sum(n for _, n in pieces[:i]) for i in range(len(pieces))]
        assert sum(count for _, count in pieces) == 23
        assert max(count for _, count in pieces) <= 6


# -- which models are switched ---------------------------------------------------------------------------------------

BEYOND_SDPA: dict[str, Any] = {
    "s_aux": lambda: transformers.GptOssConfig(
        **tiny.COMMON,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=12,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "softcap": lambda: transformers.Gemma2Config(**tiny.COMMON, sliding_window=12, query_pre_attn_scalar=16),
}
"""What `sdpa` does not know, and a model that asks for it."""


@pytest.mark.parametrize("asked", BEYOND_SDPA)
@pytest.mark.parametrize("exact", [[], [0, 1, 2]])
def test_models_that_sdpa_cannot_run_are_left_as_they_are(asked: str, exact: list[int]) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(BEYOND_SDPA[asked]()).eval()
    plan = fitted(model, PlanSpec.uniform("int:4").with_layers(exact, k="none", v="none"))
    tokens = tiny.tokens(1, 20)

    def logits() -> torch.Tensor:
        cache = LeanCache(model.config, plan, sinks=2, window=3)
        said: torch.Tensor = model(tokens, past_key_values=cache).logits
        return said

    with torch.no_grad():
        expected = logits()
        with attention_over_codes(model):
            assert torch.equal(logits(), expected)
        model.set_attn_implementation(NAME)
        if asked == "softcap" and not exact:
            torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-3)
            return
        with pytest.raises(UserError, match=f"does not know {asked}"):
            logits()
        model.set_attn_implementation("eager")  # as the sentence says
        assert torch.equal(logits(), expected)


def test_a_choice_of_attention_is_kept() -> None:
    model = tiny.build("llama")
    for chosen in ("eager", NAME):
        model.set_attn_implementation(chosen)
        with attention_over_codes(model):
            assert model.config._attn_implementation == chosen
        assert model.config._attn_implementation == chosen


def test_a_model_off_the_cpu_is_not_switched() -> None:
    """Codes are handed out on the CPU only."""
    model = tiny.build("llama")
    with attention_over_codes(model):
        assert model.config._attn_implementation == NAME
    model.to("meta")
    with attention_over_codes(model):
        assert model.config._attn_implementation == "sdpa"


def test_a_model_is_as_it_was_once_the_last_thread_is_done() -> None:
    """Those that came first leave first."""
    model = tiny.build("llama")
    first_left = threading.Event()

    def come_and_stay() -> None:
        with attention_over_codes(model):
            entered.set()
            first_left.wait(10)
            implementations.append(model.config._attn_implementation)

    implementations: list[str] = []
    entered, second = threading.Event(), threading.Thread(target=come_and_stay)
    with ExitStack() as first:
        first.enter_context(attention_over_codes(model))
        second.start()
        assert entered.wait(10)
    first_left.set()
    second.join()
    assert implementations == [NAME]
    assert model.config._attn_implementation == "sdpa"


def test_training_is_refused_over_codes() -> None:
    """Sdpa drops out; nothing else does."""
    model = tiny.build("llama")
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.set_attn_implementation(NAME)
    cache = LeanCache(model.config, fitted(model, PlanSpec.uniform("int:4")), sinks=0, window=0)
    with torch.no_grad(), pytest.raises(UserError, match=r"call model.eval\(\)"):
        model.train()(tiny.tokens(1, 5), past_key_values=cache)

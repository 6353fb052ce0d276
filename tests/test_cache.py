"""The compressed cache against the stock one, and against an obvious cache that keeps every original row."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from leankv.cache.layers import LeanLayer
from leankv.cache.lean_cache import LeanCache
from leankv.cache.memory import held_bytes
from leankv.cache.plan import Site
from leankv.codecs import Codec
from leankv.models.geometry import find_geometry
from tests import tiny
from tests.oracles import EveryRow, Rounding, SlowCache, fitted_plan, held_tensors, identity_plan, plan_of, through

SLIDING_WINDOW = 12  # of the tiny models that have one
LONG = 30  # tokens: more than the sliding window


# -- identity codecs: the same bits as the stock cache ----------------------------------------------------------------


@pytest.fixture
def identical(model: Any) -> list[LeanCache]:
    """Caches with identity codecs in every layer: one without exact rows, one with sinks and a window."""
    return [LeanCache(model.config, identity_plan(model), sinks=sinks, window=own) for sinks, own in ((0, 0), (2, 5))]


def generate(model: Any, cache: Any, tokens: torch.Tensor, **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(
        tokens, past_key_values=cache, max_new_tokens=11, return_dict_in_generate=True, output_logits=True, **options
    )


def assert_same_generation(model: Any, caches: list[LeanCache], tokens: torch.Tensor, **options: Any) -> None:
    options = {"attention_mask": torch.ones_like(tokens), "do_sample": False, **options}
    expected = generate(model, DynamicCache(config=model.config), tokens, **options)
    for cache in caches:
        got = generate(model, cache, tokens, **options)
        assert torch.equal(got.sequences, expected.sequences)
        assert all(torch.equal(*pair) for pair in zip(got.logits, expected.logits, strict=True))


def test_one_forward_pass_is_bit_equal(model: Any, identical: Any) -> None:
    tokens = tiny.tokens(2, LONG)
    with torch.no_grad():
        expected = model(tokens, past_key_values=DynamicCache(config=model.config)).logits
        assert all(torch.equal(model(tokens, past_key_values=cache).logits, expected) for cache in identical)


def test_chunks_are_bit_equal(model: Any, identical: Any) -> None:
    """Logits of every chunk, with chunks shorter and longer than the sliding window."""
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        for chunk in tiny.tokens(2, LONG).split([1, 7, 2, 14, 6], dim=1):
            expected = model(chunk, past_key_values=stock).logits
            assert all(torch.equal(model(chunk, past_key_values=cache).logits, expected) for cache in identical)


def test_greedy_generation_is_bit_equal(model: Any, identical: Any) -> None:
    assert_same_generation(model, identical, tiny.tokens(2, LONG))


def test_short_prompts_grow_past_the_sliding_window_bit_equal(model: Any, identical: Any) -> None:
    assert_same_generation(model, identical, tiny.tokens(1, 3))


def test_sampling_is_bit_equal(model: Any, identical: Any) -> None:
    assert_same_generation(model, identical, tiny.tokens(2, LONG), do_sample=True, temperature=1.3, top_k=0)


def test_beam_search_is_bit_equal(model: Any, identical: Any) -> None:
    assert_same_generation(model, identical, tiny.tokens(2, LONG), num_beams=3)


def test_chunked_prefill_is_bit_equal(model: Any, identical: Any) -> None:
    assert_same_generation(model, identical, tiny.tokens(2, LONG), prefill_chunk_size=7)


def test_prompt_lookup_decoding_is_bit_equal(model: Any, identical: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assisted decoding records the past of sliding layers and crops rejected tokens."""
    tokens, crop = tiny.tokens(1, 9).repeat(1, 4), LeanCache.crop
    crops: dict[LeanCache, list[int]] = {cache: [] for cache in identical}
    monkeypatch.setattr(LeanCache, "crop", lambda cache, count: (crops[cache].append(count), crop(cache, count)))
    assert_same_generation(model, identical, tokens, prompt_lookup_num_tokens=4)
    assert all(min(own) < 0 for own in crops.values()), "no candidate was ever rejected, so nothing was tested"


def test_left_padded_batches_are_bit_equal(model: Any, identical: Any) -> None:
    tokens, mask = tiny.tokens(3, LONG), torch.ones(3, LONG, dtype=torch.int64)
    for row, padding in enumerate((0, 5, 17)):
        tokens[row, :padding], mask[row, :padding] = 0, 0
    assert_same_generation(model, identical, tokens, attention_mask=mask)


def test_two_turns_with_one_cache_are_bit_equal(model: Any, identical: Any) -> None:
    """A conversation: the cache of the first turn is handed to the second."""
    tokens, stock = tiny.tokens(1, LONG), DynamicCache(config=model.config)
    for _ in range(2):
        options = {"attention_mask": torch.ones_like(tokens), "do_sample": False}
        expected = generate(model, stock, tokens, **options).sequences
        for cache in identical:
            assert torch.equal(generate(model, cache, tokens, **options).sequences, expected)
        tokens = torch.cat([expected, tiny.tokens(1, 4, seed=5)], dim=1)


# -- lossy codecs: what `update` returns, and what is held -------------------------------------------------------------


@pytest.mark.parametrize("encode_every", [1, 3])
def test_fitted_codecs_return_reconstructions_outside_sinks_and_window(model: Any, encode_every: int) -> None:
    plan = fitted_plan(model)
    sinks, window = 2, 5
    lean = LeanCache(model.config, plan, sinks=sinks, window=window, encode_every=encode_every)
    slow = SlowCache(model.config, plan, sinks, window, encode_every)
    generator = torch.Generator().manual_seed(0)
    for layer, geometry in enumerate(find_geometry(model).layers):
        for length in (9, 1, 1, 4):
            shape = (2, geometry.kv_heads, length, geometry.head_dim)
            k, v = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
            ours, theirs = lean.update(k, v, layer), slow.update(k, v, layer)
            for got, expected in zip(ours, theirs, strict=True):
                # A product's last bits depend on how many rows it has, and codes are float16.
                torch.testing.assert_close(got, expected, atol=5e-3, rtol=0)
        exact = slice(length - window, None)
        assert torch.equal(ours[0][:, :, -length:][:, :, exact], k[:, :, exact])
        assert torch.equal(ours[1][:, :, -length:][:, :, exact], v[:, :, exact])


def test_a_lossy_pass_equals_one_over_reconstructions(model: Any) -> None:
    """The model's logits are those of a cache that keeps everything and hands out decode(encode(x)), chunk by chunk."""
    plan = plan_of(model, Rounding)
    for sinks, window in ((0, 0), (3, 0), (0, 4), (2, 7)):
        lean, slow = (
            LeanCache(model.config, plan, sinks=sinks, window=window),
            SlowCache(model.config, plan, sinks, window),
        )
        exact = DynamicCache(config=model.config)
        with torch.no_grad():
            for chunk in tiny.tokens(2, LONG).split([13, 1, 9, 7], dim=1):
                got = model(chunk, past_key_values=lean).logits
                torch.testing.assert_close(got, model(chunk, past_key_values=slow).logits, atol=1e-5, rtol=1e-5)
                loss = (got - model(chunk, past_key_values=exact).logits).abs().max()
        assert loss > 1e-3


def test_values_only_plans_keep_keys_exact(model: Any) -> None:
    plan = plan_of(model, Rounding, parts=["v"])
    cache = LeanCache(model.config, plan, sinks=0, window=0)
    for layer, geometry in enumerate(find_geometry(model).layers):
        shape = (1, geometry.kv_heads, 8, geometry.head_dim)
        k, v = torch.randn(shape), torch.randn(shape)
        keys, values = cache.update(k, v, layer)
        assert torch.equal(keys, k)
        assert torch.equal(values, through(plan[Site(layer, "v")], v))
        assert not torch.equal(values, v)


def test_layers_outside_the_plan_are_the_stock_ones(model: Any) -> None:
    plan = {site: codec for site, codec in plan_of(model, Rounding).items() if site.layer == 1}
    cache = LeanCache(model.config, plan, sinks=1, window=0)
    stock = DynamicCache(config=model.config)
    for layer in (0, 2, 3):
        assert type(cache.layers[layer]) is type(stock.layers[layer])


def test_bfloat16_models_get_bfloat16_back(architecture: str) -> None:
    model = tiny.build(architecture).to(torch.bfloat16)
    plan = fitted_plan(model)
    cache = LeanCache(model.config, plan, sinks=1, window=3)
    seen: set[torch.dtype] = set()
    update = cache.update

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = update(*args, **kwargs)
        seen.update(tensor.dtype for tensor in result)
        return result

    cache.update = watched  # type: ignore[method-assign]
    model.generate(tiny.tokens(2, LONG), past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert seen == {torch.bfloat16}


BATCH = 2
OPERATIONS = st.lists(
    st.tuples(
        st.integers(1, 17),
        st.sampled_from(["", "", "crop", "reorder", "select", "repeat"]),
        st.integers(0, 10**6),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=120)
@given(
    operations=OPERATIONS,
    sinks=st.integers(0, 6),
    window=st.integers(0, 15),
    layer=st.sampled_from([0, 2]),
    parts=st.sampled_from([("k", "v"), ("v",), ("k",)]),
)
def test_any_history_agrees_with_an_oracle_that_keeps_every_row(
    operations: list[tuple[int, str, int]], sinks: int, window: int, layer: int, parts: tuple[str, ...]
) -> None:
    """Chunks of any size with crops and batch operations between them, in a sliding layer (0) and a full one (2)."""
    config = tiny.ARCHITECTURES["gemma3"]()
    heads, head_dim = 2, 16
    codecs: dict[str, Codec] = {part: Rounding(heads * head_dim) for part in parts}
    plan = {Site(layer, part): codec for part, codec in codecs.items()}
    cache, stock = LeanCache(config, plan, sinks=sinks, window=window), DynamicCache(config=config)
    lean, plain = cache.layers[layer], stock.layers[layer]
    assert isinstance(lean, LeanLayer)
    sliding = SLIDING_WINDOW if layer == 0 else None
    oracles = {part: EveryRow(codecs.get(part), sinks, window, sliding) for part in ("k", "v")}
    constants = cache.nbytes()  # stock sliding layers hold their window as a tensor
    record_past = any(name == "crop" for _, name, _ in operations)
    if record_past:
        cache.activate_past_recording()
        stock.activate_past_recording()
    generator = torch.Generator().manual_seed(0)
    batch, since_crop = BATCH, 0
    for length, name, number in operations:
        assert lean.get_mask_sizes(length) == plain.get_mask_sizes(length)
        k = torch.randn(batch, heads, length, head_dim, generator=generator)
        v = torch.randn(batch, heads, length, head_dim, generator=generator)
        since_crop += length
        shapes = [tensor.shape for tensor in plain.update(k, v)]
        for part, new, got, shape in zip("kv", (k, v), lean.update(k, v), shapes, strict=True):
            assert got.shape == shape
            assert torch.equal(got, oracles[part].update(new, record_past))

        def batchwise(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
            for oracle in oracles.values():
                oracle.batch(function)

        if name == "crop":
            count = number % (since_crop + 1)
            since_crop = 0
            for target in (lean, plain):
                target.crop(-count)
            for oracle in oracles.values():
                oracle.crop(count)
        elif name == "reorder":
            order = torch.randint(batch, (batch,), generator=generator)
            lean.reorder_cache(order)
            batchwise(lambda rows, order=order: rows[order])
            plain.reorder_cache(order)
        elif name == "select":
            kept = torch.randint(batch, (1 + number % batch,), generator=generator)
            lean.batch_select_indices(kept)
            batchwise(lambda rows, kept=kept: rows[kept])
            plain.batch_select_indices(kept)
            batch = len(kept)
        elif name == "repeat" and batch < 8:
            lean.batch_repeat_interleave(2)
            batchwise(lambda rows: rows.repeat_interleave(2, dim=0))
            plain.batch_repeat_interleave(2)
            batch *= 2

        assert lean.get_seq_length() == plain.get_seq_length()
        assert cache.nbytes() - constants == sum(oracle.nbytes() for oracle in oracles.values())


@settings(max_examples=40)
@given(chunks=st.lists(st.integers(1, 20), min_size=1, max_size=6), sinks=st.integers(0, 4), window=st.integers(0, 9))
def test_no_original_rows_stay_beyond_sinks_and_window(chunks: list[int], sinks: int, window: int) -> None:
    """Every float tensor that the cache can reach is as short as sinks or window; the rest is one byte a number."""
    config = tiny.ARCHITECTURES["gemma3"]()
    plan = {Site(layer, part): Rounding(32) for layer in range(4) for part in ("k", "v")}
    cache = LeanCache(config, plan, sinks=sinks, window=window)
    for length in chunks:
        for layer in range(4):
            cache.update(torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16), layer)
    tensors = held_tensors(cache.layers)
    exact = [tensor for tensor in tensors if tensor.is_floating_point()]
    assert all(tensor.dtype == torch.int8 for tensor in tensors if not tensor.is_floating_point())
    assert all(tensor.shape[2] <= max(sinks, window) for tensor in exact)
    row_bytes = 2 * 2 * 16 * 4  # batch, heads, head dim, float32
    assert sum(tensor.untyped_storage().nbytes() for tensor in exact) <= 4 * 2 * (sinks + window) * row_bytes
    assert cache.nbytes() == sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_memory_is_saved(model: Any) -> None:
    """One byte a number in place of four, for all the tokens that each layer still sees."""
    lean, stock = (
        LeanCache(model.config, plan_of(model, Rounding), sinks=0, window=0),
        LeanCache(model.config, {}, sinks=0, window=0),
    )
    for cache in (lean, stock):
        model.generate(tiny.tokens(2, LONG), past_key_values=cache, max_new_tokens=8, do_sample=False)
    tokens = stock.get_seq_length()
    assert lean.get_seq_length() == tokens == LONG + 7  # the last token is never fed
    assert lean.nbytes() == sum(
        2 * 2 * layer.width * layer.tokens_held(tokens) for layer in find_geometry(model).layers
    )
    assert stock.nbytes() >= 4 * lean.nbytes()


def test_cropping_more_than_was_recorded_is_refused_as_by_the_stock_cache() -> None:
    config = tiny.ARCHITECTURES["mistral"]()
    cache = LeanCache(config, {Site(0, "k"): Rounding(32), Site(0, "v"): Rounding(32)}, sinks=0, window=0)
    cache.update(torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16), 0)
    with pytest.raises(RuntimeError):
        cache.layers[0].crop(-1)


def test_reset_empties(model: Any) -> None:
    plan = plan_of(model, Rounding)
    used, new = (LeanCache(model.config, plan, sinks=2, window=3) for _ in range(2))
    with torch.no_grad():
        model(tiny.tokens(2, LONG), past_key_values=used)
        assert used.nbytes() > 0
        used.reset()
        assert used.nbytes() == 0
        assert used.get_seq_length() == 0
        tokens = tiny.tokens(1, LONG, seed=2)
        again = model(tokens, past_key_values=used).logits
        assert torch.equal(again, model(tokens, past_key_values=new).logits)


def test_fresh_is_empty_and_of_the_same_plan(model: Any) -> None:
    plan = plan_of(model, Rounding)
    used = LeanCache(model.config, plan, sinks=2, window=3)
    tokens = tiny.tokens(2, LONG)
    with torch.no_grad():
        first = model(tokens, past_key_values=used).logits
        fresh = used.fresh()
        assert fresh.get_seq_length() == 0
        assert torch.equal(model(tokens, past_key_values=fresh).logits, first)


@pytest.mark.parametrize("first", [0, 5])
def test_cropping_more_than_there_is_leaves_an_empty_cache(model: Any, first: int) -> None:
    plan, tokens = plan_of(model, Rounding), tiny.tokens(2, LONG)
    cropped = LeanCache(model.config, plan, sinks=2, window=3)
    cropped.activate_past_recording()
    with torch.no_grad():
        if first:
            model(tokens[:, :first], past_key_values=cropped)
        cropped.crop(-first - 3)
        assert cropped.get_seq_length() == cropped.nbytes() == 0
        expected = model(tokens, past_key_values=LeanCache(model.config, plan, sinks=2, window=3)).logits
        assert torch.equal(model(tokens, past_key_values=cropped).logits, expected)


def test_tokens_that_left_the_window_stay_codes_after_a_crop() -> None:
    """And what is left after it are the very codes, sinks and rows that were there before."""
    config = tiny.ARCHITECTURES["llama"]()
    layer = LeanCache(config, {Site(0, "k"): Rounding(32), Site(0, "v"): Rounding(32)}, sinks=2, window=5).layers[0]
    k, v, new = torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 1, 16)
    before = layer.update(k, v)
    layer.crop(-4)
    assert layer.get_seq_length() == 16
    for got, was, rows in zip(layer.update(new, new), before, (k, v), strict=True):
        assert torch.equal(got, torch.cat([was[:, :, :16], new], dim=2))
        assert [torch.equal(got[:, :, t], rows[:, :, t]) for t in (1, 2, 14, 15)] == [True, False, False, True]


@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (3, 0), (2, 100)], ids=["strict", "sinks", "all exact"])
def test_prompt_lookup_says_what_greedy_decoding_says(
    model: Any, sinks: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With lossy codecs too, where a rollback leaves no trace: with no exact window, or nothing outside of it."""
    tokens, plan = tiny.tokens(1, 9).repeat(1, 4), plan_of(model, Rounding)
    plain, looked_up = (LeanCache(model.config, plan, sinks=sinks, window=window) for _ in range(2))
    expected = generate(model, plain, tokens, do_sample=False)
    crops: list[int] = []
    crop = looked_up.crop
    monkeypatch.setattr(looked_up, "crop", lambda count: (crops.append(count), crop(count)))
    got = generate(model, looked_up, tokens, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(got.sequences, expected.sequences)
    assert min(crops) < 0, "no candidate was ever rejected, so nothing was tested"


@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (2, 5)])
def test_a_copy_branches_off_and_shares_the_codecs(model: Any, sinks: int, window: int) -> None:
    plan = fitted_plan(model)
    prompt, others = tiny.tokens(2, LONG), tiny.tokens(4, 3, seed=1).split(2)
    with torch.no_grad():
        trunk = LeanCache(model.config, plan, sinks=sinks, window=window)
        model(prompt, past_key_values=trunk)
        branches = [trunk, copy.deepcopy(trunk)]
        assert branches[1].nbytes() == trunk.nbytes() == held_bytes(branches) / 2
        for branch, tokens in zip(branches, others, strict=True):
            alone = LeanCache(model.config, plan, sinks=sinks, window=window)
            model(prompt, past_key_values=alone)
            expected = model(tokens, past_key_values=alone).logits
            assert torch.equal(model(tokens, past_key_values=branch).logits, expected)
    for (layer, part), codec in plan.items():
        assert branches[1].plan[Site(layer, part)] is branches[1].layers[layer].parts[part].codec is codec

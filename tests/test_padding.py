"""Sinks under left padding: a row of a padded batch keeps its own first tokens exact."""

from typing import Any

import pytest
import torch

from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import Plan, Site
from leankv.errors import UserError
from leankv.models.rope import KeyRotation
from tests import tiny
from tests.oracles import Rounding, plan_of

LONG = 30  # tokens: more than the sliding window of the tiny models that have one


def test_left_padded_rows_keep_their_own_sinks_exact() -> None:
    """Each row's first tokens after its padding come back exact, as they do when the row is alone."""
    config, sinks = tiny.ARCHITECTURES["llama"](), 3
    plan: Plan = {Site(0, "k"): Rounding(32), Site(0, "v"): Rounding(32)}
    paddings = (0, 4, 9)
    mask = torch.ones(3, 20, dtype=torch.int64)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
    k, v = torch.randn(3, 2, 20, 16), torch.randn(3, 2, 20, 16)
    together = LeanCache(config, plan, sinks=sinks, window=0, attention_mask=mask).update(k, v, 0)
    for row, padding in enumerate(paddings):
        alone = LeanCache(config, plan, sinks=sinks, window=0).update(k[[row], :, padding:], v[[row], :, padding:], 0)
        for batched, single, original in zip(together, alone, (k, v), strict=True):
            own = slice(padding, padding + sinks)
            assert torch.equal(batched[row, :, own], original[row, :, own])
            assert torch.equal(batched[row, :, own], single[0, :, :sinks])
    # The row with the longest padding loses nothing and gains nothing beside the others.
    assert torch.equal(together[0][2, :, 9:], alone[0][0])


def test_equally_padded_rows_generate_as_they_do_alone(architecture: str) -> None:
    """Two rows under the same padding: logits as without padding, to rounding."""
    model = tiny.build(architecture)
    plan = plan_of(model, Rounding)
    tokens, padding, sinks = tiny.tokens(2, LONG), 6, 3
    padded = torch.cat([torch.zeros(2, padding, dtype=torch.int64), tokens], dim=1)
    mask = (torch.arange(padding + LONG) >= padding).long().expand(2, -1)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    with torch.no_grad():
        cache = LeanCache(model.config, plan, sinks=sinks, window=0, attention_mask=mask)
        got = model(padded, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, padding:]
        expected = model(tokens, past_key_values=LeanCache(model.config, plan, sinks=sinks, window=0)).logits
    # Rounding codes may flip in the last bit of a key, hence a few wider differences.
    assert (got - expected).abs().median() < 1e-4


@pytest.mark.parametrize("again", [LeanCache.fresh, lambda cache: (cache.reset(), cache)[1]], ids=["fresh", "reset"])
def test_a_cache_for_another_run_of_a_padded_batch_reads_the_same(architecture: str, again: Any) -> None:
    """After beams, which repeat the rows."""
    model = tiny.build(architecture)
    tokens, mask = tiny.tokens(2, LONG), torch.ones(2, LONG, dtype=torch.int64)
    tokens[1, :4], mask[1, :4] = 0, 0
    rotation = None if architecture == "gpt2" else KeyRotation(model)
    cache = LeanCache(model.config, plan_of(model, Rounding), sinks=3, window=2, attention_mask=mask, rotation=rotation)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, past_key_values=again(cache)).logits
        cache = again(cache)
        model.generate(tokens, attention_mask=mask, past_key_values=cache, num_beams=3, max_new_tokens=3)
        cache = again(again(cache))
        assert (cache.sinks, cache.get_seq_length()) == (3, 0)
        assert torch.equal(model(tokens, attention_mask=mask, past_key_values=cache).logits, expected)
        # The same numbers of tokens exact in each row as in a cache that is made for this batch.
        made = LeanCache(
            model.config, plan_of(model, Rounding), sinks=3, window=2, attention_mask=mask, rotation=rotation
        )
        assert torch.equal(model(tokens, attention_mask=mask, past_key_values=made).logits, expected)


@pytest.mark.parametrize("rows", [2, 5, 6])
def test_a_batch_of_other_rows_than_the_mask_is_refused(rows: int) -> None:
    """And the cache stays empty, for the right batch."""
    model = tiny.build("llama")
    mask = torch.ones(4, 10, dtype=torch.int64)
    mask[1, :3] = 0
    cache = LeanCache(
        model.config, plan_of(model, Rounding), sinks=0, window=0, attention_mask=mask, rotation=KeyRotation(model)
    )
    with torch.no_grad():
        with pytest.raises(UserError, match=f"attention_mask of 4 rows and cannot take a batch of {rows}"):
            model(tiny.tokens(rows, 10), past_key_values=cache)
        assert cache.get_seq_length() == 0
        assert bool(model(tiny.tokens(8, 10), past_key_values=cache).logits.isfinite().all())

"""Attention over codes: keys and values are decoded a piece at a time, and nothing dense of the whole context is made.

A function registered with transformers' `AttentionInterface` gets what a cache layer's `update` returned, untouched. So
under the implementation `leankv` a compressed layer on the CPU hands out its codes, and attention reads them with an
online softmax (Milakov and Gimelshein, 2018, arXiv 1805.02867; as FlashAttention, arXiv 2205.14135): running maximum,
sum and weighted values of each query, corrected as larger scores come. Tensors go to `sdpa`, so only models that use it
are switched; of the others, layers are rebuilt.

    model.set_attn_implementation("leankv")
"""

import hashlib
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from leankv import compiled
from leankv.cache.reading import LayerReading
from leankv.errors import UserError
from leankv.models.structure import text_config

NAME = "leankv" if __package__ == "leankv.cache" else f"leankv_{hashlib.sha256(__name__.encode()).hexdigest()[:12]}"
"""A copy of this file that travels in a model repository has a name of its own: both may be loaded in one process."""

LEAST_SCORE = -1e30  # below any score; finite, so that differences of it are numbers


def code_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' implementations are called, for tensors and for `LayerReading`.

    Args:
        module: the model's attention.
        query: `[B, heads, T, head_dim]`, rotated.
        key: tensors, or what a compressed layer handed out.
        value: likewise.
        attention_mask: `[B or 1, heads or 1, T, tokens]`: true (or 0) where a query sees a token; None for causal.
        dropout: of probabilities; only `sdpa` knows it.
        scaling: of scores; `head_dim^(-1/2)` unless given.
        **given: what else the model hands over. `softcap` is understood for codes, `position_bias` for tensors.

    Returns:
        `[B, T, heads, head_dim]`, and None for the probabilities.

    Raises:
        UserError: the model's attention asks for what this one does not know.
    """
    is_coded = isinstance(key, LayerReading)
    # `sdpa` would drop `s_aux` in silence.
    if unknown := [
        name for name in ("s_aux", "position_bias" if is_coded else "softcap") if given.get(name) is not None
    ]:
        raise UserError(
            f"attention over codes does not know {unknown[0]}, which this model asks for; use "
            "model.set_attn_implementation('eager')"
        )
    if not is_coded:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **given)
    if dropout:
        raise UserError("attention over codes drops nothing out, and the model is in training mode; call model.eval()")
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    mask = attention_mask
    if mask is None and query.shape[2] > 1:
        mask = _causal(query.shape[2], len(key), query.device)
    attended = _attend(query, key, mask, scaling, given.get("softcap"))
    return attended.to(query.dtype).transpose(1, 2).contiguous(), None


def reads_codes(config: Any) -> bool:
    """Whether a model of this configuration attends over codes."""
    return bool(text_config(config)._attn_implementation == NAME)


def switch_to_codes(model: Any) -> bool:
    """Have a model attend over codes from now on, where that changes nothing else; whether it does.

    One that uses another implementation than `sdpa`, by choice or because `sdpa` cannot do what it asks for, goes on as
    it is. So does one that has no parameter on the CPU, as only there codes are handed out, and one whose attention
    cannot be exchanged.
    """
    if text_config(model.config)._attn_implementation != "sdpa":
        return False
    if not any(parameter.device.type == "cpu" for parameter in model.parameters()):
        return False
    model.set_attn_implementation(NAME)
    return reads_codes(model.config)


_users: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # of models that were switched for some time
_counting = threading.Lock()


@contextmanager
def attention_over_codes(model: Any) -> Iterator[None]:
    """While this lasts, in any thread, a model attends over codes, unless `switch_to_codes` leaves it as it is."""
    with _counting:
        is_switched = model in _users or switch_to_codes(model)
        if is_switched:
            _users[model] = _users.get(model, 0) + 1
    try:
        yield
    finally:
        with _counting:
            if is_switched:
                _users[model] -= 1
                if not _users[model]:
                    del _users[model]
                    model.set_attn_implementation("sdpa")


def _causal(queries: int, tokens: int, device: torch.device) -> torch.Tensor:
    """`[1, 1, queries, tokens]`, true where a query, of which the last stands at the last token, sees a token."""
    ones = torch.ones(queries, tokens, dtype=torch.bool, device=device)
    return ones.tril(tokens - queries)[None, None]


def _attend(
    query: torch.Tensor, reading: LayerReading, mask: torch.Tensor | None, scaling: float, softcap: float | None
) -> Float[torch.Tensor, "B heads T head_dim"]:
    """Weighted values, float32."""
    batch, heads, count, _ = query.shape
    groups = heads // reading.heads  # queries that read the same keys
    # [B, KV heads, groups * T, head_dim]
    queries = (query.float() * scaling).unflatten(1, (reading.heads, groups)).flatten(2, 3)
    if _hides_nothing(mask):
        mask = None
    highest = queries.new_full((*queries.shape[:3], 1), LEAST_SCORE)
    total, sums = torch.zeros_like(highest), None
    for first, keys, values in reading.pieces(
        groups * count, by_loops=batch == count == 1 and compiled.serves(queries)
    ):
        scores = keys.scores(queries)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            part = mask[..., first : first + len(keys)].expand(batch, -1, count, -1)
            scores = _masked(scores.unflatten(2, (groups, count)), part, reading.heads).flatten(2, 3)
        above = torch.maximum(highest, scores.amax(dim=3, keepdim=True))
        weights = scores.sub_(above).exp_()  # in place: they are the largest part of what a step takes
        kept = torch.exp(highest - above)
        weighted = values.weighted(weights)
        sums = weighted if sums is None else sums.mul_(kept).add_(weighted)
        total = total * kept + weights.sum(dim=3, keepdim=True)
        highest = above
    assert sums is not None, "a layer that was updated holds tokens"
    return (sums / total.clamp_min(1e-30)).unflatten(2, (groups, count)).flatten(1, 2)


def _hides_nothing(mask: torch.Tensor | None) -> bool:
    """Whether a mask is sure to let all queries see all tokens; on a GPU, asking would wait for it."""
    return mask is None or (mask.dtype == torch.bool and mask.device.type == "cpu" and bool(mask.all()))


def _masked(scores: torch.Tensor, mask: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Scores `[B, KV heads, groups, T, n]` where a mask `[B, 1 or heads, T, n]` lets a query see."""
    own = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, -1))
    if mask.dtype == torch.bool:
        return scores.masked_fill(~own, -math.inf)
    return scores + own.float().clamp_min(LEAST_SCORE)


AttentionInterface.register(NAME, code_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])

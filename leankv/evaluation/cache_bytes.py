"""What real caches take in bytes: between steps, during one, and with the codecs that read them.

A cache is filled with the tokens of one block of text, so that its bytes stand at the context that costs were measured
at. What it is counted against is always the 16-bit cache of the same tokens.
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int

from leankv.cache.code_attention import attention_over_codes
from leankv.cache.footprint import Footprint
from leankv.cache.lean_cache import LeanCache
from leankv.cache.memory import held_bytes
from leankv.cache.part_store import UNBOUNDED
from leankv.cache.plan import Plan, Site
from leankv.codecs import Codec
from leankv.config.plan_table import PARTS
from leankv.evaluation.step_peak import peak_bytes, watched
from leankv.models.geometry import BYTES_16_BIT, Geometry
from leankv.models.structure import max_positions

PIECE = 128
"""Tokens a cache is filled with at a time: the known baselines quantize groups of 128 tokens, and hold the most exact
when they are met within one."""

SETTLED = 2 * PIECE
"""Tokens after which a baseline is taken to grow by its codes alone: 128 that are held exact, and one group."""


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one sequence's cache.

    Attributes:
        context: tokens in it.
        base: of the 16-bit cache of so many tokens.
        held: of the cache in memory between two steps.
        stored: of the cache serialized: codes entropy-coded where their codec can. As held, for baselines.
        peak_step: the most that one decoding step takes over `held`: what it decodes, and the model's own activations
            of one token, which are the same for all caches. Ours are read by attention over codes, as `generate` does.
        codecs: of the codecs in memory, with what decoding builds and keeps.
        base_growth: of the compressed parts of layers that let go of nothing, in the 16-bit cache, over the tokens that
            the next two are of. What a sliding window drops would be counted as bytes saved.
        held_growth: by how much `held` grew in those; None where tokens are too few to be codes alone, and for caches
            of others where some layers let go of tokens.
        stored_growth: the same, of `stored`.
    """

    context: int
    base: int
    held: int
    stored: int
    peak_step: int
    codecs: int
    base_growth: int
    held_growth: int | None
    stored_growth: int | None

    @property
    def stored_ratio(self) -> float | None:
        """16-bit cache over the whole of it serialized, what it keeps exact included."""
        return _ratio(self.base, self.stored)

    @property
    def cache_ratio(self) -> float | None:
        """16-bit cache over what is held between steps; None where nothing is held."""
        return _ratio(self.base, self.held)

    @property
    def all_in_ratio(self) -> float | None:
        """16-bit cache over all that a sequence of its own needs: held, codecs in memory, and the peak of a step."""
        return _ratio(self.base, self.held + self.codecs + self.peak_step)

    @property
    def code_ratio_live(self) -> float | None:
        """16-bit bytes of the tokens last taken in over the bytes that the cache grew by."""
        return _ratio(self.base_growth, self.held_growth)

    @property
    def code_ratio_stored(self) -> float | None:
        """The same, serialized."""
        return _ratio(self.base_growth, self.stored_growth)


def _ratio(base: int, size: int | None) -> float | None:
    return base / size if base and size is not None and size > 0 else None


@torch.no_grad()
def measure_bytes(
    model: Any,
    geometry: Geometry,
    tokens: Int[torch.Tensor, "1 T"],
    make_cache: Callable[[], Any],
    plan: Plan | None = None,
    settled: int = SETTLED,
    on_piece: Callable[[], None] = lambda: None,
) -> CacheBytes:
    """Fill a fresh cache with the tokens of one sequence, at least 2, and count.

    Growth is what was taken in between half and all of the fill, both whole pieces where T allows it. A cache of ours
    with an unbounded window is filled exactly, and counted as it is once all of that is coded whole.

    Args:
        model: a causal LM in eval mode.
        geometry: of its cache.
        tokens: what to fill the cache with.
        make_cache: a fresh cache for one sequence.
        plan: what it holds as codes; None, for baselines: everything.
        settled: tokens after which what it compresses grows by codes alone.
        on_piece: called after each piece that is fed.
    """
    device, context = model.device, tokens.shape[1]
    shorter, longer = marks = _marks(context)
    # Only layers that let go of nothing grow by codes alone.
    growing = [number for number, layer in enumerate(geometry.layers) if layer.tokens_held(longer) == longer]
    grown: dict[int, tuple[int, int]] = {}
    with watched(device):
        cache = make_cache()
    is_ours, fed = isinstance(cache, LeanCache), 0
    for piece in pieces_of(tokens.to(device)):
        with watched(device):
            model.base_model(input_ids=piece, past_key_values=cache, use_cache=True)
        fed += piece.shape[1]
        if fed in (*marks, context):
            counted = _coded(cache, is_last=fed == context)
            held, stored = held_bytes(counted), len_stored(counted)
            grown[fed] = _of_layers(counted, growing, held, stored) if is_ours else (held, stored)
        on_piece()
    # Any two tokens do for the steps, and any positions, where the model has no more.
    last = tokens[:, -1:].to(device)
    limit = max_positions(model.config) or context + 2
    places = {} if limit >= context + 2 else {"position_ids": torch.full_like(last, context - 1)}

    def decode_one() -> None:
        model.base_model(input_ids=last, past_key_values=cache, use_cache=True, **places)

    with attention_over_codes(model) if is_ours else nullcontext():
        with watched(device):
            decode_one()  # what is built once is built now
        peak = peak_bytes(decode_one, device)
    sites = [Site(layer, part) for layer in growing for part in PARTS]
    per_token = {site: geometry.layers[site.layer].width_of(site.part) for site in sites}
    compressed = sum(width for site, width in per_token.items() if plan is None or site in plan)
    exact = (longer - shorter) * (sum(per_token.values()) - compressed) * model.dtype.itemsize
    # Which layer the bytes of others' caches belong to is not known.
    is_known = is_ours or len(growing) == len(geometry.layers)
    is_settled = shorter >= settled and is_known
    return CacheBytes(
        context=context,
        base=Footprint(geometry, {}, 0, 0).base_bytes(context),
        held=held,
        stored=stored,
        peak_step=peak,
        codecs=codec_memory(cache.codecs.values()) if is_ours else 0,
        base_growth=(longer - shorter) * compressed * BYTES_16_BIT,
        held_growth=grown[longer][0] - grown[shorter][0] - exact if is_settled else None,
        stored_growth=grown[longer][1] - grown[shorter][1] - exact if is_settled else None,
    )


def _of_layers(cache: LeanCache, layers: list[int], held: int, stored: int) -> tuple[int, int]:
    """What some layers of a cache that takes `held` and `stored` bytes take of them."""
    others = [layer for number, layer in enumerate(cache.layers) if number not in layers]
    return held - held_bytes(others), cache.serialized_nbytes(layers) if others else stored


def _coded(cache: Any, is_last: bool) -> Any:
    """The cache as it is counted: where nothing is coded before all is there, coded; a copy, unless it is `is_last`."""
    if not isinstance(cache, LeanCache) or cache.window != UNBOUNDED:
        return cache
    coded = cache if is_last else copy.deepcopy(cache)
    coded.encode_all()
    return coded


def len_stored(cache: Any) -> int:
    """Bytes of a cache serialized; those of others know no other form than the one they are held in."""
    return cache.serialized_nbytes() if isinstance(cache, LeanCache) else held_bytes(cache)


def codec_memory(codecs: Iterable[Codec]) -> int:
    """Bytes in memory of codecs, with what decoding builds from their tensors; each storage counts once."""
    modules = [module for codec in codecs for module in codec.modules()]
    for module in modules:
        if isinstance(module, Codec):
            module.prepare()
    return held_bytes([vars(module) for module in modules])


def _marks(context: int) -> tuple[int, int]:
    """Tokens at half and at all of a fill: whole pieces where there are two."""
    if context < 2 * PIECE:
        return context // 2, context
    return context // (2 * PIECE) * PIECE, context // PIECE * PIECE


def pieces_of(tokens: Int[torch.Tensor, "1 T"]) -> list[Int[torch.Tensor, "1 _"]]:
    """A block -> what is fed at a time: ends at each whole piece, and where bytes are counted."""
    context = tokens.shape[1]
    ends = {*range(PIECE, context, PIECE), *_marks(context)} - {context}
    return list(tokens.tensor_split(sorted(ends), dim=1))

"""What real caches take in bytes: between steps, during one, and with the codecs that read them.

A cache is filled with the tokens of one block of text, so that its bytes stand at the context that costs were measured
at. What it is counted against is always the 16-bit cache of the same tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from leankv.accounting import Footprint
from leankv.cache import LeanCache, Plan
from leankv.codecs import Codec
from leankv.experiment import PARTS
from leankv.held_bytes import held_bytes
from leankv.model import BYTES_16_BIT, Geometry
from leankv.run import Run
from leankv.step_peak import peak_bytes, watched

COUNTING_REVISION = 1
"""Raised when the bytes counted of one cache change: the ruler, the way caches are filled, the peak."""
PIECE = 128
"""Tokens a cache is filled with at a time: the known baselines quantize groups of 128 tokens, and hold the most exact
when they are met within one."""
SETTLED = 2 * PIECE
"""Tokens after which a cache of others is taken to grow by its codes alone: 128 that are held exact, and one group."""


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one sequence's cache.

    Attributes:
        context: tokens in it.
        base: of the 16-bit cache of so many tokens.
        held: of the cache in memory between two steps.
        stored: of the cache serialized: codes entropy-coded where their codec can. As held, for caches of others.
        peak_step: the most that one decoding step takes over `held`: what it decodes, and the model's own activations
            of one token, which are the same for all caches.
        codecs: of the codecs in memory, with what decoding builds and keeps.
        base_growth: of the compressed layers and parts of the 16-bit cache, over the tokens that the next two are of.
        held_growth: by how much `held` grew in those layers and parts; None where tokens are too few to be codes alone.
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


def bytes_of_plan(run: Run, split: str, layers: Iterable[int]) -> CacheBytes:
    """What a cache of the run takes with these layers compressed; see `bytes_of_cache`."""
    layers = sorted(layers)
    protocol, cache = run.experiment.protocol, run.new_cache(layers)
    key = run.nats_path(split, layers).stem  # with all that cost and bytes depend on alike
    settled = protocol.sinks + protocol.window
    return bytes_of_cache(run, split, cache.fresh, key, cache.plan, settled)


def bytes_of_cache(
    run: Run,
    split: str,
    make_cache: Callable[[], Any],
    cache_key: str,
    plan: Plan | None = None,
    settled: int = SETTLED,
) -> CacheBytes:
    """Measure a cache filled with the first block of a split, or look up what was measured.

    Args:
        run: its model and its text.
        split: `selection`, `certification` or `report`.
        make_cache: a fresh cache for one sequence.
        cache_key: names all that the cache depends on beside model and text.
        plan: what it holds as codes; None, for caches of others: everything.
        settled: tokens after which what it compresses grows by codes alone: sinks and window of ours.
    """
    block = run.blocks(split).take([0])

    def compute() -> dict[str, Any]:
        with run.progress.stage(f"bytes at {block.tokens.shape[1]} tokens", len(_pieces(block.tokens))) as step:
            loaded = run.loaded
            return asdict(measure_bytes(loaded.model, loaded.geometry, block.tokens, make_cache, plan, settled, step))

    depends_on = {
        "revision": COUNTING_REVISION,
        "model": run.model_key,
        "block": block.hash,
        "cache": cache_key,
        "piece": PIECE,
    }
    return CacheBytes(**run.cells.get_or_compute("cache-bytes", depends_on, compute))


@torch.no_grad()
def measure_bytes(
    model: Any,
    geometry: Geometry,
    tokens: torch.Tensor,
    make_cache: Callable[[], Any],
    plan: Plan | None = None,
    settled: int = SETTLED,
    on_piece: Callable[[], None] = lambda: None,
) -> CacheBytes:
    """Fill a fresh cache with `tokens` `[1, T]`, T at least 2, and count.

    Growth is what was taken in between half and all of the fill, both whole pieces where T allows it.
    """
    device, context = model.device, tokens.shape[1]
    shorter, longer = marks = _marks(context)
    held: dict[int, int] = {}
    stored: dict[int, int] = {}
    with watched(device):
        cache = make_cache()
    fed = 0
    for piece in _pieces(tokens.to(device)):
        with watched(device):
            model.base_model(input_ids=piece, past_key_values=cache, use_cache=True)
        fed += piece.shape[1]
        if fed in (*marks, context):
            held[fed] = held_bytes(cache)
            stored[fed] = len_stored(cache)
        on_piece()
    # Any two tokens do for the steps, and any positions, where the model has no more.
    last = tokens[:, -1:].to(device)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or context + 2
    places = {} if limit >= context + 2 else {"position_ids": torch.full_like(last, context - 1)}

    def decode_one() -> None:
        model.base_model(input_ids=last, past_key_values=cache, use_cache=True, **places)

    with watched(device):
        decode_one()  # what is built once is built now
    peak = peak_bytes(decode_one, device)
    uncompressed = Footprint(geometry, {}, 0, 0)
    left_alone = _left_alone(geometry, plan, longer) - _left_alone(geometry, plan, shorter)
    exact = left_alone * model.dtype.itemsize // BYTES_16_BIT
    is_settled = shorter >= settled
    return CacheBytes(
        context=context,
        base=uncompressed.base_bytes(context),
        held=held[context],
        stored=stored[context],
        peak_step=peak,
        codecs=codec_memory(codec for own in (plan or {}).values() for codec in own.values()),
        base_growth=uncompressed.base_bytes(longer) - uncompressed.base_bytes(shorter) - left_alone,
        held_growth=held[longer] - held[shorter] - exact if is_settled else None,
        stored_growth=stored[longer] - stored[shorter] - exact if is_settled else None,
    )


def _left_alone(geometry: Geometry, plan: Plan | None, tokens: int) -> int:
    """16-bit bytes of `tokens` tokens in what a plan does not compress."""
    coded = range(len(geometry.layers)) if plan is None else plan
    nothing = {layer: dict.fromkeys(PARTS if plan is None else plan[layer], 0.0) for layer in coded}
    return round(Footprint(geometry, nothing, 0, 0).compressed_bytes(tokens))


def len_stored(cache: Any) -> int:
    """Bytes of a cache serialized; those of others know no other form than the one they are held in."""
    return cache.parked_nbytes() if isinstance(cache, LeanCache) else held_bytes(cache)


def codec_memory(codecs: Iterable[Codec]) -> int:
    """Bytes in memory of codecs, with what decoding has built from their tensors; each storage counts once."""
    return held_bytes([vars(module) for codec in codecs for module in codec.modules()])


def _marks(context: int) -> tuple[int, int]:
    """Tokens at half and at all of a fill: whole pieces where there are two."""
    if context < 2 * PIECE:
        return context // 2, context
    return context // (2 * PIECE) * PIECE, context // PIECE * PIECE


def _pieces(tokens: torch.Tensor) -> list[torch.Tensor]:
    """`[1, T]` -> what is fed at a time: ends at each whole piece, and where bytes are counted."""
    context = tokens.shape[1]
    ends = {*range(PIECE, context, PIECE), *_marks(context)} - {context}
    return list(tokens.tensor_split(sorted(ends), dim=1))

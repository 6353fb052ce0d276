"""Perplexity, and what a compressed cache adds to it. The only perplexity in LeanKV.

Four protocols, which differ in how the tokens of a block are fed to the model:

- `strict`: the whole block in one forward pass, no exact window. Every key and value that attention reads went through
  the codec, but for the sinks: the first tokens of each block are exact as `--sinks` says, and that is 4 of them unless
  told. `--sinks 0` leaves nothing exact.
- `stream`: chunks, as in chunked prefill; sinks and window are exact, older tokens are read through the codec.
- `prefix`: the first P tokens (`prefix_length`) in one exact forward pass; then every key and value of theirs behind
  the sinks is coded, with no exact window; then the next C tokens (`continuation`), which read the codes, and each
  other exactly: what a saved prompt costs whoever goes on from it. Counted are the C - 1 predictions that the
  continuation's tokens make of each other. That of its first token is left out: the last of the prefix makes it, before
  anything is coded. Blocks are P + C tokens long; of longer ones the rest plays no part.
- `decode`: token by token, as in generation.

Natural logarithms of probabilities ("nats") are summed in float64 for each block and divided once.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Float64, Int

from leankv.cache.lean_cache import LeanCache
from leankv.cache.part_store import UNBOUNDED
from leankv.config.experiment import ProtocolConfig
from leankv.data.blocks import Blocks
from leankv.errors import UserError
from leankv.evaluation.exact_prefixes import ExactPrefixes
from leankv.models.logits import Logits, piecewise_logits
from leankv.search.statistics import t_interval

MEASURING_REVISION = 3
"""Raised when the nats measured under one plan change: feeding, cache, replay, summing."""

LogitsRun = Callable[[torch.Tensor, int], Iterator[torch.Tensor]]
"""A model's way through a batch of blocks: the next chunk's inputs `[B, n]`, and how many of its tokens are wanted ->
their logits `[B, m, V]`, piece by piece."""

LOGIT_ROWS = 64  # tokens whose logits are held in float32 at a time; so few stay in a processor's cache


@dataclass(frozen=True)
class BlockNats:
    """Negative log likelihood of each block.

    Attributes:
        nats: one sum a block.
        tokens_per_block: predicted tokens in each block: its length less one, or under `prefix` that of the
            continuation.
        seconds: time it took.
    """

    nats: tuple[float, ...]
    tokens_per_block: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp of the mean nats a token."""
        return math.exp(math.fsum(self.nats) / (self.tokens_per_block * len(self.nats)))

    def cell(self) -> dict[str, Any]:
        """As a cell holds it; what is told of each block is called `tokens` there, as in cells of version 0.1."""
        return {"nats": self.nats, "tokens": self.tokens_per_block, "seconds": self.seconds}

    @classmethod
    def from_cell(cls, cell: Mapping[str, Any]) -> "BlockNats":
        """Read back what `cell` gives."""
        return cls(tuple(cell["nats"]), cell["tokens"], cell["seconds"])


@dataclass(frozen=True)
class Comparison:
    """A compressed run against the base run on the same blocks.

    Attributes:
        base_ppl: perplexity of the uncompressed model.
        ppl: perplexity with the compressed cache.
        delta_ppl: their difference, in points.
        delta_percent: the same in percent of `base_ppl`.
        interval: 95 % interval of `delta_ppl`; None where there is only one block.
        tokens: predicted tokens in all blocks.
    """

    base_ppl: float
    ppl: float
    delta_ppl: float
    delta_percent: float
    interval: tuple[float, float] | None
    tokens: int


class Piece(NamedTuple):
    """Tokens of a block that are fed at once, `first` up to `last`.

    Attributes:
        first: the first token that is fed.
        last: the first that is not.
        counted: how many of them, from the first on, make a prediction that counts.
    """

    first: int
    last: int
    counted: int


Feeding = tuple[Piece, ...]
"""How a block is fed, piece by piece, from its first token on."""


def feeding_of(protocol: ProtocolConfig, block_length: int) -> Feeding:
    """How the protocol feeds a block.

    Raises:
        UserError: the block is shorter than prefix and continuation.
    """
    if protocol.kind == "prefix":
        prefix, whole = protocol.prefix_length, protocol.measured_length(block_length)
        if block_length < whole:
            raise UserError(
                f"a prefix of {prefix} tokens and a continuation of {protocol.continuation} need blocks of {whole} "
                f"tokens, not of {block_length}; make one of them shorter, or the blocks longer"
            )
        return Piece(0, prefix, 0), Piece(prefix, whole, protocol.continuation - 1)
    chunk = {"strict": block_length, "stream": protocol.chunk, "decode": 1}[protocol.kind]
    # The last token of a block predicts nothing, but a whole block is fed whole.
    starts = range(0, block_length - 1, chunk)
    return tuple(
        Piece(first, min(first + chunk, block_length), min(chunk, block_length - 1 - first)) for first in starts
    )


def exact_window(protocol: ProtocolConfig) -> int:
    """The window that a compressed cache has under a protocol: all is exact until a prefix is coded whole."""
    return UNBOUNDED if protocol.kind == "prefix" else protocol.window


def measure_nats(
    model: Any,
    blocks: Blocks,
    protocol: ProtocolConfig,
    make_cache: Callable[[], Any],
    on_block: Callable[[], None] = lambda: None,
    prefixes: ExactPrefixes | None = None,
) -> BlockNats:
    """Negative log likelihood of each block, read through caches from `make_cache`.

    Args:
        model: a causal LM in eval mode.
        blocks: `[blocks, block_length]` tokens.
        protocol: how the blocks are fed.
        make_cache: a fresh transformers cache for a batch of blocks; the stock one for the base run. One of ours has
            the protocol's sinks and its `exact_window`.
        on_block: called after each block.
        prefixes: of this model, given where caches are ours and several are measured under `prefix`: the same numbers.

    Raises:
        UserError: the loss of a block is not finite, or blocks are too short for the protocol.
    """

    def begin(places: Sequence[int]) -> LogitsRun:
        return run_through(model, make_cache(), protocol.coded_after, prefixes)

    return measure_runs(model, blocks, protocol, begin, on_block)


@torch.no_grad()
def measure_runs(
    model: Any,
    blocks: Blocks,
    protocol: ProtocolConfig,
    begin: Callable[[Sequence[int]], LogitsRun],
    on_block: Callable[[], None] = lambda: None,
) -> BlockNats:
    """As `measure_nats`, for runs that have to know which blocks they read.

    Args:
        model: a causal LM in eval mode.
        blocks: `[blocks, block_length]` tokens.
        protocol: how the blocks are fed.
        begin: a run for a batch of blocks, given their places in `blocks`.
        on_block: called after each block.

    Raises:
        UserError: as `measure_nats`.
    """
    started = time.monotonic()
    nats: list[float] = []
    feeding = feeding_of(protocol, blocks.tokens.shape[1])
    for batch in blocks.tokens.split(protocol.batch_size):
        tokens = batch.to(model.device)
        total = torch.zeros(len(batch), dtype=torch.float64)
        places = range(len(nats), len(nats) + len(batch))
        for labels, (logits,) in feed(tokens, feeding, [begin(places)]):
            total += _sum_nats(logits, labels)
        check_finite(total, len(nats), blocks)
        nats += total.tolist()
        for _ in batch:
            on_block()
    return BlockNats(tuple(nats), sum(piece.counted for piece in feeding), time.monotonic() - started)


def run_through(
    model: Any, cache: Any, coded_after: int | None = None, prefixes: ExactPrefixes | None = None
) -> LogitsRun:
    """A run of the model through a fresh cache, as `feed` takes it.

    Args:
        model: a causal LM.
        cache: takes in every token.
        coded_after: tokens after which everything that the cache holds exact is coded, where it is one of ours.
        prefixes: where so many tokens are fed at first, the cache is filled from these.
    """
    fed = 0

    def run(inputs: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        nonlocal fed
        if fed == coded_after and isinstance(cache, LeanCache):
            cache.encode_all()
        is_prefix = fed == 0 and inputs.shape[1] == coded_after
        fed += inputs.shape[1]
        if is_prefix and prefixes is not None:
            prefixes.fill(cache, inputs)
            return iter(())
        return piecewise_logits(model, inputs, cache, count)

    return run


def feed(
    tokens: Int[torch.Tensor, "B T"], feeding: Feeding, runs: Sequence[LogitsRun]
) -> Iterator[tuple[Int[torch.Tensor, "B n"], tuple[Logits, ...]]]:
    """Feed blocks piece by piece to several runs of a model, side by side.

    Args:
        tokens: a batch of blocks.
        feeding: the pieces.
        runs: of models or caches that are to be compared.

    Yields:
        The tokens that are predicted, and each run's logits for them, a few rows at a time.
    """
    for first, last, counted in feeding:
        inputs, labels = tokens[:, first:last], tokens[:, first + 1 : first + 1 + counted]
        done = 0
        for logits in zip(*(run(inputs, counted) for run in runs), strict=True):
            rows = logits[0].shape[1]
            yield labels[:, done : done + rows], logits
            done += rows


def check_finite(nats: Float[torch.Tensor, " B"], done: int, blocks: Blocks) -> None:
    """Refuse the sums of a batch of blocks, the first of them number `done`, where one is not a number.

    Raises:
        UserError: naming the block.
    """
    if not torch.isfinite(nats).all():
        raise UserError(
            f"the loss of block {done} of the {blocks.split} split is not finite; try --dtype float32, or "
            "check the model's weights"
        )


def _sum_nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of `-log p(label)` for each row of the batch: `[B, T, V]`, `[B, T]` -> `[B]`, float64 on the CPU."""
    rows = zip(logits.flatten(0, 1).split(LOGIT_ROWS), labels.flatten().split(LOGIT_ROWS), strict=True)
    nats = torch.cat([label_nats(log_probabilities(some), own) for some, own in rows])
    return sum_by_block(nats, labels.shape)


def log_probabilities(logits: Float[torch.Tensor, "tokens V"]) -> Float32[torch.Tensor, "tokens V"]:
    """Natural logarithms of the probabilities that logits stand for, float32."""
    return logits.float().log_softmax(dim=1)


def label_nats(
    log_p: Float[torch.Tensor, "tokens V"], labels: Int[torch.Tensor, " tokens"]
) -> Float[torch.Tensor, " tokens"]:
    """`-log p(label)` of each token."""
    return -log_p.gather(1, labels[:, None])[:, 0]


def sum_by_block(values: Float[torch.Tensor, " BT"], shape: torch.Size) -> Float64[torch.Tensor, " B"]:
    """Sums of tokens' values over each block, the blocks being of `shape` `[B, T]`; float64 on the CPU."""
    return values.unflatten(0, shape).sum(dim=1, dtype=torch.float64).cpu()


def compare(base: BlockNats, compressed: BlockNats) -> Comparison:
    """Compare two runs over the same blocks, block by block.

    The interval is Student's t interval of the mean paired difference in nats a token, `d`, carried to perplexity by
    `base_ppl * (exp(d) - 1)`. Blocks are the sampling unit, since the tokens of one are not independent; the base
    perplexity is taken as given.
    """
    assert base.tokens_per_block == compressed.tokens_per_block, "paired runs see the same blocks"
    differences = [(c - b) / base.tokens_per_block for b, c in zip(base.nats, compressed.nats, strict=True)]
    return comparison_of(base, math.fsum(differences) / len(differences), t_interval(differences), len(differences))


def comparison_of(base: BlockNats, difference: float, interval: tuple[float, float] | None, blocks: int) -> Comparison:
    """A comparison from the mean paired difference in nats a token, its interval, and the blocks it was seen on."""
    base_ppl = base.perplexity
    rise = math.expm1(difference)
    return Comparison(
        base_ppl=base_ppl,
        ppl=base_ppl * (1 + rise),
        delta_ppl=base_ppl * rise,
        delta_percent=100 * rise,
        interval=None if interval is None else (base_ppl * math.expm1(interval[0]), base_ppl * math.expm1(interval[1])),
        tokens=base.tokens_per_block * blocks,
    )

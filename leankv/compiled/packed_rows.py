"""What a codec's code is to a compiled loop: rows of packed numbers, read by attention without being made.

A codec says how its rows are decoded (`Codec.packed_rows`); scores of keys and weighted sums of values then come from
loops that decode a few tokens at a time into a core's own cache (`leankv.compiled.reading_kernels`). All cores take
part, each with tokens of its own.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from typing import Any, ClassVar

import torch
from jaxtyping import Float

from leankv.compiled import array_of

BLOCK = 128
"""Codes for which queries are turned once; see `Meeting`. Assumption: tables of so many are small, and turns few."""

LEAST_TOKENS = 512
"""For each core: with fewer, starting it costs more than it does. Assumption."""

Scores = Float[torch.Tensor, "tokens queries"]
"""Of each token with the queries of all heads, float32. Tokens first: a loop over them writes one stretch of memory,
where rows that lie a power of two apart would push each other out of a core's cache."""


@dataclass(frozen=True)
class Meeting:
    """How keys meet the queries of one token.

    A score depends on how far a query is from a key. So of every `BLOCK` codes, each is rotated as if the first of them
    began the text, and the queries are turned back by where it does.

    Attributes:
        queries: `[blocks, heads, groups, head_dim]`, float32: turned for each block of codes.
        cos, sin: `[BLOCK, rotary]`, float32; `[1, 0]` for keys that are coded as they are cached: of one block then.
        halves: whether the pairs are halves of the rotated dimensions, or else neighbours.
    """

    queries: Float[torch.Tensor, "blocks heads groups head_dim"]
    cos: Float[torch.Tensor, "block rotary"]
    sin: Float[torch.Tensor, "block rotary"]
    halves: bool

    @classmethod
    def as_cached(cls, queries: Float[torch.Tensor, "heads groups head_dim"]) -> "Meeting":
        """Keys are coded as they are cached."""
        nothing = queries.new_empty(1, 0)
        return cls(queries[None], nothing, nothing, halves=True)

    @cached_property
    def arrays(self) -> tuple[Any, ...]:
        """What loops take."""
        return array_of(self.cos), array_of(self.sin), self.halves, array_of(self.queries)


class PackedRows:
    """The code of one sequence's tokens, `[N]`, as loops decode it.

    Args:
        tokens: N.
        width: of a vector.
    """

    def __init__(self, tokens: int, width: int):
        self.tokens, self.width = tokens, width

    def __len__(self) -> int:
        return self.tokens

    def scores(self, meeting: Meeting) -> Scores:
        """The products of all keys with the queries."""
        scores, how = torch.empty(self.tokens, meeting.queries[0, :, :, 0].numel()), meeting.arrays
        loop, into = getattr(_kernels(), f"{self.loops}_scores"), scores.numpy()
        _on_all_cores(self.tokens, lambda begin, end: loop(self._own, begin, end, self.width, how, into))
        return scores

    def weighted(self, weights: Scores, heads: int) -> Float[torch.Tensor, "{heads} groups head_dim"]:
        """Sums of all vectors' heads, each by its weight.

        Args:
            weights: of these tokens.
            heads: of a vector.
        """
        array, shape = array_of(weights), self._sums_shape(heads, weights.shape[1] // heads)
        loop = getattr(_kernels(), f"{self.loops}_sums")

        def sums(begin: int, end: int) -> torch.Tensor:
            out = torch.zeros(shape)
            loop(self._own, begin, end, self.width, array, out.numpy())
            return out

        parts = _on_all_cores(self.tokens, sums)
        return self._vectors(sum(parts[1:], start=parts[0]), weights, heads)

    _own: tuple[Any, ...]
    """The arrays, as loops take them."""

    loops: ClassVar[str]
    """What the loops that read such rows begin with: `affine` for `affine_scores` and `affine_sums`."""

    def _sums_shape(self, heads: int, groups: int) -> tuple[int, ...]:
        """Of what the loop adds up."""
        return heads, groups, self.width // heads

    def _vectors(self, sums: torch.Tensor, weights: Scores, heads: int) -> torch.Tensor:
        """Sums of vectors `[heads, groups, head_dim]`, from what was added up, and all weights."""
        return sums


class AffineRows(PackedRows):
    """`low + step q`; the arguments are those of `leankv.compiled.affine_levels`."""

    loops = "affine"

    def __init__(self, packed: torch.Tensor, bits: int, low: torch.Tensor, step: torch.Tensor, group: int, width: int):
        super().__init__(len(packed), width)
        low, step = (side.float().reshape(-1, width // group) for side in (low, step))
        self._own = array_of(packed), bits, array_of(low), array_of(step), group


class TableRows(PackedRows):
    """`mean + scale table[q]`, and the numbers in some slots as they are.

    Args:
        packed: uint8 `[N, bytes]`, as `leankv.codecs.coding.packing.pack` makes it.
        bits: of a number.
        table: `[2^bits]`.
        scale: `[width]`.
        mean: `[width]`.
        values: `[N, slots]`, what is added to the mean in place of what the table says.
        index: int32 `[N, slots]`, to which numbers.
    """

    loops = "table"

    def __init__(
        self,
        packed: torch.Tensor,
        bits: int,
        table: torch.Tensor,
        scale: torch.Tensor,
        mean: torch.Tensor,
        values: torch.Tensor,
        index: torch.Tensor,
    ):
        super().__init__(len(packed), len(mean))
        tensors = table.float(), scale.float(), mean.float(), values.float(), index
        self._own = array_of(packed), bits, *(array_of(tensor) for tensor in tensors)


class SynthesizedRows(PackedRows):
    """`mean + q B`, of numbers q that are summed before they are multiplied.

    Args:
        tokens: N.
        synthesis: B, float32 `[J, width]`.
        mean: `[width]`.
    """

    def __init__(
        self,
        tokens: int,
        synthesis: Float[torch.Tensor, "numbers width"],
        mean: Float[torch.Tensor, " width"],
    ):
        super().__init__(tokens, len(mean))
        # As loops read it, so that there is one of it.
        self._synthesis, self._mean = synthesis.detach().contiguous(), mean.detach().float()

    def _sums_shape(self, heads: int, groups: int) -> tuple[int, ...]:
        return len(self._synthesis), heads * groups

    def _vectors(self, sums: torch.Tensor, weights: Scores, heads: int) -> torch.Tensor:
        vectors = sums.T @ self._synthesis + weights.sum(dim=0)[:, None] * self._mean
        own = torch.arange(heads)  # of each group's vectors, the head that it reads
        return vectors.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))[own, :, own]


class ScaledRows(SynthesizedRows):
    """Numbers of a table, each token's scaled.

    Args:
        packed: uint8 `[N, bytes]`, as `leankv.codecs.coding.packing.pack` makes it.
        bits: of a number.
        table: `[2^bits]`.
        scale: float32 `[N]`.
        synthesis: B, float32 `[width, width]`.
        mean: `[width]`.
    """

    loops = "scaled"

    def __init__(
        self,
        packed: torch.Tensor,
        bits: int,
        table: torch.Tensor,
        scale: torch.Tensor,
        synthesis: Float[torch.Tensor, "width width"],
        mean: Float[torch.Tensor, " width"],
    ):
        super().__init__(len(packed), synthesis, mean)
        tensors = table.float(), scale, self._synthesis, self._mean
        self._own = array_of(packed), bits, *(array_of(tensor) for tensor in tensors)


class RadixRows(SynthesizedRows):
    """Integers in mixed radix with escapes.

    Args:
        packed: uint8 `[N, bytes]`.
        tables: as `leankv.codecs.coding.mixed_radix.MixedRadix` has them.
        escapes: counts, items and sizes, as `leankv.compiled.put_escapes` takes them.
        synthesis: B, float32 `[J, width]`.
        mean: `[width]`.
    """

    loops = "radix"

    def __init__(
        self,
        packed: torch.Tensor,
        tables: Sequence[torch.Tensor],
        escapes: Sequence[torch.Tensor],
        synthesis: Float[torch.Tensor, "integers width"],
        mean: Float[torch.Tensor, " width"],
    ):
        super().__init__(len(packed), synthesis, mean)
        groups = (packed, *tables), escapes, (self._synthesis, self._mean)
        self._own = tuple(tuple(array_of(tensor) for tensor in group) for group in groups)


@cache
def _kernels() -> Any:
    return import_module("leankv.compiled.reading_kernels")


@cache
def _cores() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads() - 1 or 1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_cores.cache_clear)  # a forked process has none of the threads


def _on_all_cores(tokens: int, work: Callable[[int, int], Any]) -> list[Any]:
    """What `work` gives for pieces that make up all tokens, one a core; this thread does the last."""
    pieces = max(1, min(torch.get_num_threads(), tokens // LEAST_TOKENS))
    borders = [tokens * piece // pieces for piece in range(pieces + 1)]
    others = [_cores().submit(work, *borders[piece : piece + 2]) for piece in range(pieces - 1)]
    last = work(*borders[-2:])
    return [other.result() for other in others] + [last]

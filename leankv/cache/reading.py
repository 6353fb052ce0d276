"""What a compressed layer hands to attention in place of keys and values: its codes, to be decoded piece by piece."""

import itertools
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float

from leankv.cache.key_space import KeySpace
from leankv.cache.part_store import PartStore, Rows
from leankv.codecs import Factored
from leankv.models.rope import Table

PIECE = 1024
"""Tokens that are decoded at a time, at most: what stays in a processor's cache, and bounds what a step takes."""

LOOPED_PIECE = 2048
"""Tokens that compiled loops read at a time, at most: their scores, and the scales of their codes, bound what a step
takes. Assumption: few enough starts of loops."""


class Keys:
    """Keys of some tokens, or what they are rotated from.

    Args:
        held: `[B, heads, n, head_dim]`.
        space: where they were taken from, if they are not as the cache has them.
        first: then, which token of the sequence they begin with.
        offsets: then, what rotates them from there.
    """

    def __init__(self, held: Rows, space: KeySpace | None = None, first: int = 0, offsets: Table | None = None):
        self._space, self._first = space, first
        self._held = held.float() if space is None else space.turned(held, offsets)

    def __len__(self) -> int:
        return self._held.shape[2]

    def scores(
        self, queries: Float[torch.Tensor, "B heads queries head_dim"]
    ) -> Float[torch.Tensor, "B heads queries _"]:
        """Products with queries as the model has them, float32."""
        if self._space is not None:
            queries = self._space.met(queries, self._first)
        return queries @ self._held.mT


class Values:
    """Values of some tokens, or what their codec makes them from.

    Args:
        held: `[B, heads, n, head_dim]`, or as products `[B * n]`.
        heads: how many there are.
    """

    def __init__(self, held: Rows | Factored, heads: int):
        self._held, self._heads = held, heads

    def weighted(self, weights: Float[torch.Tensor, "B heads queries n"]) -> Float[torch.Tensor, "B heads queries _"]:
        """Sums of values, each by its weight. Products are not multiplied out: their coefficients are summed."""
        if isinstance(self._held, torch.Tensor):
            return weights @ self._held.float()
        coefficients = self._held.coefficients.unflatten(0, (len(weights), -1))
        synthesis = self._held.synthesis.unflatten(1, (self._heads, -1)).transpose(0, 1)  # [heads, rank, head_dim]
        mean = self._held.mean.unflatten(0, (self._heads, 1, -1))
        summed = (weights.flatten(1, 2) @ coefficients).unflatten(1, weights.shape[1:3])
        return summed @ synthesis + weights.sum(dim=3, keepdim=True) * mean


class PackedKeys:
    """Keys of some tokens of one sequence, read by compiled loops.

    Args:
        store: holds their codes.
        first, last: which of the tokens held they are.
    """

    def __init__(self, store: PartStore, first: int, last: int):
        self._store, self._first, self._last = store, first, last

    def __len__(self) -> int:
        return self._last - self._first

    def scores(
        self, queries: Float[torch.Tensor, "1 heads groups head_dim"]
    ) -> Float[torch.Tensor, "1 heads groups _"]:
        """As `Keys.scores`, of which loops write a token's beside each other."""
        meeting = self._store.meeting(self._first, self._last, queries)
        scores = self._store.packed(self._first, self._last).scores(meeting)
        return scores.T.unflatten(0, queries.shape[1:3])[None]


class PackedValues:
    """Values of some tokens of one sequence, read by compiled loops.

    Args:
        store: holds their codes.
        first, last: which of the tokens held they are.
        heads: how many there are.
    """

    def __init__(self, store: PartStore, first: int, last: int, heads: int):
        self._store, self._first, self._last, self._heads = store, first, last, heads

    def weighted(self, weights: Float[torch.Tensor, "1 heads groups n"]) -> Float[torch.Tensor, "1 heads groups _"]:
        """Sums of values, each by its weight."""
        rows = self._store.packed(self._first, self._last)
        return rows.weighted(weights[0].flatten(0, 1).T, self._heads)[None]


class LayerReading:
    """One layer's keys and values in one forward pass; to be read once, before the next layer is updated.

    Args:
        keys: what is held of keys, the new ones included.
        values: the same of values.
        new_keys: `[B, heads, T, head_dim]` as the model made them: dtype, device and heads are those of all.
        new_values: likewise.
        start: of the tokens held, the first that attention sees.
        on_end: called when all was read.
    """

    def __init__(
        self,
        keys: PartStore,
        values: PartStore,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        start: int = 0,
        on_end: Callable[[], None] | None = None,
    ):
        self.start, self.heads = start, new_keys.shape[1]
        self._parts = ((keys, new_keys), (values, new_values))
        self._on_end = on_end

    def __len__(self) -> int:
        """Tokens that attention sees."""
        return len(self._parts[0][0]) - self.start

    def pieces(
        self, queries: int, by_loops: bool = False
    ) -> Iterator[tuple[int, Keys | PackedKeys, Values | PackedValues]]:
        """Number of a piece's first token among those that attention sees, its keys, and its values.

        Nothing of the whole context is made, but for what later layers predict from.

        Args:
            queries: that read a head's values: products are worth it for fewer of them than a head is wide.
            by_loops: whether compiled loops read the codes where they can: for one token's queries, of one sequence.
        """
        (key_store, new_keys), (value_store, new_values) = self._parts
        stores = (key_store, value_store)
        total, device = len(stores[0]), new_keys.device
        length = min(PIECE, *(store.piece_length(device) for store in stores))
        by_loops = by_loops and all(store.has_loops for store in stores)
        if by_loops:
            length = LOOPED_PIECE
        borders = {self.start, total}.union(*(store.borders() for store in stores))
        is_shown = any(store.cross_layer.readers for store in stores)
        space = key_store.code_space
        offsets = None if space is None or by_loops else space.offsets(min(length, total), device)
        for first, end in itertools.pairwise(sorted(borders)):
            if first < self.start and not is_shown:
                continue
            for begin in range(first, end, length):
                last = min(begin + length, end)
                keys: Keys | PackedKeys
                if by_loops and key_store.holds_codes(begin, last):
                    keys = PackedKeys(key_store, begin, last)
                else:
                    rows, place = key_store.piece(begin, last, new_keys)
                    keys = Keys(rows) if place is None else Keys(rows, space, place, offsets)
                values: Values | PackedValues
                if by_loops and value_store.holds_codes(begin, last):
                    values = PackedValues(value_store, begin, last, self.heads)
                else:
                    products = value_store.factored(begin, last) if queries < new_values.shape[3] else None
                    dense = value_store.piece(begin, last, new_values)[0] if products is None else products
                    values = Values(dense, self.heads)
                if begin >= self.start:
                    yield begin - self.start, keys, values
        self._end()

    def _end(self) -> None:
        for store, _ in self._parts:
            store.end_reading()
        if self._on_end is not None:
            self._on_end()

"""What a compressed layer hands to attention in place of keys and values: its codes, to be decoded piece by piece."""

import itertools
from collections.abc import Callable, Iterator

import torch

from leankv.cache.part_store import PartStore, Rows

PIECE = 1024
"""Tokens that are decoded at a time, at most: what stays in a processor's cache, and bounds what a step takes."""


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

    def pieces(self) -> Iterator[tuple[int, Rows, Rows]]:
        """Number of a piece's first token among those that attention sees, its keys, and its values.

        Nothing of the whole context is made, but for what later layers predict from.
        """
        stores = [store for store, _ in self._parts]
        total, length = len(stores[0]), min(PIECE, *(store.piece_length for store in stores))
        borders = {self.start, total}.union(*(store.borders() for store in stores))
        is_shown = any(store.cross_layer.readers for store in stores)
        for first, end in itertools.pairwise(sorted(borders)):
            if first < self.start and not is_shown:
                continue
            for begin in range(first, end, length):
                keys, values = (store.piece(begin, min(begin + length, end), like) for store, like in self._parts)
                if begin >= self.start:
                    yield begin - self.start, keys, values
        for store in stores:
            store.end_reading()
        if self._on_end is not None:
            self._on_end()

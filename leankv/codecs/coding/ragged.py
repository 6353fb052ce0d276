"""Rows of different lengths, as one flat tensor: what a code may hold where tokens need more or less room."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int64, Integer, UInt8

from leankv.codecs.coding.column import Column


@dataclass(frozen=True)
class Ragged(Column):
    """Rows of bytes, one a token; row after row in `data`.

    Attributes:
        data: uint8 `[total]`.
        counts: uint8 `[N]` or `[B, T]`, how many items each row has.
        item: bytes of one item.
    """

    data: UInt8[torch.Tensor, " total"]
    counts: UInt8[torch.Tensor, "*leading"]
    item: int

    @classmethod
    def of(cls, items: UInt8[torch.Tensor, "total item"], counts: Integer[torch.Tensor, " tokens"]) -> "Ragged":
        """Rows from all items in order, and how many (at most 255) belong to each row."""
        return cls(items.reshape(-1), counts.to(torch.uint8), items.shape[1])

    def items(self) -> UInt8[torch.Tensor, "total item"]:
        """All items, in order."""
        return self.data.view(-1, self.item)

    def row_numbers(self) -> Int64[torch.Tensor, " total"]:
        """Which row (counted over all leading dimensions) each item belongs to."""
        flat = self.counts.flatten().long()
        total = len(self.data) // self.item  # told, so that nobody waits for a GPU to count
        return torch.repeat_interleave(torch.arange(len(flat), device=flat.device), flat, output_size=total)

    def _grid(self) -> torch.Tensor:
        """The number of each row, in the shape of `counts`."""
        return torch.arange(self.counts.numel(), device=self.data.device).reshape(self.counts.shape)

    def _taken(self, numbers: torch.Tensor) -> "Ragged":
        """Copies of rows, by their numbers over all leading dimensions; they take the shape of `numbers`."""
        flat = self.counts.flatten().long()
        lengths = flat[numbers.flatten()] * self.item
        starts = ((flat.cumsum(0) - flat) * self.item)[numbers.flatten()]
        within = torch.arange(int(lengths.sum()), device=flat.device)
        within = within - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        data = self.data[torch.repeat_interleave(starts, lengths) + within]
        return Ragged(data, self.counts.flatten()[numbers.flatten()].reshape(numbers.shape), self.item)

    def flatten(self) -> "Ragged":
        return Ragged(self.data, self.counts.flatten(), self.item)

    def unflatten(self, batch: int) -> "Ragged":
        return Ragged(self.data, self.counts.unflatten(0, (batch, -1)), self.item)

    def append(self, *others: "Ragged") -> "Ragged":
        parts = (self, *others)
        counts = torch.cat([part.counts.flatten() for part in parts])
        joined = Ragged(torch.cat([part.data for part in parts]), counts, self.item)
        if len(self.counts) == 1:
            return joined.unflatten(1)
        before = itertools.accumulate((part.counts.numel() for part in parts[:-1]), initial=0)
        grids = [part._grid() + count for part, count in zip(parts, before, strict=True)]
        return joined._taken(torch.cat(grids, dim=1))

    def narrow(self, first: int, last: int) -> "Ragged":
        """Tokens `first` to `last` of each row of `[B, T]`; views where there is one row."""
        if len(self.counts) > 1:
            return self._taken(self._grid()[:, first:last])
        start, length = (
            int(counts.sum()) * self.item for counts in (self.counts[:, :first], self.counts[:, first:last])
        )
        return Ragged(self.data[start : start + length], self.counts[:, first:last], self.item)

    def index(self, rows: torch.Tensor) -> "Ragged":
        """Copies of rows along the first dimension, by number or by mask."""
        return self._taken(self._grid()[rows.to(self.data.device)])

    def clone(self) -> "Ragged":
        return Ragged(self.data.clone(), self.counts.clone(), self.item)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Ragged":
        data, counts = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.data, self.counts))
        return Ragged(data, counts, self.item)

    def tensors(self) -> list[torch.Tensor]:
        """`counts` first: they say how much of `data` there is."""
        return [self.counts, self.data]

    def read(self, take: Callable[[int, torch.dtype], torch.Tensor], tokens: int) -> "Ragged":
        counts = take(tokens, torch.uint8)
        return Ragged(take(int(counts.long().sum()) * self.item, torch.uint8), counts, self.item)

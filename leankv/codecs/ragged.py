"""Rows of different lengths, as one flat tensor: what a code may hold where tokens need more or less room."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ragged:
    """Rows of bytes, one a token; row after row in `data`.

    Attributes:
        data: uint8 `[total]`.
        counts: uint8 `[...]`, how many items each row has; the leading shape of the code it is part of.
        item: bytes of one item.
    """

    data: torch.Tensor
    counts: torch.Tensor
    item: int

    @classmethod
    def of(cls, items: torch.Tensor, counts: torch.Tensor) -> "Ragged":
        """Rows from all items `[total, item]` (uint8) in order, and how many belong to each row, `[N]`, at most 255."""
        return cls(items.reshape(-1), counts.to(torch.uint8), items.shape[1])

    @property
    def shape(self) -> torch.Size:
        """The leading shape, as a tensor's."""
        return self.counts.shape

    def __len__(self) -> int:
        return len(self.counts)

    def items(self) -> torch.Tensor:
        """`[total, item]`."""
        return self.data.view(-1, self.item)

    def row_numbers(self) -> torch.Tensor:
        """Which row (counted over all leading dimensions) each item belongs to, `[total]`."""
        flat = self.counts.flatten().long()
        return torch.repeat_interleave(torch.arange(len(flat), device=flat.device), flat)

    def unflatten(self, shape: Sequence[int]) -> "Ragged":
        """The same rows with another leading shape."""
        return Ragged(self.data, self.counts.reshape(*shape), self.item)

    def flatten(self) -> "Ragged":
        """The same rows, `[N]`."""
        return self.unflatten((-1,))

    def __getitem__(self, numbers: torch.Tensor) -> "Ragged":
        """Copies of rows, by their numbers over all leading dimensions; they take the shape of `numbers`."""
        flat = self.counts.flatten().long()
        lengths = flat[numbers.flatten()] * self.item
        starts = ((flat.cumsum(0) - flat) * self.item)[numbers.flatten()]
        within = torch.arange(int(lengths.sum()), device=flat.device)
        within = within - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        data = self.data[torch.repeat_interleave(starts, lengths) + within]
        return Ragged(data, self.counts.flatten()[numbers.flatten()].reshape(numbers.shape), self.item)

    def columns(self, first: int, last: int) -> "Ragged":
        """Tokens `first` to `last` of each row of `[B, T]`; views where there is one row."""
        if len(self.counts) > 1:
            numbers = torch.arange(self.counts.numel(), device=self.data.device).reshape(self.shape)
            return self[numbers[:, first:last]]
        start, length = (
            int(counts.sum()) * self.item for counts in (self.counts[:, :first], self.counts[:, first:last])
        )
        return Ragged(self.data[start : start + length], self.counts[:, first:last], self.item)

    def clone(self) -> "Ragged":
        return Ragged(self.data.clone(), self.counts.clone(), self.item)

    def followed_by(self, other: "Ragged") -> "Ragged":
        """`[B, T]` and `[B, S]` -> `[B, T + S]`."""
        both = Ragged(
            torch.cat([self.data, other.data]), torch.cat([self.counts.flatten(), other.counts.flatten()]), self.item
        )
        if len(self.counts) == 1:
            return both.unflatten((1, -1))
        first = torch.arange(self.counts.numel(), device=self.data.device).reshape(self.counts.shape)
        second = torch.arange(other.counts.numel(), device=self.data.device).reshape(other.counts.shape)
        return both[torch.cat([first, second + first.numel()], dim=1)]

    def to(self, device: torch.device) -> "Ragged":
        return Ragged(self.data.to(device), self.counts.to(device), self.item)

    def tensors(self) -> list[torch.Tensor]:
        return [self.counts, self.data]

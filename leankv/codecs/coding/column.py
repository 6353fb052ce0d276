"""The parts of a code: what one tensor, or one set of rows of different lengths, says of each token."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


class Column(ABC):
    """One part of a code: something of each token. Its leading dimensions are `[N]`, or in a cache `[B, T]`.

    There are two kinds: `Dense`, where all tokens take the same room, and `leankv.codecs.coding.ragged.Ragged`.
    """

    @abstractmethod
    def flatten(self) -> "Column":
        """`[B, T]` -> `[B * T]`."""

    @abstractmethod
    def unflatten(self, batch: int) -> "Column":
        """`[B * T]` -> `[B, T]`."""

    @abstractmethod
    def append(self, *others: Any) -> "Column":
        """`[B, T]` and others `[B, S]` of the same kind -> `[B, T + S + ...]`."""

    @abstractmethod
    def narrow(self, first: int, last: int) -> "Column":
        """Tokens `first` to `last` of each row of `[B, T]`; views where they can be."""

    @abstractmethod
    def index(self, rows: torch.Tensor) -> "Column":
        """Copies of rows along the first dimension, by number or by mask."""

    @abstractmethod
    def clone(self) -> "Column":
        """A copy that keeps nothing else alive."""

    @abstractmethod
    def to(self, device: torch.device, non_blocking: bool = False) -> "Column":
        """The same on a device."""

    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that it consists of, in the order in which they are serialized."""

    @abstractmethod
    def read(self, take: Callable[[int, torch.dtype], torch.Tensor], tokens: int) -> "Column":
        """A column `[tokens]` of the same kind; `take(count, dtype)` gives the next numbers of what was serialized."""


@dataclass(frozen=True)
class Dense(Column):
    """A column that takes the same room for each token: a tensor `[N, ...]`, or `[B, T, ...]`."""

    data: torch.Tensor

    def flatten(self) -> "Dense":
        return Dense(self.data.flatten(0, 1))

    def unflatten(self, batch: int) -> "Dense":
        return Dense(self.data.unflatten(0, (batch, -1)))

    def append(self, *others: "Dense") -> "Dense":
        return Dense(torch.cat([self.data, *(other.data for other in others)], dim=1))

    def narrow(self, first: int, last: int) -> "Dense":
        return Dense(self.data[:, first:last])

    def index(self, rows: torch.Tensor) -> "Dense":
        return Dense(self.data[rows.to(self.data.device)])

    def clone(self) -> "Dense":
        return Dense(self.data.clone())

    def to(self, device: torch.device, non_blocking: bool = False) -> "Dense":
        return Dense(self.data.to(device, non_blocking=non_blocking))

    def tensors(self) -> list[torch.Tensor]:
        return [self.data]

    def read(self, take: Callable[[int, torch.dtype], torch.Tensor], tokens: int) -> "Dense":
        like = self.data
        return Dense(take(tokens * like[0].numel(), like.dtype).reshape(tokens, *like.shape[1:]))

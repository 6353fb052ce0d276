"""Codes: what encoding gives, and what a cache does with them token by token."""

from collections.abc import Callable, Mapping

import torch

from leankv.codecs.coding.column import Column, Dense
from leankv.codecs.coding.ragged import Ragged


class Code:
    """The code of some tokens: named columns, packed as they are stored.

    Encoding gives the code of N tokens; a cache holds one of B rows of T tokens each. It is a value: every method gives
    another code.

    Attributes:
        columns: by name, never none.
        shape: `(N,)` or `(B, T)`.
    """

    def __init__(self, columns: Mapping[str, torch.Tensor | Column], shape: tuple[int, ...] | None = None):
        """
        Args:
            columns: tensors `[N, ...]`, or `Ragged` ones of N rows.
            shape: as the attribute; N is read off the first column unless given.
        """
        self.columns: dict[str, Column] = {
            name: Dense(column) if isinstance(column, torch.Tensor) else column for name, column in columns.items()
        }
        self.shape = shape or (len(next(iter(self.columns.values())).tensors()[0]),)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor of a column that takes the same room for each token."""
        column = self.columns[name]
        assert isinstance(column, Dense), f"{name} is ragged"
        return column.data

    def ragged(self, name: str) -> Ragged:
        """A column whose rows differ in length."""
        column = self.columns[name]
        assert isinstance(column, Ragged), f"{name} is not ragged"
        return column

    def _each(self, change: Callable[[Column], Column], shape: tuple[int, ...]) -> "Code":
        return Code({name: change(column) for name, column in self.columns.items()}, shape)

    def flatten(self) -> "Code":
        """`[B, T]` -> `[B * T]`."""
        return self._each(lambda column: column.flatten(), (self.shape[0] * self.shape[1],))

    def unflatten(self, batch: int) -> "Code":
        """`[B * T]` -> `[B, T]`."""
        return self._each(lambda column: column.unflatten(batch), (batch, self.shape[0] // batch))

    def rows(self) -> list["Code"]:
        """The codes `[T]` of the rows of `[B, T]`."""
        if self.shape[0] == 1:
            return [self.flatten()]
        return [self.index(row).flatten() for row in torch.arange(self.shape[0]).split(1)]

    def append(self, *others: "Code") -> "Code":
        """`[B, T]`, `[B, S]` and so on -> `[B, T + S + ...]`."""
        if not others:
            return self  # and not a copy
        joined = {
            name: column.append(*(other.columns[name] for other in others)) for name, column in self.columns.items()
        }
        return Code(joined, (self.shape[0], sum(code.shape[1] for code in (self, *others))))

    def narrow(self, first: int, last: int) -> "Code":
        """Tokens `first` to `last` of each row of `[B, T]`; views where they can be, which keep all of it alive."""
        return self._each(lambda column: column.narrow(first, last), (self.shape[0], last - first))

    def index(self, rows: torch.Tensor) -> "Code":
        """Copies of rows along the first dimension, by number or by mask."""
        count = int(rows.sum()) if rows.dtype == torch.bool else len(rows)
        return self._each(lambda column: column.index(rows), (count, *self.shape[1:]))

    def clone(self) -> "Code":
        """A copy that keeps nothing else alive."""
        return self._each(lambda column: column.clone(), self.shape)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Code":
        """The same on a device."""
        return self._each(lambda column: column.to(device, non_blocking), self.shape)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors that it consists of."""
        return [tensor for column in self.columns.values() for tensor in column.tensors()]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def to_bytes(self) -> bytes:
        """All tensors behind each other, as they are."""
        return b"".join(t.cpu().contiguous().view(torch.uint8).numpy().data for t in self.tensors())

    def read(self, data: bytes, tokens: int) -> "Code":
        """The way back from `to_bytes`, on the CPU.

        Args:
            data: the bytes of a code `[tokens]`.
            tokens: N.

        Returns:
            A code whose columns are of the kinds that this one's are.

        Raises:
            ValueError: these are more or fewer bytes than such a code's.
        """
        stream, offset = memoryview(data), 0

        def take(count: int, dtype: torch.dtype) -> torch.Tensor:
            nonlocal offset
            piece = stream[offset : offset + count * dtype.itemsize]
            if len(piece) < count * dtype.itemsize:
                raise ValueError("a stream is cut off")
            offset += len(piece)
            return torch.frombuffer(bytearray(piece), dtype=dtype) if piece else torch.empty(0, dtype=dtype)

        code = self._each(lambda column: column.read(take, tokens), (tokens,))
        if offset != len(data):
            raise ValueError(f"a stream of {tokens} tokens has {len(data) - offset} bytes too many")
        return code

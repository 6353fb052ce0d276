"""Shards: the part of a sweep's layers that one worker of several takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from leankv.errors import UserError


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 1) of `count`: every `count`-th layer, so that all parts get early and late layers."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `2/8`.

        Raises:
            UserError: it is not two numbers, or not between `1/8` and `8/8`.
        """
        index, _, count = (piece.strip() for piece in text.partition("/"))
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise UserError(
                f"--shard {text!r} is no part of the layers; of 8 workers, the first is 1/8 and the last 8/8"
            )
        return cls(int(index), int(count))

    @classmethod
    def all_of(cls, count: int) -> tuple["Shard", ...]:
        """The shards that make up the whole."""
        return tuple(cls(index, count) for index in range(1, count + 1))

    def part(self, layers: Sequence[int]) -> tuple[int, ...]:
        """The layers of this shard."""
        return tuple(layers[self.index - 1 :: self.count])

    @property
    def file_name(self) -> str:
        """As part of a file's name: `2of8`."""
        return f"{self.index}of{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

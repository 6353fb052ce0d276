"""Blocks of tokens: the unit that everything is measured on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Blocks:
    """Blocks of tokens from one split.

    Attributes:
        tokens: `[blocks, block_length]` token ids (int64, CPU).
        split: where they come from: a name in `SPLITS`, or `all`.
        source: the data set's name, for people.
    """

    tokens: torch.Tensor
    split: str
    source: str

    @property
    def hash(self) -> str:
        """sha256 (hex) of the token ids: what a result that used these blocks depends on."""
        shape = str(tuple(self.tokens.shape)).encode()
        return hashlib.sha256(shape + self.tokens.contiguous().numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, numbers: Sequence[int]) -> "Blocks":
        """Some of these blocks, in the order of `numbers`."""
        return Blocks(self.tokens[list(numbers)], self.split, self.source)

"""Documents as the unit of measurement: the beginning of each, as one block of its own length.

What a split reads as one stream of text for its blocks is read here article by article: tokens of one document depend
on each other, documents hardly do, so the document is what may be counted as one draw from its source.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from leankv.data.blocks import Blocks
from leankv.data.tokens import bos_tokens, first_tokens


@runtime_checkable
class DocumentSource(Protocol):
    """Text that comes in documents."""

    name: str

    def documents(self, split: str, tokenizer: Any) -> list[str]:
        """The texts of a split's documents, in order."""


@dataclass(frozen=True)
class Documents:
    """The documents of a split, as far as they are read.

    Attributes:
        blocks: one block of one row for each document, in the source's order; they differ in length.
        left_out: documents that are too short to be among them.
        least_tokens: tokens, BOS included, that a document among them has at least.
        block_length: tokens, BOS included, that are read of each at most.
        source: the data set's name, for people.
    """

    blocks: tuple[Blocks, ...]
    left_out: int
    least_tokens: int
    block_length: int
    source: str

    def __len__(self) -> int:
        return len(self.blocks)


def documents_of(
    texts: Sequence[str], tokenizer: Any, block_length: int, least_tokens: int, split: str, source: str
) -> Documents:
    """The first `block_length` tokens of each document that is long enough.

    Those that are not are left out, not joined to their neighbours: joined they would be documents that the source does
    not have. In WikiText-2 they are rows of tables that look like an article's heading.

    Args:
        texts: the documents.
        tokenizer: of the model; where it begins a sequence with BOS, so does every document.
        block_length: tokens of each that are read at most, BOS included.
        least_tokens: documents with fewer, BOS included, are left out; at most `block_length` is asked for.
        split: where they come from.
        source: the data set's name.
    """
    bos = bos_tokens(tokenizer)
    least = min(least_tokens, block_length)
    blocks = []
    for text in texts:
        ids = [*bos, *first_tokens(text, tokenizer, block_length - len(bos))][:block_length]
        if len(ids) >= least:
            blocks.append(Blocks(torch.tensor([ids], dtype=torch.int64), split, source))
    return Documents(tuple(blocks), len(texts) - len(blocks), least, block_length, source)

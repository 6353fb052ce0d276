"""Text that is handed in from Python: a string, documents, or blocks of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from leankv.data.blocks import Blocks
from leankv.data.tokens import bos_tokens, in_blocks, tokens_of
from leankv.errors import UserError

Text = str | Sequence[str] | torch.Tensor
"""A text, its documents, or token ids `[blocks, block_length]`."""


def blocks_of(text: Text, tokenizer: Any, block_length: int, least: int = 1) -> torch.Tensor:
    """All whole blocks of a text, `[blocks, block_length]` (int64).

    Args:
        text: as given. Documents are read one behind the other; token ids are taken as they are.
        tokenizer: of the model.
        block_length: tokens in a block, BOS included; token ids have their own.
        least: blocks that are needed.

    Raises:
        UserError: there are fewer, or it is no text.
    """
    if isinstance(text, torch.Tensor):
        if text.ndim != 2 or text.is_floating_point() or text.shape[1] < 2:
            raise UserError(
                "token blocks must be whole numbers of shape [blocks, block_length], two tokens a block or more, not "
                f"{tuple(text.shape)} {str(text.dtype).removeprefix('torch.')}"
            )
        tokens = text.long().cpu()
    else:
        whole = text if isinstance(text, str) else _joined(text)
        if tokenizer is None:
            raise UserError("a text needs a tokenizer; give one, or token blocks of shape [blocks, block_length]")
        bos = bos_tokens(tokenizer)
        if block_length < 2 + len(bos):
            raise UserError(f"block_length must be at least {2 + len(bos)} with this tokenizer, not {block_length}")
        tokens = in_blocks(tokens_of(whole, tokenizer), bos, block_length)
    if len(tokens) < least:
        raise UserError(
            f"the text makes {len(tokens)} blocks of {tokens.shape[1]} tokens, but {least} are needed; give more text, "
            "or a smaller block_length"
        )
    return tokens


def _joined(documents: Any) -> str:
    if not isinstance(documents, Sequence) or not all(isinstance(document, str) for document in documents):
        raise UserError(
            "text must be a string, a list of strings, or a tensor of token ids [blocks, block_length], not "
            f"{type(documents).__name__}"
        )
    return "\n".join(documents)


class GivenBlocks:
    """Blocks handed in for each split, in the place of a data set."""

    name = "text given from Python"

    def __init__(self, by_split: Mapping[str, torch.Tensor]):
        """
        Args:
            by_split: split -> token ids `[blocks, block_length]`.
        """
        self._by_split = by_split

    def blocks(self, split: str, tokenizer: Any, n_blocks: int, block_length: int) -> Blocks:
        """The first `n_blocks` blocks of a split, of the length that they have.

        Raises:
            UserError: no text was given for the split.
        """
        if split not in self._by_split:
            raise UserError(f"no {split} text was given")
        return Blocks(self._by_split[split][:n_blocks], split, self.name)

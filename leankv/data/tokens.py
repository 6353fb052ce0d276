"""From text to blocks of tokens.

A text is tokenized as one stream and cut into blocks. A tokenizer that begins a sequence with its BOS token (Llama,
Gemma) has it begin every block, since a block is a sequence of its own to the model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int

CHARACTERS_PER_TOKEN = 8  # assumption: more than English text needs; doubled until there are tokens enough
SPARE_TOKENS = 64  # assumption: where a text is cut changes fewer tokens than these before the cut


def tokens_of(text: str, tokenizer: Any) -> list[int]:
    """The token ids of a text, without BOS."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def first_tokens(text: str, tokenizer: Any, wanted: int) -> list[int]:
    """The first tokens of a text, `wanted` of them or some more; fewer where it has no more."""
    length = wanted * CHARACTERS_PER_TOKEN
    while True:
        # A token cut in two at the end of the piece must not be among those used, hence the spare ones.
        ids = tokens_of(text[:length], tokenizer)
        if len(ids) >= wanted + SPARE_TOKENS or length >= len(text):
            return ids
        length *= 2


def bos_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: its BOS token, or nothing."""
    bos = tokenizer.bos_token_id
    probe = tokenizer("a")["input_ids"]
    return [bos] if bos is not None and probe and probe[0] == bos else []


def in_blocks(ids: Sequence[int], bos: Sequence[int], block_length: int) -> Int[torch.Tensor, "blocks block_length"]:
    """As many whole blocks as the tokens make, each beginning with `bos`; what is left over is dropped."""
    body = block_length - len(bos)
    n_blocks = len(ids) // body
    tokens = torch.tensor(ids[: n_blocks * body], dtype=torch.int64).reshape(n_blocks, body)
    return torch.cat([torch.tensor(bos, dtype=torch.int64).expand(n_blocks, -1), tokens], dim=1)

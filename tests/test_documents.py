"""Documents as the unit of measurement: what is read of each, and which are left out."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from leankv.data.documents import documents_of
from tests import tiny

TOKENIZER = tiny.tokenizer()
"""One token a byte, no BOS."""


class WithBos:
    """A tokenizer that begins a sequence with token 300."""

    bos_token_id = 300

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [300, *ids] if add_special_tokens else ids}


TEXTS = st.lists(st.text("abc ", max_size=40), max_size=12)


@given(TEXTS, st.integers(4, 30), st.integers(2, 30))
def test_each_document_that_is_long_enough_is_its_first_tokens(texts: list[str], length: int, least: int) -> None:
    documents = documents_of(texts, TOKENIZER, length, least, "certification", "some text")
    enough = [text for text in texts if len(text) >= min(least, length)]
    assert [TOKENIZER.decode(block.tokens[0]) for block in documents.blocks] == [text[:length] for text in enough]
    assert all(block.tokens.shape[0] == 1 for block in documents.blocks)
    assert documents.left_out == len(texts) - len(enough)
    assert documents.least_tokens == min(least, length)


def test_bos_begins_each_document_and_is_one_of_its_tokens() -> None:
    texts = ["abcdefghij", "abc", "ab"]
    with_bos = documents_of(texts, WithBos(), 6, 4, "certification", "some text")
    assert [block.tokens[0, 0].item() for block in with_bos.blocks] == [300, 300]
    assert [block.tokens.shape[1] for block in with_bos.blocks] == [6, 4]
    without = documents_of(texts, TOKENIZER, 5, 3, "certification", "some text")
    for one, other in zip(with_bos.blocks, without.blocks, strict=True):
        assert torch.equal(one.tokens[:, 1:], other.tokens)

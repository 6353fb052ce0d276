"""The cache that `generate` makes by itself: whose, in which thread, for which prompt, and when it is another."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import leankv
from leankv.cache.default_cache import METHOD
from tests import tiny
from tests.test_api import BLOCK, generated


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.build("llama")


@pytest.fixture(scope="module")
def other() -> torch.Tensor:
    return tiny.tokens(4, BLOCK, seed=1)


@pytest.fixture(scope="module")
def bundle(llama: Any) -> leankv.Bundle:
    return leankv.fit("int:4g8", llama, None, tiny.tokens(8, BLOCK), sinks=2, window=8)


def test_padding_without_a_mask_is_what_transformers_takes_for_it(
    llama: Any, other: torch.Tensor, bundle: leankv.Bundle
) -> None:
    """The padding token, unless it ends texts too: then it may be one of the prompt's own."""
    padded = torch.cat([torch.full((1, 5), 0), other[:1, :20]], dim=1)
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    masks = {None: padded.ne(0).long(), 0: torch.ones_like(padded), 300: padded.ne(0).long()}
    with leankv.compressed(llama, bundle):
        for eos, mask in masks.items():
            expected = llama.generate(padded, attention_mask=mask, eos_token_id=eos, **how)
            assert torch.equal(llama.generate(padded, eos_token_id=eos, **how), expected)


@pytest.mark.parametrize("asked", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"])
def test_other_caches_that_are_asked_for_are_used(
    llama: Any, other: torch.Tensor, bundle: leankv.Bundle, asked: dict[str, Any]
) -> None:
    expected = generated(llama, other[:1], **asked)
    with leankv.compressed(llama, bundle):
        assert torch.equal(generated(llama, other[:1], **asked), expected)


def test_threads_generate_with_their_own_bundles(llama: Any, other: torch.Tensor, bundle: leankv.Bundle) -> None:
    """And one that has none, with the latest; afterwards the model is as it was."""
    coarse = leankv.fit("int:2g8", llama, None, tiny.tokens(8, BLOCK), sinks=0, window=0)
    expected = [generated(llama, other[:1], past_key_values=each.new_cache()) for each in (bundle, coarse)]
    stock = generated(llama, other[:1])
    entered, first_left = threading.Event(), threading.Event()

    def second() -> list[torch.Tensor]:
        with leankv.compressed(llama, coarse):
            entered.set()
            assert first_left.wait(30)
            return [generated(llama, other[:1])]

    with ThreadPoolExecutor(2) as pool:
        with leankv.compressed(llama, bundle):
            waiting = pool.submit(second)
            assert entered.wait(30)
            assert torch.equal(generated(llama, other[:1]), expected[0])
            assert torch.equal(pool.submit(generated, llama, other[:1]).result(), expected[1])
        first_left.set()
        assert torch.equal(waiting.result()[0], expected[1])
    assert torch.equal(generated(llama, other[:1]), stock)
    assert not {METHOD, "generate"} & set(vars(llama))


def test_a_compressed_model_proposes_where_layers_slide() -> None:
    model, text = tiny.build("mistral"), tiny.tokens(1, 30)
    bundle = leankv.fit("int:4", model, None, tiny.tokens(8, BLOCK), sinks=0, window=0)
    main = tiny.build("mistral", seed=1)
    expected = generated(main, text)
    with leankv.compressed(model, bundle):
        assert torch.equal(generated(main, text, assistant_model=model), expected)

"""Logits of a pass, a few rows at a time, so that no vocabulary-sized tensor of a whole block is ever held."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int

HEAD_ROWS = 256
"""Tokens that go through the head at a time. 256 of them are 25 MB of logits at 49,152 tokens of vocabulary in 16 bits,
and enough for the product with the head's weights to run at full speed (assumption)."""


Logits = Float[torch.Tensor, "B n vocabulary"]
"""Logits of n tokens of each row."""


def piecewise_logits(model: Any, inputs: Int[torch.Tensor, "B T"], cache: Any, count: int) -> Iterator[Logits]:
    """Run the model over `inputs` once and yield the logits of its first `count` tokens, piece by piece.

    A model that names no body of its own (`get_decoder()` is the model) gives all its logits at once.

    Args:
        model: a causal LM.
        inputs: token ids.
        cache: takes in all T tokens.
        count: at most T; with 0 the model is run, and nothing is yielded.

    Yields:
        `[B, n, V]`, in order; B x n is at most `HEAD_ROWS`, and n at least 1.
    """
    if has_body(model):
        yield from logits_of(model, inputs, body_output(model, inputs, cache), count)
    else:
        logits = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits
        if count:
            yield logits[:, :count]


def has_body(model: Any) -> bool:
    """Whether the model names the part of it that comes before its head."""
    return model.get_decoder() is not model


def body_output(model: Any, inputs: Int[torch.Tensor, "B T"], cache: Any) -> Any:
    """What the body (all layers and the final norm) gives for `inputs`: its `last_hidden_state`, no more."""
    output = model.get_decoder()(input_ids=inputs, past_key_values=cache, use_cache=True)
    return type(output)(last_hidden_state=output.last_hidden_state)


def logits_of(model: Any, inputs: Int[torch.Tensor, "B T"], output: Any, count: int) -> Iterator[Logits]:
    """The logits of the first `count` tokens, piece by piece, from what the body gave for all of `inputs`.

    The model's own forward pass is called for each piece, with the body giving that piece of what it gave: so the head
    and whatever the model does around it (scaling, soft-capping) stay the model's own, in every architecture.
    """
    columns = max(1, HEAD_ROWS // len(inputs))
    for first in range(0, count, columns):
        last = min(first + columns, count)
        piece = type(output)(last_hidden_state=output.last_hidden_state[:, first:last])
        with _giving(model.get_decoder(), piece):
            logits = model(input_ids=inputs[:, first:last], use_cache=False).logits
        yield logits


class _Given:
    """Stands for a body's forward pass: gives the same output whatever it is called with, and counts the calls."""

    def __init__(self, output: Any):
        self.output, self.calls = output, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.output


@contextmanager
def _giving(body: Any, output: Any) -> Iterator[None]:
    """For the time of one call, `body` gives `output` whatever it is called with."""
    given = _Given(output)
    own = body.__dict__.get("forward")  # where accelerate spreads a model over devices, it puts its own there
    body.forward = given
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own
    assert given.calls == 1, "the model's forward pass calls its body once"

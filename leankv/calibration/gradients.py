"""Gradients of the loss with respect to cached keys and values: one forward and one backward pass for each block."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch.nn.functional import cross_entropy

from leankv.models.observers import GradientCache


def gradient_passes(model: Any, blocks: Int[torch.Tensor, "blocks T"]) -> Iterator[GradientCache]:
    """The keys and values of each block in turn, with their gradients.

    The loss is summed over a block, in nats, so that the gradient at a token is that of all the loss it has a part in.
    Where no gradient comes back through the weights, the cache says None in its place.
    """
    for tokens in blocks:
        yield _gradients(model, tokens[None].to(model.device))


def _gradients(model: Any, tokens: Int[torch.Tensor, "1 T"]) -> GradientCache:
    cache = GradientCache(model.config)
    with torch.enable_grad():
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
        loss = cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="sum")
        # For keys and values only: the model's parameters keep the gradients that they have, or none.
        loss.backward(inputs=cache.leaves)
    return cache

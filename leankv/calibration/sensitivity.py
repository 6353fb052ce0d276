"""What each site contributes to a plan's cost, all sites being compressed: one backward pass a block.

To second order the divergence of the compressed model from the base model is `1/2 e^T H e`, `e` the errors of all
vectors that attention reads and `H` the Hessian at the exact model, where the divergence and its gradient are zero. Its
gradient at `e` is `H e`. So `1/2 <g, e>`, summed over one site's vectors only, is that site's contribution, its share
of what it causes together with others included; and contributions add up to the divergence (Euler's theorem on
homogeneous functions). No site is measured alone, and no single cost is added to another.

Where the error is large the second order does not hold; how far the contributions miss the measured cost tells.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int

from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import Site
from leankv.cache.straight_through import StraightThroughCache
from leankv.errors import UserError
from leankv.models.logits import piecewise_logits


def site_contributions(
    model: Any,
    tokens: Int[torch.Tensor, "blocks T"],
    chunk: int,
    make_cache: Callable[[], LeanCache],
    on_block: Callable[[], None] = lambda: None,
) -> dict[Site, float]:
    """Site -> its contribution to KL(base || compressed), nats a token.

    Args:
        model: a causal LM in eval mode.
        tokens: blocks to take the mean over.
        chunk: tokens fed at a time; the whole block in a strict pass.
        make_cache: an empty compressed cache for one block.
        on_block: called after each block.

    Raises:
        UserError: no gradients come back through the weights, or a gradient is not finite.
    """
    total: dict[Site, float] = {}
    for block in tokens:
        for site, value in _of_block(model, block[None].to(model.device), chunk, make_cache()).items():
            total[site] = total.get(site, 0.0) + value
        on_block()
    count = len(tokens) * (tokens.shape[1] - 1)
    found = {site: value / (2 * count) for site, value in total.items()}
    if not all(value == value and abs(value) != float("inf") for value in found.values()):
        raise UserError("the gradient of the divergence is not finite; try --dtype float32, or a plan that costs less")
    if found and not any(found.values()):
        raise UserError("no gradients come back through these weights; use --sensitivity error, which needs none")
    return found


def _of_block(model: Any, tokens: Int[torch.Tensor, "1 T"], chunk: int, lean: LeanCache) -> Mapping[Site, float]:
    exact, through = LeanCache(lean.config, {}, sinks=0, window=0), StraightThroughCache(lean)
    divergence = torch.zeros((), dtype=torch.float64, device=tokens.device)
    leaf = torch.zeros((), device=tokens.device, requires_grad=True)

    def with_gradient(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + leaf.to(output.dtype)  # frozen weights give nothing that a gradient could start from

    hook = model.get_input_embeddings().register_forward_hook(with_gradient)
    try:
        with torch.enable_grad():
            for first in range(0, tokens.shape[1] - 1, chunk):
                piece = tokens[:, first : first + chunk]
                count = min(chunk, tokens.shape[1] - 1 - first)
                with torch.no_grad():
                    base = [own.clone() for own in piecewise_logits(model, piece, exact, count)]
                for own, other in zip(base, piecewise_logits(model, piece, through, count), strict=True):
                    divergence = divergence + _divergence(own[0], other[0])
    finally:
        hook.remove()
    divergence.backward(inputs=[leaf])
    return through.gradient_along_errors()


def _divergence(base: Float[torch.Tensor, "n V"], other: Float[torch.Tensor, "n V"]) -> torch.Tensor:
    """Sum of KL(base || other) over n tokens, float64."""
    log_p, log_q = (logits.float().log_softmax(dim=1) for logits in (base, other))
    return (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64)

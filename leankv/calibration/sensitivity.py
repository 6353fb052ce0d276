"""What each site contributes to a plan's cost, all sites being compressed: one backward pass a block.

To second order the divergence of the compressed model from the base model is `1/2 e^T H e`, `e` the errors of all
vectors that attention reads and `H` the Hessian at the exact model, where the divergence and its gradient are zero. Its
gradient at `e` is `H e`. So `1/2 <g, e>`, summed over one site's vectors only, is that site's contribution, its share
of what it causes together with others included; and contributions add up to the divergence (Euler's theorem on
homogeneous functions). No site is measured alone, and no single cost is added to another.

Where the error is large the second order does not hold; how far the contributions miss the measured cost tells.
"""

from collections.abc import Callable, Mapping, Sequence
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
    feeding: Sequence[tuple[int, int, int]],
    make_cache: Callable[[], LeanCache],
    coded_after: int | None = None,
    on_block: Callable[[], None] = lambda: None,
) -> dict[Site, float]:
    """Site -> its contribution to KL(base || compressed), nats a token.

    Args:
        model: a causal LM in eval mode.
        tokens: blocks to take the mean over.
        feeding: how a block is fed: of each piece its first token, the first behind it, and how many predictions count
            (`leankv.evaluation.perplexity.feeding_of`).
        make_cache: an empty compressed cache for one block.
        coded_after: tokens after which all that the cache holds exact is coded.
        on_block: called after each block.

    Raises:
        UserError: no gradients come back through the weights, or a gradient is not finite.
    """
    total: dict[Site, float] = {}
    for block in tokens:
        for site, value in _of_block(model, block[None].to(model.device), feeding, coded_after, make_cache()).items():
            total[site] = total.get(site, 0.0) + value
        on_block()
    count = len(tokens) * sum(counted for _, _, counted in feeding)
    found = {site: value / (2 * count) for site, value in total.items()}
    if not all(value == value and abs(value) != float("inf") for value in found.values()):
        raise UserError("the gradient of the divergence is not finite; try --dtype float32, or a plan that costs less")
    if found and not any(found.values()):
        raise UserError(
            "no gradients come back through these weights; load the model in 16 or 32 bits, or choose layers by "
            "--strategy greedy, which needs none"
        )
    return found


def _of_block(
    model: Any,
    tokens: Int[torch.Tensor, "1 T"],
    feeding: Sequence[tuple[int, int, int]],
    coded_after: int | None,
    lean: LeanCache,
) -> Mapping[Site, float]:
    exact, through = LeanCache(lean.config, {}, sinks=0, window=0), StraightThroughCache(lean)
    divergence = torch.zeros((), dtype=torch.float64, device=tokens.device)
    leaf = torch.zeros((), device=tokens.device, requires_grad=True)

    def with_gradient(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + leaf.to(output.dtype)  # frozen weights give nothing that a gradient could start from

    hook = model.get_input_embeddings().register_forward_hook(with_gradient)
    try:
        with torch.enable_grad():
            for first, last, counted in feeding:
                if first == coded_after:
                    lean.encode_all()
                piece = tokens[:, first:last]
                with torch.no_grad():
                    base = [own.clone() for own in piecewise_logits(model, piece, exact, counted)]
                for own, other in zip(base, piecewise_logits(model, piece, through, counted), strict=True):
                    divergence = divergence + divergence_of(own[0], other[0])
    finally:
        hook.remove()
    divergence.backward(inputs=[leaf])
    return through.gradient_along_errors()


def divergence_of(base: Float[torch.Tensor, "n V"], other: Float[torch.Tensor, "n V"]) -> torch.Tensor:
    """Sum of KL(base || other) over n tokens, float64."""
    log_p, log_q = (logits.float().log_softmax(dim=1) for logits in (base, other))
    return (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64)

"""Weighting: what errors in a layer's cached vectors count by, as a metric `M`: an error `e` counts `e^T M e`.

`gradient`: to second order an error raises the loss by `1/2 e^T H e`; with the empirical Fisher information in place of
the Hessian (as SqueezeLLM does for weights: Kim et al., 2024), `M = E[g g^T]`, `g` the gradient of the summed loss with
respect to one token's keys or values. One backward pass gives all layers'. In nats, so metrics of different layers and
parts compare.

`attention`: what the layer's own attention does with the vectors, and nothing behind it. Keys meet queries, so
`M = E[q q^T]`, each key head with the queries that read it, turned to the key's position where keys are un-rotated.
Values leave through the output projection, so `M` is the Gram matrix of its rows, head by head. Their units differ from
part to part.

A second moment of some thousand samples knows little of a direction in which it saw next to nothing. So `M` is shrunk
towards a multiple of the identity of the same trace (Ledoit and Wolf, 2004, in form; the share is fixed here).
"""

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from leankv.attention_moments import attention_moments
from leankv.data import Blocks
from leankv.errors import UserError
from leankv.experiment import PARTS
from leankv.model import LoadedModel
from leankv.observers import GradientCache
from leankv.progress import Progress
from leankv.rope import KeyRotation

TOKENS = 8192  # assumption: samples enough for 192 or 1,024 directions; a backward pass costs some three forward passes
SHRINKAGE = 0.1  # share of the identity in a metric

Metrics = dict[tuple[int, str], torch.Tensor]
"""(layer, part) -> `[W, W]`, float32, on the CPU."""


def weigh(
    kind: str,
    loaded: LoadedModel,
    blocks: Blocks,
    layers: Sequence[int],
    rotation: KeyRotation | None,
    sinks: int,
    seed: int,
    progress: Progress,
) -> Metrics:
    """The metrics of these layers' keys and values, from calibration text.

    Args:
        kind: `gradient` or `attention`.
        loaded: the model.
        blocks: calibration text.
        layers: which.
        rotation: given, keys are counted un-rotated.
        sinks: first tokens of each block, which are held exact and not counted.
        seed: of what is drawn.
        progress: shows the passes.

    Raises:
        UserError: no gradients come back through the weights, or the attention has an unusual form.
    """
    some = blocks.take(range(min(math.ceil(TOKENS / blocks.tokens.shape[1]), len(blocks))))
    if kind == "gradient":
        metrics = _gradient_moments(loaded, some, layers, rotation, sinks, progress)
    else:
        metrics = attention_moments(loaded, some, layers, rotation, sinks, seed, progress)
    return {problem: shrunk(metric) for problem, metric in metrics.items()}


def shrunk(metric: torch.Tensor, share: float = SHRINKAGE) -> torch.Tensor:
    """`metric` mixed with the multiple of the identity that has its trace; the identity where it is all zero."""
    size = metric.diagonal().mean()
    if size == 0:
        return torch.eye(len(metric))
    return (1 - share) * metric + share * size * torch.eye(len(metric))


def _gradient_moments(
    loaded: LoadedModel,
    blocks: Blocks,
    layers: Sequence[int],
    rotation: KeyRotation | None,
    sinks: int,
    progress: Progress,
) -> Metrics:
    """`E[g g^T]` of each layer and part."""
    model = loaded.model
    metrics: Metrics = {}
    positions = torch.arange(blocks.tokens.shape[1])[None]
    with progress.stage("gradients of the loss", len(blocks)) as step:
        for tokens in blocks.tokens:
            tokens = tokens[None].to(model.device)
            cache = GradientCache(model.config)
            with torch.enable_grad():
                logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
                # Summed, so that the gradient at a token is that of all the loss it has a part in.
                cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="sum").backward()
            for layer in layers:
                for part in PARTS:
                    _, gradient = cache.states_and_gradients(layer, part)
                    if gradient is None:
                        raise UserError(
                            f"no gradients come back to layer {layer} through these weights; use --weighting none"
                        )
                    if part == "k" and rotation is not None:
                        gradient = rotation.remove_from_gradient(layer, gradient, positions)
                    g = gradient.transpose(1, 2).flatten(2)[0, sinks:].float()
                    moment = (g.T @ g / (len(g) * len(blocks))).cpu()
                    metrics[layer, part] = metrics[layer, part] + moment if (layer, part) in metrics else moment
            step()
    return metrics

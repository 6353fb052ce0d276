"""Error metrics: how much an error in a layer's cached vectors counts. A metric is a matrix `M`: error `e`, `e^T M e`.

`gradient`: to second order an error raises the loss by `1/2 e^T H e`; with the empirical Fisher information in place of
the Hessian (as SqueezeLLM does for weights, arXiv 2306.07629), `M = E[g g^T]`, `g` the gradient of the summed loss with
respect to one token's keys or values. One backward pass gives all layers'. In nats, so metrics of different layers and
parts compare.

`attention`: what the layer's own attention does with the vectors, and nothing behind it. Keys meet queries, so
`M = E[q q^T]`, each key head with the queries that read it, rotated to the key's position where keys are pre-RoPE.
Values leave through the output projection, so `M` is the Gram matrix of its rows, head by head. Their units differ from
part to part.

A second moment of some thousand samples knows little of a direction in which it saw next to nothing. So `M` is shrunk
towards a multiple of the identity of the same trace (Ledoit and Wolf, 2004, in form; the share is fixed here).
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float

from leankv.cache.plan import Site
from leankv.calibration.attention_moments import attention_moments
from leankv.calibration.gradients import gradient_passes
from leankv.calibration.metric_sample import MetricSample
from leankv.config.plan_table import PARTS
from leankv.errors import UserError
from leankv.models.loading import LoadedModel
from leankv.progress import Progress

TOKENS = 8192  # assumption: samples enough for 192 or 1,024 directions; a backward pass costs some three forward passes

SHRINKAGE = 0.1  # share of the identity in a metric


ErrorMetrics = dict[Site, Float[torch.Tensor, "W W"]]
"""Site -> its error metric, float32, on the CPU."""


def fit_error_metrics(kind: str, loaded: LoadedModel, sample: MetricSample, progress: Progress) -> ErrorMetrics:
    """The error metrics of some layers' keys and values, from the first `TOKENS` tokens of a sample.

    Args:
        kind: `gradient` or `attention`.
        loaded: the model.
        sample: which vectors, on which text.
        progress: shows the passes.

    Raises:
        UserError: no gradients come back through the weights, or the attention has an unusual form.
    """
    blocks = sample.blocks
    some = blocks.take(range(min(math.ceil(TOKENS / blocks.tokens.shape[1]), len(blocks))))
    moments = {"gradient": gradient_moments, "attention": attention_moments}[kind]
    return {site: shrunk(metric) for site, metric in moments(loaded, replace(sample, blocks=some), progress).items()}


def shrunk(metric: Float[torch.Tensor, "W W"], share: float = SHRINKAGE) -> Float[torch.Tensor, "W W"]:
    """`metric` mixed with the multiple of the identity that has its trace; the identity where it is all zero."""
    size, identity = metric.diagonal().mean(), torch.eye(len(metric), device=metric.device, dtype=metric.dtype)
    return identity if size == 0 else (1 - share) * metric + share * size * identity


def gradient_moments(loaded: LoadedModel, sample: MetricSample, progress: Progress) -> ErrorMetrics:
    """Site -> `E[g g^T]`.

    Raises:
        UserError: no gradients come back through the weights.
    """
    metrics: ErrorMetrics = {}
    tokens, rotation = sample.blocks.tokens, sample.rotation
    positions = torch.arange(tokens.shape[1])[None]
    with progress.stage("gradients of the loss", len(tokens)) as step:
        for cache in gradient_passes(loaded.model, tokens):
            for layer in sample.layers:
                for part in PARTS:
                    _, gradient = cache.states_and_gradients(layer, part)
                    if gradient is None:
                        raise UserError(
                            f"no gradients come back to layer {layer} through these weights; use --error-metric none"
                        )
                    if part == "k" and rotation is not None:
                        gradient = rotation.remove_from_gradient(layer, gradient, positions)
                    g = gradient.transpose(1, 2).flatten(2)[0, sample.sinks :].float()
                    moment = (g.T @ g / (len(g) * len(tokens))).cpu()
                    site = Site(layer, part)
                    metrics[site] = metrics[site] + moment if site in metrics else moment
            step()
    return metrics

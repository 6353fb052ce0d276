"""What gradients predict of a layer's cost, without measuring it: a first guess, shown next to the measurement.

To second order, errors `e` of the cached vectors raise the loss by `1/2 e^T H e`. With the empirical Fisher information
in place of the Hessian `H` (as SqueezeLLM does for weights, arXiv 2306.07629), and errors taken as independent of the
gradients `g`, a codec raises the mean loss by `1/2 tr(E[g g^T] E[e e^T])` nats a token. One backward pass gives the
gradients of all layers at once. The errors are those of a cache in which that layer alone is compressed, so codecs that
look back see what they would see there, and sinks are exact; the exact window of `stream` is left out.
"""

import math

import torch

from leankv.cache.layers import LeanLayer
from leankv.cache.lean_cache import LeanCache
from leankv.calibration.gradients import gradient_passes
from leankv.config.plan_table import PARTS
from leankv.errors import UserError
from leankv.models.observers import GradientCache
from leankv.studies.plan_evaluator import PlanEvaluator

BLOCKS = 2  # assumption: second moments of some 2,000 tokens rank layers as well as more would


def predict_costs(evaluator: PlanEvaluator, base_ppl: float) -> dict[int, float]:
    """layer -> predicted cost in perplexity points, from the last calibration blocks, which codecs were not fitted to.

    Raises:
        UserError: no gradients come back through the model.
    """
    workspace = evaluator.workspace
    blocks = workspace.blocks("calibration")
    nats = dict.fromkeys(workspace.layers, 0.0)
    last = blocks.tokens[-min(BLOCKS, evaluator.codecs.fitting.heldout_blocks(len(blocks))) :]
    with workspace.progress.stage("predicting costs from gradients", len(last)) as step:
        for cache in gradient_passes(workspace.loaded.model, last):
            for layer in workspace.layers:
                nats[layer] += _predicted_rise(evaluator, layer, cache) / len(last)
            step()
    return {layer: base_ppl * math.expm1(min(rise, 20.0)) for layer, rise in nats.items()}


def _predicted_rise(evaluator: PlanEvaluator, layer: int, exact: GradientCache) -> float:
    """The predicted rise of the loss in nats a token with this layer alone compressed, from one block's gradients."""

    def states_of(number: int) -> list[torch.Tensor]:
        return [exact.states_and_gradients(number, part)[0].float() for part in PARTS]

    workspace = evaluator.workspace
    plan = evaluator.codecs.plan(workspace.plan.only([layer]))
    alone = LeanCache(
        workspace.loaded.model.config, plan, sinks=evaluator.protocol.sinks, window=0, rotation=workspace.rotation
    )
    for source in range(layer):
        if isinstance(alone.layers[source], LeanLayer):  # one that this layer's codecs predict from
            keys, values = states_of(source)
            alone.update(keys, values, source)
    (keys, values), rise = states_of(layer), 0.0
    for part, given, read in zip(PARTS, (keys, values), alone.update(keys, values, layer), strict=True):
        if (layer, part) not in plan:
            continue
        gradients = exact.states_and_gradients(layer, part)[1]
        if gradients is None:
            raise UserError(f"no gradients come back to layer {layer} through these weights; leave --predict out")
        e, g = (t.transpose(1, 2).flatten(2)[0].float() for t in (given - read, gradients))
        # tr(E[g g^T] E[e e^T]) is the mean squared product of a gradient and an error of any two tokens.
        rise += 0.5 * (g @ e.T).double().square().mean().item()
    return rise

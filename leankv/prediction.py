"""What gradients predict of a layer's cost, without measuring it: a first guess, shown beside the measurement.

To second order, errors `e` of the cached vectors raise the loss by `1/2 e^T H e`. With the empirical Fisher information
in place of the Hessian `H` (as SqueezeLLM does for weights: Kim et al., 2024), and errors taken as independent of the
gradients `g`, a codec raises the mean loss by `1/2 tr(E[g g^T] E[e e^T])` nats a token. One backward pass gives the
gradients of all layers at once. The errors are those of a cache in which that layer alone is compressed, so codecs that
look back see what they would see there, and sinks are exact; the exact window of `stream` is left out.
"""

import math

import torch
from torch.nn.functional import cross_entropy

from leankv.cache import LeanCache, LeanLayer
from leankv.errors import UserError
from leankv.experiment import PARTS
from leankv.observers import GradientCache
from leankv.run import Run

BLOCKS = 2  # assumption: second moments of some 2,000 tokens rank layers as well as more would


def predict_costs(run: Run, base_ppl: float) -> dict[int, float]:
    """layer -> predicted cost in perplexity points, from the last calibration blocks, which codecs were not fitted to.

    Raises:
        UserError: no gradients come back through the model.
    """
    blocks = run.blocks("calibration")
    nats = dict.fromkeys(run.layers, 0.0)
    last = blocks.tokens[-BLOCKS:]
    with run.progress.stage("predicting costs from gradients", len(last)) as step:
        for tokens in last:
            for layer, rise in _predicted_nats(run, tokens[None].to(run.loaded.model.device)).items():
                nats[layer] += rise / len(last)
            step()
    return {layer: base_ppl * math.expm1(min(rise, 20.0)) for layer, rise in nats.items()}


def _predicted_nats(run: Run, tokens: torch.Tensor) -> dict[int, float]:
    """layer -> predicted rise of the loss in nats a token, from one block `[1, T]`."""
    model = run.loaded.model
    cache = GradientCache(model.config)
    with torch.enable_grad():
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
        # Summed, so that the gradient at a token is that of all the loss it has a part in.
        cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="sum").backward()
    states = {
        layer: [cache.states_and_gradients(layer, part)[0].float() for part in PARTS]
        for layer in range(len(cache.leaf_layers))
    }
    rises = dict.fromkeys(run.layers, 0.0)
    for layer in run.layers:
        alone = LeanCache(model.config, run.plan([layer]), run.experiment.protocol.sinks, rotation=run.rotation)
        for source in range(layer):
            if isinstance(alone.layers[source], LeanLayer):  # one that this layer's codecs predict from
                alone.update(*states[source], source)
        for part, exact, read in zip(PARTS, states[layer], alone.update(*states[layer], layer), strict=True):
            if part not in run.specs:
                continue
            gradients = cache.states_and_gradients(layer, part)[1]
            if gradients is None:
                raise UserError(f"no gradients come back to layer {layer} through these weights; leave --predict out")
            e, g = (t.transpose(1, 2).flatten(2)[0].float() for t in (exact - read, gradients))
            # tr(E[g g^T] E[e e^T]) is the mean squared product of a gradient and an error of any two tokens.
            rises[layer] += 0.5 * (g @ e.T).double().square().mean().item()
    return rises

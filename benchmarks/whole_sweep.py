"""A whole exact sweep (capture, fit, evaluate), against the naive recipe: each layer by itself.

The naive recipe takes so long that it is run for every tenth layer, and its time multiplied; layers cost it the same.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from side_by_side import report, side_by_side, timed
from smollm2 import prepared
from transformers import DynamicCache

from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import Site
from leankv.codecs.autoencoder import Autoencoder, AutoencoderRecipe
from leankv.evaluation.perplexity import measure_nats
from leankv.progress import Silent
from leankv.studies.sweep import sweep

EVERY = 10
SETTINGS: dict[str, Any] = {"data__calibration_blocks": 8, "data__selection_blocks": 2}


def train_alone(x: torch.Tensor, epochs: int, batch: int, learning_rate: float) -> Autoencoder:
    """The recipe as one would write it for one layer and part: an `nn.Module`, Adam, epochs."""
    width = x.shape[1]
    mean = x.mean(dim=0)
    scale = (x - mean).square().mean().sqrt()
    encoder = torch.nn.Linear(width, 4)
    decoder = torch.nn.Sequential(torch.nn.Linear(4, 128), torch.nn.GELU(), torch.nn.Linear(128, width))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=learning_rate)
    u = (x - mean) / scale
    for _ in range(epochs):
        for rows in torch.randperm(len(u)).split(batch):
            loss = torch.nn.functional.mse_loss(decoder(encoder(u[rows])), u[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    weights = {"encoder": encoder, "hidden": decoder[0], "output": decoder[2]}
    stack = {f"{name}_weight": layer.weight.detach() for name, layer in weights.items()}
    stack |= {f"{name}_bias": layer.bias.detach() for name, layer in weights.items()}
    return Autoencoder(AutoencoderRecipe(4), {**stack, "mean": mean, "scale": scale[None]})


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        workspace = prepared(Path(folder) / "naive", **SETTINGS).workspace
        model, protocol, fit = workspace.loaded.model, workspace.experiment.protocol, workspace.experiment.fit
        calibration, selection = workspace.blocks("calibration"), workspace.blocks("selection")
        layers = workspace.layers
        heldout = max(1, round(fit.heldout_fraction * len(calibration)))

        @torch.no_grad()
        def captured_alone(layer: int) -> list[torch.Tensor]:
            parts: list[list[torch.Tensor]] = [[], []]
            for tokens in calibration.tokens[: len(calibration) - heldout]:
                cache = DynamicCache(config=model.config)
                model(input_ids=tokens[None], past_key_values=cache)
                for own, states in zip(parts, (cache.layers[layer].keys, cache.layers[layer].values), strict=True):
                    own.append(states.transpose(1, 2).flatten(2)[0].float())
            return [torch.cat(own) for own in parts]

        def naive() -> float:
            def layer_by_layer() -> None:
                for layer in layers[::EVERY]:
                    k, v = (
                        train_alone(x, fit.epochs, fit.batch_tokens, fit.learning_rate) for x in captured_alone(layer)
                    )
                    plan = {Site(layer, "k"): k, Site(layer, "v"): v}
                    measure_nats(
                        model, selection, protocol, lambda plan=plan: LeanCache(model.config, plan, sinks=0, window=0)
                    )

            done = len(layers[::EVERY])
            base = timed(
                lambda: measure_nats(model, selection, protocol, lambda: LeanCache(model.config, {}, sinks=0, window=0))
            )[0]
            return base + timed(layer_by_layer)[0] * len(layers) / done

        count = iter(range(100))

        def ours() -> float:
            again = prepared(Path(folder) / f"ours-{next(count)}", **SETTINGS)
            again.workspace.progress = Silent()
            return timed(lambda: sweep(again))[0]

        ratio = side_by_side(
            "whole exact sweep of SmolLM2-135M (capture, fit, evaluate), K and V, ae:4",
            "the naive recipe (for each layer: a capture pass, two nn.Modules trained alone, full-pass evaluation)",
            ours,
            naive,
            required=5,
            repeats=2,
            notes={
                "naive_layers_run": len(layers[::EVERY]),
                "layers": len(layers),
                "calibration_tokens": calibration.tokens.numel(),
                "selection_tokens": selection.tokens.numel(),
                "epochs": fit.epochs,
                "steps_an_epoch": math.ceil(
                    (len(calibration) - heldout) * calibration.tokens.shape[1] / fit.batch_tokens
                ),
            },
        )
        report("whole_sweep", ratio)


if __name__ == "__main__":
    main()

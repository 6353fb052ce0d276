"""An exact sweep's evaluation: suffix replay against loops of full forward passes.

Two loops: the obvious one, `model(input_ids, labels=input_ids, past_key_values=cache).loss`, and the same with LeanKV's
own way of summing the loss. The second shows what replay alone brings.
"""

import tempfile
from pathlib import Path

import torch
from side_by_side import report, say, side_by_side, timed
from smollm2 import prepared

from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import Plan
from leankv.evaluation.perplexity import measure_nats
from leankv.evaluation.replay import Replay
from leankv.storage.memory_budget import MemoryBudget


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        evaluator = prepared(Path(folder), plan="pca:4", data__calibration_blocks=4, data__selection_blocks=1)
        workspace, protocol = evaluator.workspace, evaluator.protocol
        model, blocks = workspace.loaded.model, workspace.blocks("selection")
        evaluator.codecs.fit([workspace.plan])
        plans: list[Plan] = [{}]  # the base first: costs are counted from it
        plans += [evaluator.codecs.plan(workspace.plan.only([layer])) for layer in workspace.layers]
        numbers: dict[str, list[float]] = {}

        def replayed() -> float:
            def sweep() -> list[float]:
                memory = MemoryBudget(1 << 30)
                replay = Replay(model, blocks, protocol, memory, Path(folder))  # it records as it measures the base
                return [replay.measure(plan).perplexity for plan in plans]

            seconds, numbers["replayed"] = timed(sweep)
            return seconds

        def full() -> float:
            def sweep() -> list[float]:
                return [
                    measure_nats(
                        model, blocks, protocol, lambda plan=plan: LeanCache(model.config, plan, sinks=0, window=0)
                    ).perplexity
                    for plan in plans
                ]

            seconds, numbers["full"] = timed(sweep)
            return seconds

        @torch.no_grad()
        def obvious() -> float:
            def sweep() -> list[float]:
                return [
                    model(
                        input_ids=tokens[None],
                        labels=tokens[None],
                        past_key_values=LeanCache(model.config, plan, sinks=0, window=0),
                    ).loss.item()
                    for plan in plans
                    for tokens in blocks.tokens
                ]

            return timed(sweep)[0]

        what = "exact sweep of SmolLM2-135M, K and V, evaluation only"
        notes = {
            "layers": len(workspace.layers),
            "tokens": blocks.tokens.numel(),
            "codec": "pca:4",
            "dtype": str(model.dtype),
        }
        loop = "a loop of full forward passes"
        naive = side_by_side(what, f"{loop}, model(labels=...)", replayed, obvious, 1.8, repeats=2, notes=notes)
        tight = side_by_side(what, f"{loop}, our sum of the loss", replayed, full, 1.8, repeats=2, notes=notes)
        assert numbers["replayed"] == numbers["full"], "the two must give the same bits"
        say("both give the same bits")
        naive.notes["against our sum of the loss"] = {
            "ratio": tight.ratio,
            "low": tight.ratio_low,
            "high": tight.ratio_high,
        }
        report("replay", naive)


if __name__ == "__main__":
    main()

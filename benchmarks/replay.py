"""An exact sweep's evaluation: suffix replay against a loop of full forward passes."""

import tempfile
from pathlib import Path

from side_by_side import report, say, side_by_side, timed
from smollm2 import prepared

from leankv.cache import LeanCache
from leankv.perplexity import measure_nats
from leankv.replay import Replay


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = prepared(
            Path(folder), codec__k="pca:4", codec__v="pca:4", data__calibration_blocks=4, data__selection_blocks=1
        )
        plans = [run.plan([layer]) for layer in run.layers]
        model, blocks, protocol = run.loaded.model, run.blocks("selection"), run.experiment.protocol
        numbers: dict[str, list[float]] = {}

        def replayed() -> float:
            def sweep() -> list[float]:
                replay = Replay(
                    model, blocks, protocol, 1 << 30, Path(folder)
                )  # its recording pass is part of the cost
                return [replay.measure(plan).perplexity for plan in plans]

            seconds, numbers["replayed"] = timed(sweep)
            return seconds

        def full() -> float:
            def sweep() -> list[float]:
                return [
                    measure_nats(model, blocks, protocol, lambda plan=plan: LeanCache(model.config, plan)).perplexity
                    for plan in plans
                ]

            seconds, numbers["full"] = timed(sweep)
            return seconds

        ratio = side_by_side(
            "exact sweep of SmolLM2-135M, K and V, evaluation only",
            "a loop of full forward passes",
            replayed,
            full,
            required=1.8,
            notes={"layers": len(plans), "tokens": blocks.tokens.numel(), "codec": "pca:4", "dtype": str(model.dtype)},
        )
        assert numbers["replayed"] == numbers["full"], "the two must give the same bits"
        say("both give the same bits")
        report("replay", ratio)


if __name__ == "__main__":
    main()

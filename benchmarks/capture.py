"""Capturing all layers, against the bare forward pass over the same blocks (no head, no cache)."""

import tempfile
from pathlib import Path

import torch
from side_by_side import report, side_by_side, timed
from smollm2 import prepared

from leankv.calibration.capture import capture
from leankv.progress import Silent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        workspace = prepared(Path(folder), data__calibration_blocks=8).workspace
        model, blocks = workspace.loaded.model, workspace.blocks("calibration")

        @torch.no_grad()
        def bare() -> None:
            for tokens in blocks.tokens:
                model.base_model(input_ids=tokens[None], use_cache=False)

        def captured() -> None:
            own = Path(folder) / "activations"
            capture(workspace.loaded, blocks, own, workspace.layers, 1, {}, Silent()).delete()

        bare()
        ratio = side_by_side(
            "tokens a second of capturing all 30 layers of SmolLM2-135M",
            "the bare forward pass",
            lambda: timed(captured)[0],
            lambda: timed(bare)[0],
            required=0.9,
            repeats=5,
            notes={"tokens": blocks.tokens.numel(), "dtype": str(model.dtype)},
        )
        report("capture", ratio)


if __name__ == "__main__":
    main()

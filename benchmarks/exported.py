"""Tokens a second of an exported repository's own `generate`, against LeanKV's, through the same codecs.

Give a folder with WikiText-2. The repository is loaded as anyone loads it, by transformers with trust_remote_code; both
models generate from the same 2,048 tokens, in turn.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from side_by_side import report, side_by_side, timed
from smollm2 import GENERATING, bundle_of, prepared
from transformers import AutoModelForCausalLM

import leankv
from leankv.export.repository import write_repository

PLAN, CONTEXT, GENERATED, REPEATS = "transform:s0.02", 2048, 8, 3


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        evaluator = prepared(Path(folder) / "run", **GENERATING)
        workspace = evaluator.workspace
        loaded = workspace.loaded
        bundle = bundle_of(evaluator, PLAN)
        repository = Path(folder) / "repository"
        write_repository(repository, bundle, loaded, with_weights=True)
        exported = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True, dtype=loaded.model.dtype)
        tokens = workspace.blocks("calibration").tokens.flatten()[None, :CONTEXT]
        how: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "min_new_tokens": GENERATED,
            "max_new_tokens": GENERATED,
            "do_sample": False,
        }
        said: dict[str, torch.Tensor] = {}

        def theirs() -> float:
            with leankv.compressed(loaded.model, bundle):
                seconds, said["leankv"] = timed(lambda: loaded.model.generate(**how))
            return seconds

        def ours() -> float:
            seconds, said["exported"] = timed(lambda: exported.generate(**how))
            return seconds

        title = f"tokens a second of an exported repository's generate, {CONTEXT} tokens before, {PLAN}"
        ratio = side_by_side(title, "leankv's own", ours, theirs, 0.95, REPEATS)
        assert torch.equal(said["leankv"], said["exported"])
        ratio.notes.update(GENERATING, **loaded.numerics)
    report("exported", ratio)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("name the folder with WikiText-2")
    main()

"""Tokens a second of `generate` through compressed caches, against the stock `DynamicCache`, after 1,024 and 4,096.

Give a folder with WikiText-2. Ours are read by attention over codes, as the command `generate` does. The context is
prefilled in chunks and not timed; then some tokens are generated. Bytes are those that the caches hold at the end.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from side_by_side import Ratio, report, say, side_by_side, timed
from smollm2 import prepared
from transformers import DynamicCache

from leankv.cache.code_attention import attention_over_codes
from leankv.cache.lean_cache import LeanCache
from leankv.cache.memory import held_bytes
from leankv.cache.plan import Plan, PlanSpec

CONTEXTS, GENERATED, CHUNK = (1024, 4096), 8, 512
SEVEN_PERCENT = "resid(share:-2,transform:s0.045)"  # what the file quotes first; the others stand in its rows
SPECS = ("identity", "ae:4", "int:4", "nuq:3+1", "rot:3", "transform:s0.02", SEVEN_PERCENT)
SETTINGS: dict[str, Any] = {
    "data__calibration_blocks": 8,
    "data__block_length": 1024,
    "codec__key_space": "pre-rope",
    "codec__dtype": "bfloat16",
    "fit__error_metric": "gradient",
    "fit__epochs": 1,
    "protocol__kind": "stream",
    "protocol__sinks": 4,
    "protocol__window": 128,
}


def main() -> None:
    table: list[dict[str, Any]] = []
    headline: Ratio
    with tempfile.TemporaryDirectory() as folder:
        evaluator = prepared(Path(folder), **SETTINGS)
        workspace, model = evaluator.workspace, evaluator.workspace.loaded.model
        text = workspace.blocks("calibration").tokens.flatten()
        for spec in SPECS:
            plan = evaluator.codecs.plan(PlanSpec.uniform(spec))
            for context in CONTEXTS:
                tokens = text[None, :context]
                bytes_: dict[str, int] = {}

                @torch.no_grad()
                def seconds(name: str, cache: Any, tokens: torch.Tensor = tokens, bytes_: Any = bytes_) -> float:
                    for piece in tokens[:, :-1].split(CHUNK, dim=1):
                        model.base_model(input_ids=piece, past_key_values=cache)
                    took, _ = timed(
                        lambda: model.generate(
                            input_ids=tokens,
                            attention_mask=torch.ones_like(tokens),
                            past_key_values=cache,
                            min_new_tokens=GENERATED,
                            max_new_tokens=GENERATED,
                            do_sample=False,
                        )
                    )
                    bytes_[name] = held_bytes(cache)
                    return took

                def ours(plan: Plan = plan, seconds: Any = seconds) -> float:
                    cache = LeanCache(model.config, plan, sinks=4, window=128, rotation=workspace.rotation)
                    with attention_over_codes(model):
                        return float(seconds("ours", cache))

                def stock(seconds: Any = seconds) -> float:
                    return float(seconds("stock", DynamicCache(config=model.config)))

                what = f"tokens a second of generate after {context} tokens, {spec}"
                ratio = side_by_side(what, "the stock DynamicCache", ours, stock, 0.5, repeats=3)
                own_bytes = {"bytes": bytes_["ours"], "bytes_stock": bytes_["stock"]}
                ratio.notes.update(own_bytes, tokens_per_second=GENERATED / ratio.seconds, **SETTINGS)
                table.append({"codec": spec, "context": context, "ratio": ratio.ratio, **own_bytes})
                say(f"{spec} at {context}: {ratio.ratio:.2f} of the stock speed, {own_bytes}")
                if (spec, context) == (SEVEN_PERCENT, 4096):
                    headline = ratio
    headline.notes["rows"] = table
    report("decode", headline)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("name the folder with WikiText-2")
    main()

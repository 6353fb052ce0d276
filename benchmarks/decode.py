"""Tokens a second of `generate` through compressed caches, against the stock `DynamicCache`, after 4,096 and 8,000.

On a GPU after 4,096 and 32,768, further than the model's positions go: what is timed does not depend on what it says.

Give a folder with WikiText-2. Ours are read by attention over codes, as the command `generate` does. The context is
computed once by the stock cache, and every cache takes in its keys and values; that is not timed. Then some tokens are
generated from copies, stock and ours in turn. Bytes are those held at the end; the peak of a step is what one decoding
step takes over them, beside one layer of the 16-bit cache.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from side_by_side import Ratio, report, say, side_by_side, timed
from smollm2 import GENERATING, prepared, stock_cache
from transformers import DynamicCache

from leankv.cache.code_attention import attention_over_codes
from leankv.cache.lean_cache import ENCODE_EVERY, LeanCache
from leankv.cache.memory import held_bytes
from leankv.cache.plan import Plan, PlanSpec
from leankv.evaluation.step_peak import peak_bytes, watched

GENERATED, REPEATS = ENCODE_EVERY, 3  # so that each time of generating tokens pays for coding as many
RESULTS = Path(__file__).parent.parent / "results"
CERTIFIED = {"certified +7 %": "plans-smollm2-7pct", "certified +7 %, all in": "plans-smollm2-all-in"}
"""Plans that were searched, and where they lie."""

ROWS: tuple[tuple[str, int, float], ...] = (
    ("int:4", 4096, 0.9),
    ("nuq:4+1", 4096, 0.9),
    ("rot:4", 4096, 0.9),
    ("transform:s0.02", 4096, 0.9),
    ("transform:s0.02", 8000, 1.0),
    ("resid(share:-2,transform:s0.02)", 4096, 0.35),
    ("certified +7 %", 4096, 0.5),
    ("certified +7 %", 8000, 0.5),
    ("certified +7 %, all in", 4096, 0.5),
    ("certified +7 %, all in", 8000, 0.5),
)
"""What, tokens before, and how much of the stock cache's speed is wanted. The model has 8,192 positions."""

ON_GPU: tuple[tuple[str, int, float], ...] = (
    ("int:4", 4096, 1.0),
    ("int:4", 32768, 1.0),
    ("transform:s0.02", 4096, 1.0),
    ("transform:s0.02", 32768, 1.0),
)

HEADLINE = ("transform:s0.02", 4096)  # what the file quotes first; the others stand in its rows


def spec_of(what: str) -> PlanSpec:
    if what not in CERTIFIED:
        return PlanSpec.uniform(what)
    return PlanSpec.parse(json.loads((RESULTS / CERTIFIED[what] / "plans.json").read_text())[0]["plan"])


@torch.no_grad()
def taken_in(model: Any, plan: Plan, rotation: Any, stock: DynamicCache) -> LeanCache:
    """A compressed cache that was given the same keys and values."""
    cache = LeanCache(model.config, plan, sinks=4, window=128, encode_every=ENCODE_EVERY, rotation=rotation)
    for number, layer in enumerate(stock.layers):
        cache.update(layer.keys, layer.values, number)
    return cache


@torch.no_grad()
def step_peak(model: Any, cache: LeanCache, tokens: torch.Tensor) -> int:
    """Bytes that one decoding step takes at its peak over what is held."""
    with watched(model.device):
        own = copy.deepcopy(cache)
        model.base_model(input_ids=tokens[:, -1:], past_key_values=own)
    return peak_bytes(lambda: model.base_model(input_ids=tokens[:, -1:], past_key_values=own), model.device)


def main() -> None:
    table: list[dict[str, Any]] = []
    headline: Ratio
    on_gpu = False
    with tempfile.TemporaryDirectory() as folder:
        evaluator = prepared(Path(folder), **GENERATING)
        workspace, model = evaluator.workspace, evaluator.workspace.loaded.model
        on_gpu = model.device.type == "cuda"
        rows = ON_GPU if on_gpu else ROWS
        text = workspace.blocks("calibration").tokens.flatten().to(model.device)
        text = text.repeat(-(-max(row[1] for row in rows) // len(text)))
        contexts = {context: stock_cache(model, text[None, : context - 1]) for context in {row[1] for row in rows}}
        layer_bytes = workspace.loaded.geometry.bytes_per_token // len(workspace.loaded.geometry.layers)
        for what, context, required in rows:
            plan = evaluator.codecs.plan(spec_of(what))
            tokens, stock = text[None, :context], contexts[context]
            own = taken_in(model, plan, workspace.rotation, stock)
            bytes_: dict[str, int] = {}

            @torch.no_grad()
            def seconds(name: str, cache: Any, tokens: torch.Tensor = tokens, bytes_: Any = bytes_) -> float:
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

            def ours(own: Any = own, seconds: Any = seconds) -> float:
                with attention_over_codes(model):
                    return float(seconds("ours", copy.deepcopy(own)))

            def theirs(stock: Any = stock, seconds: Any = seconds) -> float:
                return float(seconds("stock", copy.deepcopy(stock)))

            ours()  # what is compiled or built once is so now
            title = f"tokens a second of generate after {context} tokens, {what}"
            ratio = side_by_side(title, "the stock DynamicCache", ours, theirs, required, REPEATS)
            with attention_over_codes(model):
                peak = step_peak(model, own, tokens)
            row = {
                "codec": what,
                "context": context,
                "ratio": ratio.ratio,
                "low": ratio.ratio_low,
                "high": ratio.ratio_high,
                "required": required,
                "bytes": bytes_["ours"],
                "bytes_stock": bytes_["stock"],
                "peak_step_bytes": peak,
                "peak_over_layer": peak / (layer_bytes * context),
            }
            table.append(row)
            say(json.dumps(row))
            if (what, context) == HEADLINE:
                headline = ratio
            del own
            evaluator.codecs.forget()
        headline.notes.update(GENERATING, rows=table, **workspace.loaded.numerics)
    report("decode_on_gpu" if on_gpu else "decode", headline)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("name the folder with WikiText-2")
    main()

"""Bits that codecs claim against those that real caches take on report text, for every family, on the embedded model.

Give a folder with WikiText-2. A claim is counted on held-out calibration text when a codec is fitted. The caches are
filled with report blocks in chunks, as in chunked prefill, with every layer's keys and values under the codec.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from side_by_side import RESULTS, machine, say
from smollm2 import GENERATING, prepared

from leankv.cache.layers import LeanLayer
from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import Plan, PlanSpec
from leankv.codecs import FAMILIES, parse_recipe
from leankv.studies.workspace import Workspace

SPECS = (
    *("identity", "mean", "pca:16", "ortho:16", "ae:4", "int:4", "int:2c", "nuq:4+1", "rot:3+qjl", "pq:48x4"),
    *("sparse:20", "share:-2", "transform:1", "transform:s0.01", "transform:s0.03"),
    *("resid(pca:16,int:2)", "resid(share:-2,transform:s0.02)", "resid(share:-2,transform:s0.045)"),
)
REQUIRED = 0.05
SETTINGS: dict[str, Any] = GENERATING | {
    "data__calibration_blocks": 32,
    "data__report_blocks": 8,
    "protocol__window": 0,
}


@torch.no_grad()
def real_bits(workspace: Workspace, plan: Plan) -> tuple[float, float]:
    """Bits a token that the codes of all layers take on the report blocks, held and stored."""
    live = stored = tokens = 0
    model = workspace.loaded.model
    for block in workspace.blocks("report").tokens:
        cache = LeanCache(model.config, plan, sinks=4, window=0, rotation=workspace.rotation, decode_once=True)
        for piece in block[None].split(128, dim=1):
            model.base_model(input_ids=piece, past_key_values=cache, use_cache=True)
        tokens += len(block) - 4
        for layer in cache.layers:
            assert isinstance(layer, LeanLayer)
            for part in layer.parts.values():
                live += 0 if part.code is None else 8 * part.code.nbytes
                stored += 8 * len(part.serialized()[-1])  # behind the sinks
    return live / tokens, stored / tokens


def main() -> None:
    assert {name for spec in SPECS for name in parse_recipe(spec).revisions()} == set(FAMILIES)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        evaluator = prepared(Path(folder), **SETTINGS)
        for spec in SPECS:
            plan = evaluator.codecs.plan(PlanSpec.uniform(spec))
            codecs = plan.values()
            claimed = [sum(c.bits_per_token for c in codecs), sum(c.stored_bits_per_token for c in codecs)]
            real = real_bits(evaluator.workspace, plan)
            off = [abs(r / c - 1) if c else float(r > 0) for r, c in zip(real, claimed, strict=True)]
            rows.append({"codec": spec, "claimed": claimed, "real": real, "off": off, "within": max(off) <= REQUIRED})
            say(
                f"{spec}: live {claimed[0]:.0f} claimed, {real[0]:.0f} real ({100 * off[0]:.1f} %); stored {off[1]:.3f}"
            )
    result = {
        "what": "bits of real caches on report text over the bits that codecs claim, all layers, K and V",
        "against": f"within {100 * REQUIRED:.0f} %",
        "largest_difference": max(max(row["off"]) for row in rows),
        "required": REQUIRED,
        "rows": rows,
        "notes": SETTINGS,
        "machine": machine(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "claimed_bits.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("name the folder with WikiText-2")
    main()

"""Stored prefixes of a certified bundle, short and long: bytes, quality and time in one row.

Give the folder with WikiText-2 and the bundle of a selection under the protocol `prefix`, which is SmolLM2-135M's:

    python benchmarks/certified_prefix.py DIR results/plans-smollm2-prefix/bundle-7pct

Beside it stand 4-bit integers and the stock cache in 16 bits, plain and under zstd, which cost nothing in quality.
Costs are of report text, rows of a prefix and 256 tokens behind it (`leankv.evaluation.perplexity`), with 95 %
intervals over rows. The first token after a stored prefix is timed against computing the prefix, page cache warm, as
`benchmarks/saved_cache.py` does.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from saved_cache import best, break_even, first_token, stock_rows
from side_by_side import RESULTS, machine, say, timed
from smollm2 import bundle_of, prepared, stock_cache

import leankv
from leankv.cache.bundle import Bundle
from leankv.cache.code_attention import attention_over_codes
from leankv.cache.lean_cache import LeanCache
from leankv.cache.part_store import UNBOUNDED
from leankv.evaluation.exact_prefixes import ExactPrefixes
from leankv.evaluation.perplexity import compare, measure_nats
from leankv.storage.memory_budget import MemoryBudget

ROWS = {1024: 32, 7936: 8}
"""Tokens of a prefix (the longer one, with what follows, is all that the model allows) -> rows of report text."""

CONTINUATION, SINKS = 256, 4
KEPT_BYTES = 6 << 30  # of exact prefixes, which all caches are measured behind


def cost(bundle: Bundle, evaluator: Any, prefixes: ExactPrefixes, base: Any) -> dict[str, Any]:
    """What a bundle adds to perplexity behind stored prefixes."""
    model, blocks = evaluator.workspace.loaded.model, evaluator.workspace.blocks("report")

    def fresh() -> LeanCache:
        return bundle.new_cache(window=UNBOUNDED, decode_once=True, encode_every=1)

    found = compare(base, measure_nats(model, blocks, evaluator.protocol, fresh, prefixes=prefixes))
    assert found.interval is not None
    low, high = (100 * end / found.base_ppl for end in found.interval)
    return {"delta_percent": found.delta_percent, "low": low, "high": high, "base_ppl": found.base_ppl}


@torch.no_grad()
def main() -> None:
    rows: list[dict[str, Any]] = []
    for length, count in ROWS.items():
        with tempfile.TemporaryDirectory() as name:
            rows += rows_of(length, count, Path(name))
    result = {
        "what": "stored prefixes of SmolLM2-135M on disk, WikiText-2, report split",
        "bundle": "/".join(Path(sys.argv[2]).parts[-2:]),
        "continuation": CONTINUATION,
        "sinks": SINKS,
        "rows": rows,
        "machine": machine(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "certified_prefix.json").write_text(json.dumps(result, indent=2) + "\n")


def rows_of(length: int, count: int, folder: Path) -> list[dict[str, Any]]:
    """All rows for prefixes of one length."""
    evaluator = prepared(
        folder / "run",
        data__calibration_blocks=2,  # integers are fitted to nothing
        data__report_blocks=count,
        codec__key_space="pre-rope",
        protocol__kind="prefix",
        protocol__prefix_length=length,
        protocol__continuation=CONTINUATION,
        protocol__sinks=SINKS,
        protocol__window=0,
    )
    workspace, protocol = evaluator.workspace, evaluator.protocol
    model, blocks = workspace.loaded.model, workspace.blocks("report")
    bundles = {
        "int:4": bundle_of(evaluator, "int:4"),
        "certified": leankv.load(sys.argv[2], model),
    }
    text = blocks.tokens[:1]
    prefix, last = text[:, :length], text[:, length : length + 1]
    base_bytes = workspace.loaded.geometry.bytes_per_token * length
    prefill_seconds, stock = timed(lambda: first_token(model, stock_cache(model, prefix), last))
    rows: list[dict[str, Any]] = []
    stock_rows(rows, folder, stock, base_bytes / 1e6, prefill_seconds, model, last)
    for row in rows:
        row["delta_percent"] = 0.0
    prefixes = ExactPrefixes(model, MemoryBudget(KEPT_BYTES))
    base = measure_nats(
        model, blocks, protocol, lambda: LeanCache(model.config, {}, sinks=0, window=0), prefixes=prefixes
    )
    for what, bundle in bundles.items():
        store = leankv.PrefixStore(folder / what.replace(":", "-"), bundle, model)
        store.add(prefix)

        def stored(store: Any = store) -> Any:
            with attention_over_codes(model):
                return first_token(model, store.cache_for(text), last)

        seconds, _ = best(stored)
        size = store.stored_bytes(prefix)
        row = {
            "what": what,
            "bytes": size,
            "ratio": base_bytes / size,
            "first_token_seconds": seconds,
            "sooner_than_computing": prefill_seconds / seconds,
            **cost(bundle, evaluator, prefixes, base),
        }
        break_even(row, rows[0])
        rows.append(row)
    for row in rows:
        row |= {"prefix": length, "blocks": count, "prefill_seconds": prefill_seconds}
        row["dtype"] = workspace.loaded.numerics["dtype"]
        say(json.dumps(row))
    return rows


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("name the folder with WikiText-2, and the bundle of a selection under the protocol prefix")
    main()

"""Caches on disk: how fast they are written and read, how large they are, and what they save to the first token.

Give a folder with WikiText-2. Everything on SmolLM2-135M and calibration text, page cache warm, in one run. Megabytes a
second are of the 16-bit cache. Beside LeanKV's stand the stock cache as safetensors, plain and under zstd, and 4-bit
integers. The first token after a stored prefix is timed against computing the prefix with the stock cache: reading
pages, filling the cache, and the forward pass of the last token.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import safetensors.torch
import torch
from side_by_side import RESULTS, machine, say, timed
from smollm2 import GENERATING, bundle_of, prepared, stock_cache
from transformers import DynamicCache

import leankv
from leankv.cache.code_attention import attention_over_codes
from leankv.cache.contents import held_by, opened, sealed_in, tensors_of
from leankv.cache.saved_cache import load_cache, rooms_of

PREFIX, CONTINUATION, REPEATS = 4096, 512, 3
REQUIRED = {"transform:s0.02": (250, 180, 8), "resid(share:-2,transform:s0.02)": (250, 180, 5), "int:4": (None,) * 3}
"""Megabytes a second written and read, and how many times sooner the first token comes."""


def best(function: Any) -> tuple[float, Any]:
    """The shortest of some repeats, and what the last one gave."""
    runs = [timed(function) for _ in range(REPEATS)]
    return min(seconds for seconds, _ in runs), runs[-1][1]


@torch.no_grad()
def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        evaluator = prepared(folder / "run", **GENERATING)
        workspace = evaluator.workspace
        model, loaded = workspace.loaded.model, workspace.loaded
        text = workspace.blocks("calibration").tokens.flatten()[None, : PREFIX + CONTINUATION]
        prefix, last = text[:, :PREFIX], text[:, PREFIX : PREFIX + 1]
        base_bytes = loaded.geometry.bytes_per_token * PREFIX
        megabytes = base_bytes / 1e6

        prefill_seconds, stock = timed(lambda: first_token(model, stock_cache(model, prefix), last))
        stock_rows(rows, folder, stock, megabytes, prefill_seconds, model, last)
        for spec, required in REQUIRED.items():
            bundle = bundle_of(evaluator, spec)
            store = leankv.PrefixStore(folder / spec, bundle, model)
            add_seconds, _ = timed(lambda store=store: store.add(prefix))

            def stored(store: Any = store) -> Any:
                cache = store.cache_for(text)
                with attention_over_codes(model):
                    return first_token(model, cache, last)

            seconds, _ = best(stored)
            cache = store.cache_for(text)
            held = held_by(cache.layers)
            codecs = {f"{site.layer}.{site.part}": codec for site, codec in bundle.plan.items()}
            write_seconds, (tensors, table) = best(lambda held=held, codecs=codecs: tensors_of(held, codecs))
            rooms = rooms_of(bundle, 4)
            read_seconds, _ = best(
                lambda t=tensors, table=table, rooms=rooms: opened([sealed_in(t, table, rooms, 1)], rooms)
            )
            path = folder / "cache.safetensors"
            cache.save(path)
            row = {
                "what": spec,
                "bytes": path.stat().st_size,
                "ratio": base_bytes / path.stat().st_size,
                "file_over_stored": path.stat().st_size / cache.serialized_nbytes(),
                "page_bytes": store.stored_bytes(prefix),
                "write_mb_s": megabytes / write_seconds,
                "read_mb_s": megabytes / read_seconds,
                "first_token_seconds": seconds,
                "sooner_than_computing": prefill_seconds / seconds,
                "add_seconds": add_seconds,
                "nats_apart": apart(model, cache, load_cache(path, bundle), text),
                "required": required,
            }
            break_even(row, rows[0])
            rows.append(row)
            say(json.dumps(row))
    result = {
        "what": f"caches of {PREFIX} tokens on disk, SmolLM2-135M, {megabytes:.1f} MB in 16 bits",
        "prefill_seconds": prefill_seconds,
        "rows": rows,
        "notes": {**GENERATING, **workspace.loaded.numerics},
        "machine": machine(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "saved_cache.json").write_text(json.dumps(result, indent=2) + "\n")


def first_token(model: Any, cache: Any, last: torch.Tensor) -> Any:
    """Run one token behind a cache; the cache."""
    model(input_ids=last, past_key_values=cache)
    return cache


def stock_rows(
    rows: list[dict[str, Any]], folder: Path, cache: Any, megabytes: float, prefill: float, model: Any, last: Any
) -> None:
    """The stock cache in 16 bits as safetensors, plain and under zstd (level 3), without the last token it took in."""
    tensors = {
        f"{number}.{part}": rows_.to(torch.bfloat16).contiguous()
        for number, layer in enumerate(cache.layers)
        for part, rows_ in (("k", layer.keys[:, :, :-1]), ("v", layer.values[:, :, :-1]))
    }

    def restored(data: bytes) -> Any:
        found, fresh = safetensors.torch.load(data), DynamicCache(config=model.config)
        for number in range(len(cache.layers)):
            fresh.update(*(found[f"{number}.{part}"].to(model.dtype) for part in "kv"), number)
        return first_token(model, fresh, last)

    zstd, whole = pyarrow.Codec("zstd", compression_level=3), len(safetensors.torch.save(tensors))
    for name, pack, unpack in (
        ("stock, safetensors", bytes, bytes),
        ("stock, safetensors, zstd", zstd.compress, lambda data: zstd.decompress(data, whole)),
    ):
        path = folder / "stock"

        def write(pack: Any = pack, path: Path = path) -> None:
            path.write_bytes(pack(safetensors.torch.save(tensors)))

        def read(unpack: Any = unpack, path: Path = path) -> bytes:
            return bytes(unpack(path.read_bytes()))

        write_seconds, _ = best(write)
        read_seconds, _ = best(read)
        seconds, _ = best(lambda read=read: restored(read()))
        size = path.stat().st_size
        row = {
            "what": name,
            "bytes": size,
            "ratio": megabytes * 1e6 / size,
            "write_mb_s": megabytes / write_seconds,
            "read_mb_s": megabytes / read_seconds,
            "first_token_seconds": seconds,
            "sooner_than_computing": prefill / seconds,
        }
        rows.append(row)
        say(json.dumps(row))


def break_even(row: dict[str, Any], plain: dict[str, Any]) -> None:
    """Below which bandwidth of disk or network a row's first token comes before the plain stock cache's."""
    later, fewer = row["first_token_seconds"] - plain["first_token_seconds"], plain["bytes"] - row["bytes"]
    row["break_even_mb_s"] = None if later <= 0 else fewer / later / 1e6


def apart(model: Any, cache: Any, back: Any, text: torch.Tensor) -> float:
    """Nats a token by which the continuation differs behind a cache and behind the same one read back."""
    nats = []
    for each in (cache, back):
        start = each.get_seq_length()
        logits = model(text[:, start:], past_key_values=each).logits[0, :-1].float()
        nats.append(-logits.log_softmax(1).gather(1, text[0, start + 1 :, None]).mean(dtype=torch.float64).item())
    return abs(nats[1] - nats[0])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("name the folder with WikiText-2")
    main()

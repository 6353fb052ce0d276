"""The comparison: whole caches, ours and those of others, in perplexity and in bytes, on the same report blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

from leankv.accounting import Footprint
from leankv.cache import LeanCache
from leankv.codecs import CodecSpec
from leankv.compare_report import write_compare_report
from leankv.compare_table import COLUMNS
from leankv.errors import UserError
from leankv.held_bytes import held_bytes
from leankv.peers import Peer, try_peer
from leankv.perplexity import BlockNats, compare
from leankv.run import Run
from leankv.store import write_text
from leankv.workplace import remove_captures

CONTEXT = 4096
"""Tokens at which the ratio of the whole cache is given."""


def compare_caches(run: Run, specs: Sequence[str], peers: Sequence[Peer]) -> pd.DataFrame:
    """Measure every codec on all layers, K and V, and every peer; write the table and its report.

    Args:
        run: its own codecs play no part.
        specs: as `leankv.rate_map.check_specs` gives them.
        peers: caches of others.

    Returns:
        The table, as `leankv.compare_table` describes it.

    Raises:
        UserError: a spec or a peer does not suit the model, or peers are asked for in a strict pass.
    """
    if peers and run.experiment.protocol.kind == "strict":
        raise UserError(
            "caches of others hand out what they are given exact at first, so one strict pass shows no loss of theirs; "
            "use --protocol stream, or leave --peer out"
        )
    for spec in specs:
        run.with_codecs(spec, spec)  # what does not suit the model is refused before anything is fitted
    run.begin()
    for peer in peers:
        try_peer(peer, run.loaded, run.blocks("report").tokens[:1], run.experiment.protocol.chunk)
    base = run.measure("report", [], "base perplexity, report split")
    rows = []
    for spec in specs:
        # One spec after the other, so that the codecs of one only are in memory.
        rows.append(_row_of_codec(run.with_codecs(spec, spec), spec, base))
        run.progress.say(_words(rows[-1]))
    for peer in peers:
        rows.append(_row_of_peer(run, peer, base))
        run.progress.say(_words(rows[-1]))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    write_text(run.folder / "compare.csv", table.to_csv(index=False))
    write_compare_report(run.folder)
    remove_captures(run.folder)
    return table


def _row_of_codec(run: Run, spec: str, base: BlockNats) -> dict[str, Any]:
    layers = range(len(run.loaded.geometry.layers))
    measured = run.measure("report", layers, f"perplexity with {spec}")
    plan = run.plan(layers)
    protocol = run.experiment.protocol

    def make_cache() -> LeanCache:
        config = run.loaded.model.config
        return LeanCache(config, plan, protocol.sinks, protocol.window, rotation=run.rotation)

    bytes_ = _bytes(run, make_cache, run.nats_path("report", layers).stem)
    codecs = [codec for own in plan.values() for codec in own.values()]
    return {
        "method": _method(run.specs["k"]),
        "peer": "",
        "spec": spec,
        "key_space": run.key_space,
        "weighting": run.experiment.fit.weighting,
        "sinks": protocol.sinks,
        "window": 0 if protocol.kind == "strict" else protocol.window,
        "codec_bytes": sum(codec.nbytes for codec in codecs),
        **_figures(run, base, measured, bytes_),
    }


def _row_of_peer(run: Run, peer: Peer, base: BlockNats) -> dict[str, Any]:
    def make_cache() -> Any:
        torch.manual_seed(run.experiment.seed)  # for caches that draw a rotation or a sketch
        return peer.make(run.loaded.model.config)

    made_by = {"peer": peer.spec, "maker": peer.maker}
    measured = run.measure_cache("report", make_cache, made_by, f"perplexity with {peer.spec}")
    bytes_ = _bytes(run, make_cache, peer.spec + peer.maker)
    return {
        "method": peer.method,
        "peer": peer.maker,
        "spec": peer.spec,
        "codec_bytes": 0,
        **_figures(run, base, measured, bytes_),
    }


def _figures(run: Run, base: BlockNats, measured: BlockNats, bytes_: dict[str, list[int]]) -> dict[str, Any]:
    """The columns that every row has."""
    cost = compare(base, measured)
    low, high = cost.interval or (None, None)
    uncompressed = Footprint(run.loaded.geometry, {}, 0, 0)
    growth = {name: (bytes_[name][1] - bytes_[name][0]) for name in ("live", "stored")}
    shorter, longer = bytes_["tokens"]
    replaced = uncompressed.base_bytes(longer) - uncompressed.base_bytes(shorter)
    # What is beyond the longer fill grows as it did; where that is CONTEXT, nothing is beyond it. A cache that is too
    # short for its kind (all of it exact at first, then none) may shrink instead, and its ratios are not known.
    at_context = bytes_["live"][1] + growth["live"] * (CONTEXT - longer) / (longer - shorter)
    return {
        "protocol": run.experiment.protocol.kind,
        "tokens": cost.tokens,
        "code_ratio_live": replaced / growth["live"] if growth["live"] > 0 else None,
        "code_ratio_stored": replaced / growth["stored"] if growth["stored"] > 0 else None,
        "cache_ratio_4096": uncompressed.base_bytes(CONTEXT) / at_context if at_context > 0 else None,
        "base_ppl": cost.base_ppl,
        "ppl": cost.ppl,
        "delta_percent": cost.delta_percent,
        "low": None if low is None else 100 * low / cost.base_ppl,
        "high": None if high is None else 100 * high / cost.base_ppl,
        "seconds": measured.seconds,
    }


def _bytes(run: Run, make_cache: Callable[[], Any], cache_key: str) -> dict[str, list[int]]:
    """What a real cache holds after two lengths of report text, fed in chunks: `tokens`, and bytes `live`, `stored`."""
    protocol = run.experiment.protocol
    lengths = _fill_lengths(run)
    tokens = run.blocks("report").tokens.flatten()[None, : lengths[1]]

    @torch.no_grad()
    def compute() -> dict[str, list[int]]:
        cache = make_cache()
        live, stored = [], []
        pieces = tokens.to(run.loaded.model.device).split(protocol.chunk, dim=1)
        fed = 0
        with run.progress.stage(f"bytes after {lengths[1]} tokens", len(pieces)) as step:
            for piece in pieces:
                run.loaded.model.base_model(input_ids=piece, past_key_values=cache, use_cache=True)
                fed += piece.shape[1]
                if fed in lengths:
                    ours = isinstance(cache, LeanCache)
                    live.append(cache.nbytes() if ours else held_bytes(cache))
                    stored.append(cache.parked_nbytes() if ours else live[-1])
                step()
        return {"tokens": lengths, "live": live, "stored": stored}

    depends_on = {
        "model": run.model_key,
        "blocks": run.blocks("report").hash,
        "cache": cache_key,
        "chunk": protocol.chunk,
        "lengths": lengths,
    }
    found: dict[str, list[int]] = run.cells.get_or_compute("bytes", depends_on, compute)
    return found


def _fill_lengths(run: Run) -> list[int]:
    """Half of, and all of, what the caches are filled with: `CONTEXT` tokens where text and model have so many.

    Raises:
        UserError: two chunks are more than there is.
    """
    chunk, blocks = run.experiment.protocol.chunk, run.blocks("report")
    positions = getattr(run.loaded.model.config.get_text_config(), "max_position_embeddings", CONTEXT)
    most = min(CONTEXT, blocks.tokens.numel(), positions)
    # Whole chunks in both halves, so that caches which fill up in groups are met at the same point.
    longer = most // (2 * chunk) * 2 * chunk
    if not longer:
        raise UserError(
            f"two chunks of {chunk} tokens are more than the {most} that report text and model allow; "
            "use more --blocks or a smaller --set protocol.chunk"
        )
    return [longer // 2, longer]


def _method(spec: CodecSpec) -> str:
    """The spec without its rates: `transform`, `resid(share,transform)`."""
    if not spec.family.nested:
        return spec.family.family
    return f"{spec.family.family}({','.join(map(_method, spec.arguments))})"


def _words(row: dict[str, Any]) -> str:
    return (
        f"{row['spec']}: {row['delta_percent']:+.2f} % perplexity, cache ratio {row['cache_ratio_4096']:.2f} at "
        f"{CONTEXT} tokens"
    )

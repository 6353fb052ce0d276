"""The comparison: whole caches, ours and those of others, in perplexity and in bytes, on the same blocks."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from leankv.cache_bytes import CacheBytes, bytes_of_cache, bytes_of_plan
from leankv.codecs import CodecSpec
from leankv.compare_report import write_compare_report
from leankv.compare_table import COLUMNS
from leankv.divergence import divergence_columns
from leankv.errors import UserError
from leankv.paired import PairedRun
from leankv.peers import Peer, try_peer
from leankv.perplexity import compare
from leankv.report import number_text
from leankv.run import Run
from leankv.store import write_text
from leankv.workplace import remove_captures

CONTEXT = 4096
"""Tokens at which the all-in ratio has a column of its own."""


def compare_caches(
    run: Run, specs: Sequence[str], peers: Sequence[Peer], split: str = "report", windows: Sequence[int] = ()
) -> pd.DataFrame:
    """Measure every codec on all layers, K and V, and every peer; write the table and its report.

    Args:
        run: its own codecs play no part.
        specs: as `leankv.rate_map.check_specs` gives them.
        peers: caches of others.
        split: whose blocks are measured: `selection` to choose with, else `report` or `certification`.
        windows: latest tokens kept exact, a row for each codec and window; the run's own unless given.

    Returns:
        The table, as `leankv.compare_table` describes it.

    Raises:
        UserError: a spec or a peer does not suit the model, or peers or windows are asked for in a strict pass.
    """
    protocol = run.experiment.protocol
    if peers and protocol.kind == "strict":
        raise UserError(
            "caches of others hand out what they are given exact at first, so one strict pass shows no loss of theirs; "
            "use --protocol stream, or leave --peer out"
        )
    wanted = dict.fromkeys(windows or (protocol.window,))
    runs = [run if window == protocol.window else run.with_window(window) for window in wanted]
    for spec in specs:
        run.with_codecs(spec, spec)  # what does not suit the model is refused before anything is fitted
    run.begin()
    for peer in peers:
        try_peer(peer, run.loaded, run.blocks(split).tokens[:1], protocol.chunk)
    rows = []
    for spec in specs:
        # One spec after the other, so that the codecs of one only are in memory.
        for own in runs:
            rows.append(_row_of_codec(own.with_codecs(spec, spec), spec, split))
            run.progress.say(row_words(rows[-1]))
    for peer in peers:
        rows.append(_row_of_peer(run, peer, split))
        run.progress.say(row_words(rows[-1]))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    write_text(run.folder / "compare.csv", table.to_csv(index=False))
    write_compare_report(run.folder)
    remove_captures(run.folder)
    return table


def _row_of_codec(run: Run, spec: str, split: str) -> dict[str, Any]:
    layers = range(len(run.loaded.geometry.layers))
    protocol = run.experiment.protocol
    pair = run.measure_pair(split, layers, f"base model and {spec}, window {protocol.window}, {split} split")
    codecs = [codec for own in run.plan(layers).values() for codec in own.values()]
    return {
        "method": _method(run.specs["k"]),
        "peer": "",
        "spec": spec,
        "key_space": run.key_space,
        "weighting": run.experiment.fit.weighting,
        "sinks": protocol.sinks,
        "window": protocol.window,
        "codec_bytes": sum(codec.nbytes for codec in codecs),
        **_figures(run, split, pair, bytes_of_plan(run, split, layers)),
    }


def _row_of_peer(run: Run, peer: Peer, split: str) -> dict[str, Any]:
    def make_cache() -> Any:
        torch.manual_seed(run.experiment.seed)  # for caches that draw a rotation or a sketch
        return peer.make(run.loaded.model.config)

    made_by = {"peer": peer.spec, "maker": peer.maker}
    pair = run.measure_cache_pair(split, make_cache, made_by, f"base model and {peer.spec}, {split} split")
    bytes_ = bytes_of_cache(run, split, make_cache, f"{peer.spec} {peer.maker} seed {run.experiment.seed}")
    return {
        "method": peer.method,
        "peer": peer.maker,
        "spec": peer.spec,
        "codec_bytes": 0,
        **_figures(run, split, pair, bytes_),
    }


def _figures(run: Run, split: str, pair: PairedRun, bytes_: CacheBytes) -> dict[str, Any]:
    """The columns that every row has."""
    cost = compare(pair.base, pair.compressed)
    low, high = cost.interval or (None, None)
    return {
        "protocol": run.experiment.protocol.kind,
        "split": split,
        "blocks": len(pair.base.nats),
        "context": bytes_.context,
        "tokens": cost.tokens,
        "code_ratio_live": bytes_.code_ratio_live,
        "code_ratio_stored": bytes_.code_ratio_stored,
        "cache_ratio": bytes_.cache_ratio,
        "all_in_ratio": bytes_.all_in_ratio,
        "all_in_ratio_4096": bytes_.all_in_ratio if bytes_.context == CONTEXT else None,
        "held_bytes": bytes_.held,
        "stored_bytes": bytes_.stored,
        "peak_step_bytes": bytes_.peak_step,
        "codec_bytes_memory": bytes_.codecs,
        "base_ppl": cost.base_ppl,
        "ppl": cost.ppl,
        "delta_percent": cost.delta_percent,
        "low": None if low is None else 100 * low / cost.base_ppl,
        "high": None if high is None else 100 * high / cost.base_ppl,
        **divergence_columns(pair.divergence),
        "seconds": pair.seconds,
    }


def _method(spec: CodecSpec) -> str:
    """The spec without its rates: `transform`, `resid(share,transform)`."""
    if not spec.family.nested:
        return spec.family.family
    return f"{spec.family.family}({','.join(map(_method, spec.arguments))})"


def row_words(row: dict[str, Any]) -> str:
    """A row in one line; `-` for a ratio that is not known."""
    window = f", window {row['window']}" if row["peer"] == "" else ""
    ratios = [number_text(row[name], ".2f") for name in ("cache_ratio", "all_in_ratio")]
    return (
        f"{row['spec']}{window}: {row['delta_percent']:+.2f} % perplexity; at {row['context']} tokens cache ratio "
        f"{ratios[0]}, all-in ratio {ratios[1]}"
    )

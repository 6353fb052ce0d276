"""Attention of one new token over one sequence's codes, by compiled loops: all scores, one softmax, one sum.

What a decoding step does, on the CPU and where every codec of the layer has such loops (`Codec.has_packed_rows`). Else
codes are read piece by piece (`leankv.cache.code_attention`), which is this one's oracle.
"""

import torch
from jaxtyping import Float

from leankv import compiled
from leankv.cache.part_store import PartStore
from leankv.compiled.packed_rows import Meeting, PackedRows


def attended(
    keys: PartStore, values: PartStore, queries: Float[torch.Tensor, "1 heads groups head_dim"]
) -> Float[torch.Tensor, "1 heads groups _"] | None:
    """Weighted values of all tokens held, float32; None where loops cannot make them.

    Args:
        keys, values: of one layer; both hold the same tokens.
        queries: scaled and float32; `groups` of them read a head.
    """
    if not (compiled.serves(queries) and keys.is_packed and values.is_packed):
        return None
    heads = queries.shape[1]
    scores = queries.new_empty(len(keys), heads * queries.shape[2])
    meeting: Meeting | None = None
    place = coded = 0
    for run in keys.runs():
        if isinstance(run, PackedRows):
            meeting = meeting or keys.meeting(queries)
            run.scores(meeting, coded, scores, place)
            coded += len(run)
        else:
            scores[place : place + len(run)] = (queries[0] @ _heads(run).mT).flatten(0, 1).T
        place += len(run)
    weights = scores.sub_(scores.amax(dim=0)).exp_()  # in place: they are the largest part of what a step takes
    total = weights.sum(dim=0)
    place, sums = 0, []
    for run in values.runs():
        if isinstance(run, PackedRows):
            sums.append(run.weighted(weights, place, heads))
        else:
            own = weights[place : place + len(run)].T.unflatten(0, (heads, -1))
            sums.append(own @ _heads(run))
        place += len(run)
    summed = sum(sums[1:], start=sums[0])
    return (summed / total.unflatten(0, queries.shape[1:3])[:, :, None])[None]


def _heads(rows: Float[torch.Tensor, "tokens heads head_dim"]) -> Float[torch.Tensor, "heads tokens head_dim"]:
    return rows.float().transpose(0, 1)

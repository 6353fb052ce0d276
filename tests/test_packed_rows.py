"""What compiled attention reads of packed rows is what decoded vectors give; a step over codes is one over pieces."""

import copy
import os
from typing import Any

import pytest
import torch

from leankv.cache.code_attention import NAME
from leankv.cache.lean_cache import LeanCache
from leankv.cache.part_store import PartStore
from leankv.cache.plan import PlanSpec
from leankv.compiled import packed_rows
from leankv.compiled.packed_rows import Meeting
from leankv.models.rope import CONVENTIONS, find_rotation, rotate
from tests import tiny
from tests.codec_vectors import WIDTH, fit, vectors
from tests.forked import FORK
from tests.test_codecs import SPECS
from tests.test_decoded_once import fitted

HEADS, GROUPS, HEAD_DIM = 2, 3, WIDTH // 2

PACKED = [
    spec for spec in SPECS if spec.split(":")[0] in ("int", "nuq", "rot", "transform") and not spec.endswith("+qjl")
]


def test_families_with_loops_are_known() -> None:
    assert [spec for spec in SPECS if fit(spec, vectors())[0].has_packed_rows] == PACKED
    assert len(PACKED) > 6


@pytest.mark.parametrize("tokens", [1, 33, 256])
@pytest.mark.parametrize("spec", PACKED)
def test_rows_are_read_as_they_are_decoded(spec: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_rows, "LEAST_TOKENS", 50)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    codec = fit(spec, vectors())[0]
    code = codec.encode(10 * vectors(seed=1)[0, :tokens])  # ten times as far out: escapes and outliers
    rows = codec.packed_rows(code)
    assert len(rows) == tokens
    heads = codec.decode(code).unflatten(1, (HEADS, HEAD_DIM)).transpose(0, 1)
    generator = torch.Generator().manual_seed(2)

    queries = torch.randn(HEADS, GROUPS, HEAD_DIM, generator=generator)
    expected = (queries @ heads.mT).flatten(0, 1).T
    torch.testing.assert_close(rows.scores(Meeting.as_cached(queries)), expected, rtol=1e-5, atol=1e-3)

    weights = torch.rand(tokens, HEADS * GROUPS, generator=generator)
    own = weights.T.unflatten(0, (HEADS, GROUPS))
    torch.testing.assert_close(rows.weighted(weights, HEADS), own @ heads, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("convention", list(CONVENTIONS))
@pytest.mark.parametrize("rotary", [HEAD_DIM, HEAD_DIM - 4])
def test_keys_are_rotated_as_they_are_read(convention: str, rotary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_rows, "LEAST_TOKENS", 50)
    tokens = 200
    codec = fit("int:4", vectors())[0]
    code = codec.encode(vectors(seed=1)[0, :tokens])
    rows = codec.packed_rows(code)
    angles = torch.arange(packed_rows.BLOCK)[:, None] * torch.logspace(0, -2, rotary // 2)
    angles = torch.cat([angles, angles], 1) if convention == "half" else angles.repeat_interleave(2, 1)
    generator = torch.Generator().manual_seed(3)
    blocks = -(-tokens // packed_rows.BLOCK)
    queries = torch.randn(blocks, HEADS, GROUPS, HEAD_DIM, generator=generator)
    scores = rows.scores(Meeting(queries, angles.cos(), angles.sin(), convention == "half"))

    places = torch.arange(tokens)
    own = angles[places % packed_rows.BLOCK][None]
    keys = codec.decode(code).unflatten(1, (HEADS, HEAD_DIM)).transpose(0, 1)[None]
    turned = rotate(keys, own.cos(), own.sin(), CONVENTIONS[convention])[0]  # [heads, tokens, head_dim]
    expected = torch.einsum("thgd,htd->hgt", queries[places // packed_rows.BLOCK], turned).flatten(0, 1).T
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.whole_runs
@pytest.mark.parametrize(
    ("keys", "values"), [("int:4", "nuq:3+5"), ("transform:s0.2", "none"), ("nuq:4", "int:2c"), ("rot:4", "rot:3")]
)
def test_a_step_is_what_pieces_give(model: Any, keys: str, values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through every architecture: rotary conventions, sliding windows, shared and unshared heads."""
    plan = fitted(model, PlanSpec.uniform(keys).with_layers(range(4), v=values).with_layers([1], k="none"))
    model.set_attn_implementation(NAME)
    cache = LeanCache(model.config, plan, sinks=2, window=3, rotation=find_rotation(model, False, lambda reason: None))
    monkeypatch.setattr("leankv.cache.reading.LOOPED_PIECE", 64)
    loops, taken = PartStore.packed, []

    def counted(store: PartStore, first: int, last: int) -> Any:
        taken.append((first, last))
        return loops(store, first, last)

    monkeypatch.setattr(PartStore, "packed", counted)
    has_loops = PartStore.has_loops
    with torch.no_grad():
        model(input_ids=tiny.tokens(1, 200), past_key_values=cache, use_cache=True)
        for step in range(2):
            other = copy.deepcopy(cache)
            token = tiny.tokens(1, 1, seed=step)
            monkeypatch.setattr(PartStore, "has_loops", has_loops)
            fast = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            monkeypatch.setattr(PartStore, "has_loops", False)
            slow = model(input_ids=token, past_key_values=other, use_cache=True).logits
            torch.testing.assert_close(fast, slow, rtol=1e-4, atol=5e-5)
    assert taken


def test_a_forked_process_reads_with_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_rows, "LEAST_TOKENS", 50)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    codec = fit("int:4", vectors())[0]
    rows, queries = codec.packed_rows(codec.encode(vectors()[0])), torch.ones(HEADS, GROUPS, HEAD_DIM)
    expected = rows.scores(Meeting.as_cached(queries))

    def read() -> None:
        os._exit(0 if torch.equal(rows.scores(Meeting.as_cached(queries)), expected) else 1)

    process = FORK.Process(target=read)
    process.start()
    process.join(20)
    process.kill()
    process.join()
    assert process.exitcode == 0

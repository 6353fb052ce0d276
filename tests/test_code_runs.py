"""Codes in runs: what is appended is all there, and what lies before is left alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leankv.cache.code_runs import RUN, CodeRuns
from leankv.codecs import Code
from tests.codec_vectors import fit, vectors

SPECS = ("int:4", "transform:s0.5", "resid(mean,nuq:2+5)")
BATCH, MOST = 2, 1200


@pytest.fixture(scope="module", params=SPECS)
def code(request: pytest.FixtureRequest) -> Code:
    """Of two rows of more tokens than a few runs have; some with escapes or outliers of different lengths."""
    codec = fit(request.param, vectors())[0]
    return codec.encode(5 * vectors(1, BATCH * MOST, seed=3)[0]).unflatten(BATCH)


def same(one: Code, other: Code) -> bool:
    return one.shape == other.shape and all(
        torch.equal(*pair) for pair in zip(one.tensors(), other.tensors(), strict=True)
    )


@given(pieces=st.lists(st.integers(1, 400), min_size=1, max_size=12), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)))
@settings(max_examples=40)
def test_any_pieces_are_one_code(code: Code, pieces: list[int], ends: tuple[float, float]) -> None:
    runs, total = CodeRuns([code.narrow(0, pieces[0])]), pieces[0]
    for piece in pieces[1:]:
        piece = min(piece, MOST - total)
        if piece:
            runs, total = runs.append(code.narrow(total, total + piece)), total + piece
    assert runs.shape == (BATCH, total)
    assert same(runs.whole(), code.narrow(0, total))
    first, last = sorted(round(end * total) for end in ends)
    assert same(runs.narrow(first, last), code.narrow(first, last))
    rows = torch.tensor([1, 0, 1])
    assert same(runs.index(rows).whole(), code.narrow(0, total).index(rows))


def test_a_token_is_appended_without_a_copy_of_all(code: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leankv.cache.code_runs.LONGEST", 2 * RUN)
    runs = CodeRuns([code.narrow(0, 1)])
    for token in range(1, MOST):
        before = {tensor.data_ptr() for run in runs._runs[:-1] for tensor in run.tensors()}
        runs = runs.append(code.narrow(token, token + 1))
        if (token + 1) % (2 * RUN):  # else two runs become one
            assert before <= {tensor.data_ptr() for run in runs._runs for tensor in run.tensors()}
    lengths = [2 * RUN] * (MOST // (2 * RUN)) + [MOST % (2 * RUN)]
    assert [run.shape[1] for run in runs._runs] == lengths
    assert list(runs.borders()) == [sum(lengths[:number]) for number in range(len(lengths))]
    assert runs.nbytes == sum(tensor.nbytes for tensor in runs.whole().tensors())


def test_runs_of_a_long_text_are_few(code: Code) -> None:
    runs = CodeRuns([code.narrow(0, 100)])
    for token in range(100, MOST):
        runs = runs.append(code.narrow(token, token + 1))
    assert [run.shape[1] for run in runs._runs] == [4 * RUN, MOST - 4 * RUN]
    assert same(runs.whole(), code)

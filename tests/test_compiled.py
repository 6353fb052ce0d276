"""Compiled loops give what torch's operations give."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leankv import compiled
from leankv.codecs.coding.mixed_radix import MixedRadix
from leankv.codecs.coding.packing import looked_up, pack
from leankv.models.rope import CONVENTIONS, rotate
from tests.codec_vectors import fit, vectors
from tests.test_codecs import SPECS


def both(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the loops give, and what torch gives."""
    assert compiled.compiler() != "none"
    fast = work()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "serves", lambda tensor: False)
        return fast, work()


@pytest.mark.parametrize("spec", SPECS)
def test_codecs_decode_alike(spec: str) -> None:
    codec = fit(spec, vectors())[0]
    # Ten times as far out as what it was fitted to, so that there are escapes and outliers.
    code = codec.encode(10 * vectors(seed=1)[0])
    torch.testing.assert_close(*both(lambda: codec.decode(code).float()), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "transform" in spec])
@pytest.mark.parametrize("scale", [1, 10, 1e6])
def test_transforms_encode_alike(spec: str, scale: float) -> None:
    """So far out, too, that tokens have more escapes than a byte counts."""
    codec = fit(spec, vectors())[0]
    x = scale * vectors(seed=1)[0]
    fast, slow = both(lambda: torch.cat([t.flatten() for t in codec.encode(x).tensors()]))
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "transform" in spec])
def test_what_is_no_number_stays_within_a_token_s_code(spec: str) -> None:
    """A model that overflows says nonsense, and does not write where other things stand."""
    codec = fit(spec, vectors())[0]
    x = vectors(seed=1)[0][:4]
    broken = x.clone()
    broken[1], broken[2, 3] = torch.nan, torch.inf
    decoded = codec.decode(codec.encode(broken)).float()
    expected = codec.decode(codec.encode(x)).float()
    assert decoded.shape == expected.shape
    assert torch.equal(decoded[[0, 3]], expected[[0, 3]])


@given(
    ranges=st.lists(st.tuples(st.integers(-200, 200), st.integers(1, 256)), min_size=1, max_size=40),
    tokens=st.integers(0, 130),
    seed=st.integers(0, 99),
)
def test_mixed_radix_is_read_back_exactly(ranges: list[tuple[int, int]], tokens: int, seed: int) -> None:
    low, levels = torch.tensor(ranges, dtype=torch.float32).T.contiguous()
    layout = MixedRadix(low, levels)
    generator = torch.Generator().manual_seed(seed)
    q = low + (torch.rand(tokens, len(ranges), generator=generator) * levels).floor()
    fast, slow = both(lambda: layout.values(layout.pack(q)))
    assert torch.equal(fast, q)
    assert torch.equal(slow, q)


@given(bits=st.integers(1, 8), count=st.integers(1, 70), tokens=st.integers(0, 9), seed=st.integers(0, 99))
def test_numbers_of_any_bits_are_looked_up(bits: int, count: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, table = torch.randint(2**bits, (tokens, count), generator=generator), torch.randn(2**bits, generator=generator)
    fast, slow = both(lambda: looked_up(table, pack(q, bits), bits, count))
    assert torch.equal(fast, table[q])
    assert torch.equal(slow, table[q])


@pytest.mark.parametrize("convention", list(CONVENTIONS))
@pytest.mark.parametrize(("rows", "rotary"), [(1, 16), (3, 16), (3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_are_rotated_alike(convention: str, rows: int, rotary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(3, 2, 9, 16, generator=generator).to(dtype)
    cos, sin = torch.randn(2, rows, 9, rotary, generator=generator)
    fast, slow = both(lambda: rotate(keys, cos, sin, CONVENTIONS[convention]))
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)


def test_gradients_go_through_torch() -> None:
    keys = torch.randn(1, 2, 4, 16, requires_grad=True)
    assert not compiled.serves(keys)
    with torch.no_grad():
        assert compiled.serves(keys)
        rotate(keys, torch.ones(1, 4, 16), torch.zeros(1, 4, 16), CONVENTIONS["half"])

"""What codecs code with: packing, levels, and the measure of error."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from leankv.codecs import fraction_of_variance_unexplained
from leankv.codecs.coding.lloyd_max import gaussian_levels, lloyd_levels, nearest_level
from leankv.codecs.coding.packing import pack, packed_bytes, unpack

a_few_times = hypothesis.settings(max_examples=40, deadline=None)


@a_few_times
@hypothesis.given(st.integers(1, 8), st.integers(0, 40), st.integers(0, 5), st.integers(0, 2**31))
def test_packed_integers_come_back_and_take_their_bits(bits: int, count: int, rows: int, seed: int) -> None:
    values = torch.randint(2**bits, (rows, count), generator=torch.Generator().manual_seed(seed))
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, math.ceil(count * bits / 8)) == (rows, packed_bytes(count, bits))
    assert torch.equal(unpack(packed, bits, count), values.byte())


def test_packed_integers_lie_behind_each_other_from_the_lowest_bit_on() -> None:
    assert pack(torch.tensor([[1, 2, 3]]), 3).tolist() == [[0b11_010_001, 0b0]]
    assert pack(torch.tensor([[1, 0, 0, 1, 1]]), 1).tolist() == [[0b11001]]


@pytest.mark.parametrize(("bits", "least"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)])
def test_gaussian_levels_leave_the_known_error(bits: int, least: float) -> None:
    """Max, Quantizing for minimum distortion, 1960, table I."""
    levels = gaussian_levels(bits)
    numbers = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000).float()
    error = (numbers - levels[nearest_level(numbers, levels).int()]).square().mean().item()
    assert error == pytest.approx(least, rel=5e-3)


@a_few_times
@hypothesis.given(st.integers(1, 200), st.integers(1, 4), st.integers(0, 2**31))
def test_each_level_is_the_weighted_mean_of_what_is_nearest_to_it(count: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, weights = torch.randn(count, generator=generator), torch.rand(count, generator=generator) + 0.01
    levels = lloyd_levels(values, weights, 2**bits)
    index = nearest_level(values, levels).long()
    assert torch.equal((values - levels[index]).abs(), (values[:, None] - levels).abs().amin(dim=1))
    for level in index.unique():
        own = index == level
        expected = (weights[own] * values[own]).sum() / weights[own].sum()
        assert levels[level].item() == pytest.approx(expected.item(), abs=1e-2)


def test_fvu_of_known_vectors() -> None:
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 2.0], [0.0, -2.0]]])
    reconstructed = torch.stack([x[0] / 2, torch.zeros(2, 2)])
    assert fraction_of_variance_unexplained(x, reconstructed).tolist() == [0.25, 1.0]
    assert math.isnan(fraction_of_variance_unexplained(torch.ones(3, 2), torch.ones(3, 2)).item())

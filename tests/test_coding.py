"""What codecs code with: packing, levels, and the measure of error."""

import contextlib
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from leankv import compiled
from leankv.codecs import fraction_of_variance_unexplained
from leankv.codecs.coding.entropy import bits_of, decode_columns, encode_columns, entropy_of, frequencies_of
from leankv.codecs.coding.integer_matrix import LARGEST, IntegerMatrix, rounded
from leankv.codecs.coding.lloyd_max import gaussian_levels, lloyd_levels, nearest_level
from leankv.codecs.coding.mixed_radix import MixedRadix
from leankv.codecs.coding.packing import pack, packed_bytes, unpack
from leankv.codecs.coding.shapes import SCALES, SHAPES, fitted_shapes, probabilities

a_few_times = hypothesis.settings(max_examples=40)


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


@a_few_times
@hypothesis.given(st.lists(st.integers(1, 256), max_size=40), st.integers(0, 5), st.integers(0, 2**31))
def test_integers_of_any_ranges_come_back_from_their_bytes(levels: list[int], rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(levels, dtype=torch.float32)
    low = torch.randint(-300, 300, (len(levels),), generator=generator).float()
    q = low + (torch.rand(rows, len(levels), generator=generator) * counts).floor()
    layout = MixedRadix(low, counts)
    assert layout.n_bytes <= sum(n > 1 for n in levels)
    assert torch.equal(layout.values(layout.pack(q)), q)


def test_every_byte_reads_as_long_division_has_it() -> None:
    layout = MixedRadix(torch.zeros(5), torch.full((5,), 3.0))
    assert layout.n_bytes == 1
    digits = [[byte // 3**place % 3 for place in range(5)] for byte in range(243)]
    assert layout.values(torch.arange(243, dtype=torch.uint8)[:, None]).tolist() == digits


@a_few_times
@hypothesis.given(st.sampled_from(sorted(LARGEST)), st.integers(0, 9), st.integers(0, 5), st.integers(0, 2**31))
def test_whole_numbers_come_back_from_an_integer_matrix(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-LARGEST[bits], LARGEST[bits] + 1, (rows, columns), generator=generator).float()
    matrix = IntegerMatrix(rows, columns, bits)
    matrix.fill(whole)
    assert torch.equal(matrix.widened(), whole)
    assert torch.equal(matrix.transposed(), whole.T)
    assert matrix.integers.nbytes == math.ceil(rows * bits / 8) * columns


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_beside_what_is_multiplied_loses_less_than_number_by_number(bits: int) -> None:
    """On vectors whose numbers are nearly alike, as those of a residual stream are."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 8, generator=generator) @ torch.randn(8, 100, generator=generator)
    x += 0.05 * torch.randn(2000, 100, generator=generator)
    matrix = torch.randn(100, 20, generator=generator)
    scale = matrix.abs().amax(dim=0) / LARGEST[bits]
    alone = (matrix / scale).round() * scale
    together = rounded(matrix, x.T @ x, bits).widened()
    assert (x @ (together - matrix)).norm() < 0.5 * (x @ (alone - matrix)).norm()


def test_every_table_of_probabilities_is_one_and_can_be_coded_with() -> None:
    scale = torch.arange(SCALES).repeat(len(SHAPES)).to(torch.uint8)
    shape = torch.arange(len(SHAPES)).repeat_interleave(SCALES).to(torch.uint8)
    tables = probabilities(scale, shape, 63)
    assert torch.equal(tables[:, :127], tables[:, :127].flip(1))
    assert (tables > 2**-24).all()
    torch.testing.assert_close(tables.sum(dim=1), torch.ones(len(tables), dtype=torch.float64), rtol=0, atol=3e-4)
    q = torch.tensor([[0.0], [63], [-64], [1000]]).expand(-1, len(tables))
    assert torch.equal(decode_columns([encode_columns(q, tables)], [4], tables), q)


whole_numbers = st.integers(-70, 70) | st.integers(-(2**15), 2**15 - 1) | st.just(0)


@a_few_times
@hypothesis.given(st.data(), st.integers(0, 30), st.integers(0, 11), st.integers(1, 63))
def test_streams_are_those_of_constriction(data: st.DataObject, tokens: int, columns: int, largest: int) -> None:
    """Compiled or not, to the last bit; columns of zeros, values outside of the table, and nothing at all included."""
    numbers = st.lists(whole_numbers, min_size=tokens, max_size=tokens)
    rows = [data.draw(numbers | st.just([0] * tokens)) for _ in range(columns)]
    q = torch.tensor(rows, dtype=torch.float32).reshape(columns, tokens).T
    grid = st.lists(st.integers(0, SCALES - 1), min_size=columns, max_size=columns)
    scale = torch.tensor(data.draw(grid), dtype=torch.uint8)
    tables = probabilities(scale, scale % len(SHAPES), largest)
    assert compiled.compiler() != "none"
    stream = encode_columns(q, tables)
    assert torch.equal(decode_columns([stream, stream], [tokens] * 2, tables), torch.cat([q, q]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "serves", lambda tensor: False)
        assert encode_columns(q, tables) == stream
        assert torch.equal(decode_columns([stream], [tokens], tables), q)


@a_few_times
@hypothesis.given(st.binary(max_size=80), st.integers(0, 20))
def test_what_is_no_stream_is_read_as_something_or_refused(stream: bytes, tokens: int) -> None:
    tables = probabilities(torch.arange(0, 200, 20).to(torch.uint8), torch.zeros(10, dtype=torch.uint8), 63)
    with contextlib.suppress(ValueError):
        assert decode_columns([stream], [tokens], tables).shape == (tokens, 10)


@pytest.mark.parametrize("spread", [0.1, 0.5, 3.0, 20.0])
@pytest.mark.parametrize("kind", ["normal", "laplace", "heavy"])
def test_two_parameters_code_nearly_as_well_as_the_counts_do(kind: str, spread: float) -> None:
    """Beside the entropy of the very numbers that are coded."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, 2, generator=generator, dtype=torch.float64)
    if kind == "laplace":
        x = x.sign() * torch.empty_like(x).exponential_(generator=generator)
    if kind == "heavy":
        x = x / torch.randn(50_000, 2, generator=generator, dtype=torch.float64).square().add(0.3).sqrt()
    q = (spread * x).round().to(torch.int64)
    tables = probabilities(*fitted_shapes(frequencies_of(q, 255)), 255)
    entropy = 50_000 * float(entropy_of(frequencies_of(q, 2000)).sum())
    assert entropy * 0.999 < bits_of(q, tables) < entropy * 1.02 + 100

"""Laws of the families of codecs, one by one."""

import itertools
import math
from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from leankv.codecs import (
    PCA,
    Autoencoder,
    Integers,
    Mean,
    NonUniform,
    Orthogonal,
    ProductQuantizer,
    Rotated,
    fraction_of_variance_unexplained,
    parse_spec,
)
from leankv.codecs.levels import gaussian_levels, lloyd_levels, nearest_level
from leankv.codecs.packing import pack, packed_bytes, unpack
from leankv.errors import UserError
from tests.codec_vectors import (
    SETTINGS,
    WIDTH,
    cast_parameters,
    fit,
    fvu,
    through,
    vectors,
)

# -- laws of the families --------------------------------------------------------------------------------------------

shapes = {
    "tokens": st.integers(8, 80),
    "width": st.integers(2, 20),
    "rank": st.integers(1, 6),
    "seed": st.integers(0, 2**31),
}
a_few_times = hypothesis.settings(max_examples=40, deadline=None)


def pca(dimensions: int, x: torch.Tensor) -> PCA:
    (codec,) = fit(f"pca:{dimensions}", x[None])
    assert isinstance(codec, PCA)
    return codec


@a_few_times
@hypothesis.given(**shapes, size=st.sampled_from([1e-2, 1.0, 100.0]))
def test_pca_of_full_width_is_exact_to_float16(tokens: int, width: int, rank: int, seed: int, size: float) -> None:
    x = size * vectors(1, tokens, width, rank, seed)[0]
    difference = (through(pca(width, x), x) - x).norm()
    float16_rounding = 2**-11 * (x - x.mean(dim=0)).norm()
    float32_rounding = 1e-5 * x.norm()
    assert difference <= float16_rounding + float32_rounding


@a_few_times
@hypothesis.given(**shapes)
def test_pca_never_gets_worse_with_more_dimensions(tokens: int, width: int, rank: int, seed: int) -> None:
    x = vectors(1, tokens, width, rank, seed)[0]
    errors = [fvu(pca(dimensions, x), x) for dimensions in range(1, width + 1)]
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(errors)), errors


@a_few_times
@hypothesis.given(**shapes, dimensions=st.integers(1, 20))
def test_pca_is_never_worse_than_a_random_projection(
    tokens: int, width: int, rank: int, seed: int, dimensions: int
) -> None:
    dimensions = min(dimensions, width)
    x = vectors(1, tokens, width, rank, seed)[0]
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, dimensions, generator=generator)).Q
    mean = x.mean(dim=0)
    projected = mean + (x - mean) @ basis @ basis.T
    assert fvu(pca(dimensions, x), x) <= fraction_of_variance_unexplained(x, projected).item() + 1e-6


@a_few_times
@hypothesis.given(**shapes)
def test_the_mean_leaves_all_variance_unexplained(tokens: int, width: int, rank: int, seed: int) -> None:
    x = vectors(1, tokens, width, rank, seed)
    assert fvu(fit("mean", x)[0], x[0]) == pytest.approx(1, abs=1e-5)


def test_the_mean_stores_nothing() -> None:
    assert Mean(torch.zeros(WIDTH)).bits_per_token == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identity_costs_nothing(dtype: torch.dtype) -> None:
    x = vectors().to(dtype)
    decoded = through(fit("identity", x)[0], x[0])
    assert decoded.dtype == dtype
    assert torch.equal(decoded, x[0])


@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(rank=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_a_trained_autoencoder_beats_the_mean_on_unseen_vectors_of_low_rank(rank: int, seed: int) -> None:
    x = vectors(1, 1280, 16, rank, seed)
    train, unseen = x[:, :1024], x[:, 1024:]
    (codec,) = fit("ae:4", train, unseen)
    assert fvu(codec, unseen[0]) < 0.5


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


@a_few_times
@hypothesis.given(**shapes, bits=st.integers(1, 8), size=st.sampled_from([1e-2, 1.0, 100.0]))
def test_integers_miss_by_half_a_step_of_their_own_group(
    tokens: int, width: int, rank: int, seed: int, bits: int, size: float
) -> None:
    group = max(divisor for divisor in (1, 2, 3, 5) if width % divisor == 0)
    x = size * vectors(1, tokens, width, rank, seed)
    groups = x[0].unflatten(1, (-1, group))
    extent = groups.amax(dim=2, keepdim=True) - groups.amin(dim=2, keepdim=True)
    # Half a step; the float16 rounding of the least number, and of all steps together; the least float16 for each step.
    allowed = extent / (2**bits - 1) / 2 + 2**-11 * (groups.abs().amax(dim=2, keepdim=True) + extent) + 2**-24 * 2**bits
    missed = (through(fit(f"int:{bits}g{group}", x)[0], x[0]) - x[0]).unflatten(1, (-1, group)).abs()
    assert (missed <= 1.001 * allowed).all()


def test_the_default_group_is_32_or_the_next_divisor_of_the_width() -> None:
    for width, group in ((1024, 32), (64, 32), (80, 40), (24, 24), (37, 37)):
        bits = Integers.empty((4, None), width).bits_per_token
        assert bits == 8 * math.ceil(width / 2) + width // group * 32


@a_few_times
@hypothesis.given(**shapes, bits=st.integers(1, 8))
def test_fixed_ranges_store_levels_only_and_are_never_worse_than_the_range_seen(
    tokens: int, width: int, rank: int, seed: int, bits: int
) -> None:
    x = vectors(1, tokens, width, rank, seed)
    codec = fit(f"int:{bits}c", x)[0]
    assert codec.bits_per_token == 8 * math.ceil(width * bits / 8)
    low, step = x[0].amin(dim=0), (x[0].amax(dim=0) - x[0].amin(dim=0)) / (2**bits - 1)
    plain = (low + step * ((x[0] - low) / step).round() - x[0]).square().sum(dim=0)
    assert ((through(codec, x[0]) - x[0]).square().sum(dim=0) <= plain * (1 + 1e-3) + 1e-6).all()


def test_fixed_ranges_clip_what_lies_outside() -> None:
    x = vectors(1, width=4)
    codec = fit("int:8c", x)[0]
    far = torch.stack([x[0].amax(dim=0) + 50, x[0].amin(dim=0) - 50])
    assert (through(codec, far)[0] <= x[0].amax(dim=0) + 1e-3).all()
    assert (through(codec, far)[1] >= x[0].amin(dim=0) - 1e-3).all()


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


def test_levels_lie_where_errors_weigh_most() -> None:
    x = vectors(1, 1024, 8)
    heavy = torch.ones(8)
    heavy[2] = 1e4
    parsed = parse_spec("nuq:2")
    errors = []
    for metric in (None, heavy.diag()[None]):
        (codec,) = parsed.family.fit(parsed.arguments, x, x, metric, SETTINGS, lambda epoch, error: None)
        errors.append((through(codec, x[0]) - x[0]).square().sum(dim=0))
    assert errors[1][2] < errors[0][2]


@a_few_times
@hypothesis.given(**shapes, percent=st.sampled_from([1, 10, 50]))
def test_outliers_in_their_slots_are_exact_and_do_not_move_the_others(
    tokens: int, width: int, rank: int, seed: int, percent: float
) -> None:
    many = vectors(1, 256, width, rank, seed)
    codec = fit(f"nuq:2+{percent}", many)[0]
    assert isinstance(codec, NonUniform)
    x = many[0, :tokens]
    generator = torch.Generator().manual_seed(seed)
    where = torch.rand(tokens, width, generator=generator).topk(codec.slots, dim=1).indices
    far = codec.mean + 10 * codec.deviation * ((x - codec.mean) / codec.deviation).abs().max()
    dirty = x.scatter(1, where, far.expand_as(x).gather(1, where))
    decoded = through(codec, dirty)
    missed = (decoded - dirty).gather(1, where).abs()
    assert (missed <= 2**-11 * (dirty - codec.mean).gather(1, where).abs() + 1e-4).all()
    dense = through(NonUniform(codec.levels, codec.mean, codec.deviation, None), x)
    assert torch.equal(decoded.scatter(1, where, 0), dense.scatter(1, where, 0))


def test_indices_of_wide_vectors_take_two_bytes_and_reach_every_channel() -> None:
    for width in (256, 257, 40_000):
        codec = NonUniform(torch.tensor([0.0, 0.0]), torch.zeros(width), torch.ones(width), 1e-3)
        x = torch.zeros(2, width)
        x[0, -1], x[1, 0] = 7.0, -3.0
        assert torch.equal(through(codec, x), x)
        assert codec.bits_per_token == 8 * math.ceil(width / 8) + 16 + (8 if width == 256 else 16)


@a_few_times
@hypothesis.given(**shapes)
def test_a_rotation_keeps_lengths_and_comes_back(tokens: int, width: int, rank: int, seed: int) -> None:
    codec = fit("rot:1", vectors(1, tokens, width, rank, seed))[0]
    assert isinstance(codec, Rotated)
    rotation = codec.rotate(torch.eye(width))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(width), rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.rotate_back(rotation), torch.eye(width), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [64, 80, 101, 1024])
def test_rotated_vectors_lose_what_gaussian_levels_lose(width: int) -> None:
    """Even those with a single coordinate: 0.1175 of the squared length at two bits, 0.0095 at four."""
    spikes = torch.cat([100 * torch.eye(width), torch.ones(1, width) + 1e-3 * torch.eye(width)[:1]])
    for bits, expected in ((2, 0.1175), (4, 0.0095)):
        codec = fit(f"rot:{bits}", torch.zeros(1, 1, width))[0]
        lost = (through(codec, spikes) - spikes).square().sum(dim=1) / spikes.square().sum(dim=1)
        assert lost.mean().item() == pytest.approx(expected, rel=0.15)


def test_a_sketch_makes_inner_products_right_on_average() -> None:
    """Over many draws of S: levels alone shrink a vector along itself; with the sketch the mean is the vector's own."""
    draws, width, bits = 400, 16, 1
    x = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    queries = torch.cat([x, torch.randn(3, width, generator=torch.Generator().manual_seed(1))])
    codec = fit(f"rot:{bits}", torch.zeros(1, 1, width))[0]
    assert isinstance(codec, Rotated)
    generator = torch.Generator().manual_seed(2)
    sketches = torch.randn(draws, width, width, generator=generator).half()
    sketched = [Rotated(codec.mean, codec.levels, codec.signs, sketch) for sketch in sketches]
    estimates = torch.stack([through(each, x)[0] @ queries.T for each in sketched])
    error, uncertainty = estimates.mean(dim=0) - x[0] @ queries.T, estimates.std(dim=0) / math.sqrt(draws)
    assert (error.abs() < 3.5 * uncertainty).all()
    shrunk = through(codec, x)[0] @ x[0] - x[0] @ x[0]
    assert abs(shrunk) > 10 * uncertainty[0], "the case shows nothing if levels alone are as right"


def product_quantizer(spec: str, x: torch.Tensor, metric: torch.Tensor | None = None) -> ProductQuantizer:
    parsed = parse_spec(spec)
    metric = None if metric is None else metric[None]
    (codec,) = parsed.family.fit(parsed.arguments, x[None], x[None], metric, SETTINGS, lambda epoch, error: None)
    assert isinstance(codec, ProductQuantizer)
    return codec


@a_few_times
@hypothesis.given(seed=st.integers(0, 2**31), stretches=st.sampled_from([1, 2, 4, 12]), weighted=st.booleans())
def test_a_stretch_becomes_its_nearest_centroid_under_the_metric(seed: int, stretches: int, weighted: bool) -> None:
    x = vectors(1, 100, 12, 3, seed)[0]
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(12, 12, generator=generator)
    metric = factor @ factor.T + 0.1 * torch.eye(12)
    codec = product_quantizer(f"pq:{stretches}x4", x, metric if weighted else None)
    d = 12 // stretches
    decoded = through(codec, x)
    for m in range(stretches):
        own = slice(m * d, m * d + d)
        block = metric[own, own] if weighted else torch.eye(d)
        errors = x[:, None, own] - (codec.mean[own] + codec.codebook[m])
        distances = torch.einsum("nki,ij,nkj->nk", errors, block, errors)
        missed = decoded[:, own] - x[:, own]
        got = torch.einsum("ni,ij,nj->n", missed, block, missed)
        torch.testing.assert_close(got, distances.amin(dim=1), rtol=1e-3, atol=1e-4 * distances.max().item())


def test_as_many_centroids_as_different_vectors_lose_nothing() -> None:
    """Among many equal vectors most centroids start on the same spot; those nearest to nothing must move."""
    kinds = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    x = torch.cat([kinds[:1].expand(500, -1), kinds])
    torch.testing.assert_close(through(product_quantizer("pq:2x4", x), x), x, rtol=1e-4, atol=1e-4)


def test_more_bits_and_more_stretches_lose_less() -> None:
    x = vectors(1, 1024)[0]
    for coarse, fine in (("pq:4x2", "pq:4x4"), ("pq:4x4", "pq:4x6"), ("pq:2x4", "pq:12x4")):
        assert fvu(product_quantizer(fine, x), x) < fvu(product_quantizer(coarse, x), x)


def test_product_quantizers_need_a_vector_for_each_centroid() -> None:
    with pytest.raises(UserError, match=r"needs at least 64 calibration vectors .* there are 63"):
        fit("pq:4x6", vectors(1, 63))


@a_few_times
@hypothesis.given(**shapes, percent=st.integers(1, 100))
def test_what_is_kept_is_exact_and_no_other_choice_of_as_many_is_better(
    tokens: int, width: int, rank: int, seed: int, percent: int
) -> None:
    x = vectors(1, tokens, width, rank, seed)
    codec = fit(f"sparse:{percent}", x)[0]
    kept = max(1, round(percent / 100 * width))
    assert codec.bits_per_token == 8 * math.ceil(width / 8) + 16 * kept
    deviation = x[0] - x[0].mean(dim=0)
    least = deviation.square().sort(dim=1).values[:, : width - kept].sum(dim=1)
    lost = (through(codec, x[0]) - x[0]).square().sum(dim=1)
    rounding = 2**-22 * deviation.square().sum(dim=1) + 1e-6
    assert ((lost - least).abs() <= rounding + 1e-4 * least).all()


def test_under_a_metric_the_numbers_kept_are_those_that_count() -> None:
    parsed, x = parse_spec("sparse:25"), vectors(1)
    metric = torch.ones(WIDTH)
    metric[:6] = 1e6
    (codec,) = parsed.family.fit(parsed.arguments, x, x, metric.diag()[None], SETTINGS, lambda epoch, error: None)
    torch.testing.assert_close(through(codec, x[0])[:, :6], x[0, :, :6], rtol=1e-3, atol=1e-3)


def orthogonal(
    dimensions: int, x: torch.Tensor, heldout: torch.Tensor, metric: torch.Tensor | None, epochs: int
) -> tuple[Orthogonal, int]:
    """A codec, and how many epochs were reported."""
    reports: list[torch.Tensor] = []
    settings = replace(SETTINGS, epochs=epochs)
    metric = None if metric is None else metric[None]
    (codec,) = Orthogonal.fit(
        (dimensions,), x[None], heldout[None], metric, settings, lambda epoch, error: reports.append(error)
    )
    return codec, len(reports)


def nested_error(codec: Orthogonal, x: torch.Tensor, metric: torch.Tensor) -> float:
    """Error under the metric, summed over all prefixes."""
    prefixes = range(1, codec.basis.shape[1] + 1)
    errors = torch.stack([through(codec.truncated(d), x) - x for d in prefixes])
    return torch.einsum("dni,ij,dnj->", errors, metric, errors).item()


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31), dimensions=st.integers(1, 6), weighted=st.booleans())
def test_a_trained_projection_is_orthogonal_and_its_prefixes_are_codecs(
    seed: int, dimensions: int, weighted: bool
) -> None:
    x = vectors(1, 128, 12, 5, seed)[0]
    metric = torch.linspace(0.1, 10, 12).diag() if weighted else None
    codec, reports = orthogonal(dimensions, x, x, metric, epochs=2)
    assert reports == 2
    torch.testing.assert_close(codec.basis.T @ codec.basis, torch.eye(dimensions), rtol=0, atol=1e-5)
    code = codec.encode(x)
    for d in range(1, dimensions + 1):
        zeroed = code["z"].clone()
        zeroed[:, d:] = 0
        first = codec.truncated(d)
        assert first.bits_per_token == 16 * d
        torch.testing.assert_close(first.encode(x)["z"], code["z"][:, :d], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(first.decode({"z": code["z"][:, :d]}), codec.decode({"z": zeroed}))


def test_an_untrained_projection_is_that_of_principal_components() -> None:
    x = vectors(1)[0]
    codec, reports = orthogonal(4, x, x, None, epochs=0)
    assert reports == 0
    for d in range(1, 5):
        assert fvu(codec.truncated(d), x) == pytest.approx(fvu(pca(d, x), x), rel=1e-3)


def test_training_a_projection_under_a_metric_lessens_the_error_over_its_prefixes() -> None:
    x = vectors(1, 1024, rank=12)[0]
    factor = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))
    metric = factor @ factor.T / WIDTH + 0.01 * torch.eye(WIDTH)
    train, unseen = x[:768], x[768:]
    start, _ = orthogonal(6, train, unseen, metric, epochs=0)
    trained, _ = orthogonal(6, train, unseen, metric, epochs=10)
    assert nested_error(trained, unseen, metric) < 0.98 * nested_error(start, unseen, metric)


@a_few_times
@hypothesis.given(**shapes, specs=st.sampled_from(["mean,int:3", "pca:1,int:2", "rot:2,sparse:20", "int:4,pca:1"]))
def test_the_second_codec_has_what_the_first_leaves(tokens: int, width: int, rank: int, seed: int, specs: str) -> None:
    x = vectors(1, tokens, width, rank, seed)
    first, second = specs.split(",")
    codec = fit(f"resid({specs})", x)[0]
    a = fit(first, x)[0]
    left = x[0] - through(a, x[0])
    b = fit(second, left[None])[0]
    torch.testing.assert_close(through(codec, x[0]), through(a, x[0]) + through(b, left))
    assert codec.bits_per_token == a.bits_per_token + b.bits_per_token


def test_errors_of_a_trained_second_codec_are_reported_as_those_of_the_vectors() -> None:
    x = vectors(1, 512).abs()  # so that an autoencoder has something to bend to
    reports: list[torch.Tensor] = []
    parsed = parse_spec("resid(pca:1,ae:2x8)")
    settings = replace(SETTINGS, epochs=5)
    (codec,) = parsed.family.fit(
        parsed.arguments, x[:, :384], x[:, 384:], None, settings, lambda epoch, error: reports.append(error)
    )
    assert len(reports) == 5
    assert torch.stack(reports).min().item() == pytest.approx(fvu(codec, x[0, 384:]), rel=1e-3)


def test_a_chain_of_residuals_holds_a_copy_of_the_vectors_for_each() -> None:
    for text, copies in (("pca:4", 0), ("resid(pca:4,mean)", 1), ("resid(mean,resid(mean,resid(mean,mean)))", 3)):
        parsed = parse_spec(text)
        assert parsed.family.data_copies(parsed.arguments) == copies


def test_leanllama_arithmetic() -> None:
    """4 of 1,024 numbers: 136,836 parameters, 256 times smaller, and 21.9 MB for K and V of 20 layers in float32."""
    codec = Autoencoder.empty(parse_spec("ae:4").arguments, 1024)
    assert codec.n_parameters == 136_836
    assert 1024 * 16 / codec.bits_per_token == 256
    assert 20 * 2 * codec.n_parameters * 4 / 1e6 == pytest.approx(21.9, abs=0.05)


def test_bytes_of_a_codec_are_those_of_its_tensors() -> None:
    codec = Autoencoder.empty(parse_spec("ae:4x8").arguments, 16)
    parameters = (16 * 4 + 4) + (4 * 8 + 8) + (8 * 16 + 16)
    assert codec.n_parameters == parameters
    assert codec.nbytes == 4 * (parameters + 16 + 1)
    assert cast_parameters(codec, torch.float16).nbytes == 2 * parameters + 4 * (16 + 1)


def test_fvu_of_known_vectors() -> None:
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 2.0], [0.0, -2.0]]])
    reconstructed = torch.stack([x[0] / 2, torch.zeros(2, 2)])
    assert fraction_of_variance_unexplained(x, reconstructed).tolist() == [0.25, 1.0]
    assert math.isnan(fraction_of_variance_unexplained(torch.ones(3, 2), torch.ones(3, 2)).item())

"""Laws of the families of codecs, one by one."""

import itertools
import math
from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from leankv.codecs import fraction_of_variance_unexplained, parse_recipe
from leankv.codecs.autoencoder import AutoencoderRecipe
from leankv.codecs.integers import IntegersRecipe
from leankv.codecs.mean import Mean
from leankv.codecs.nonuniform import NonUniform, NonUniformRecipe
from leankv.codecs.pca import PCA
from leankv.codecs.product import ProductQuantizer
from leankv.codecs.rotated import Rotated, RotatedRecipe
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
a_few_times = hypothesis.settings(max_examples=40)


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


@hypothesis.settings(max_examples=8)
@hypothesis.given(rank=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_a_trained_autoencoder_beats_the_mean_on_unseen_vectors_of_low_rank(rank: int, seed: int) -> None:
    x = vectors(1, 1280, 16, rank, seed)
    train, unseen = x[:, :1024], x[:, 1024:]
    (codec,) = fit("ae:4", train, unseen)
    assert fvu(codec, unseen[0]) < 0.5


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
        bits = IntegersRecipe(4).unfitted(width).bits_per_token
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


def test_levels_lie_where_errors_weigh_most() -> None:
    x = vectors(1, 1024, 8)
    heavy = torch.ones(8)
    heavy[2] = 1e4
    errors = []
    for metric in (None, heavy.diag()[None]):
        (codec,) = fit("nuq:2", x, x, metric)
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
    plain = NonUniform(NonUniformRecipe(2, None), codec.levels, codec.mean, codec.deviation)
    dense = through(plain, x)
    assert torch.equal(decoded.scatter(1, where, 0), dense.scatter(1, where, 0))


def test_indices_of_wide_vectors_take_two_bytes_and_reach_every_channel() -> None:
    for width in (256, 257, 40_000):
        codec = NonUniform(NonUniformRecipe(1, 1e-3), torch.zeros(2), torch.zeros(width), torch.ones(width))
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
    recipe = RotatedRecipe(bits, with_sketch=True)
    sketches = torch.randn(draws, width, width, generator=generator).half()
    sketched = [Rotated(recipe, codec.mean, codec.levels, codec.signs, sketch) for sketch in sketches]
    estimates = torch.stack([through(each, x)[0] @ queries.T for each in sketched])
    error, uncertainty = estimates.mean(dim=0) - x[0] @ queries.T, estimates.std(dim=0) / math.sqrt(draws)
    assert (error.abs() < 3.5 * uncertainty).all()
    shrunk = through(codec, x)[0] @ x[0] - x[0] @ x[0]
    assert abs(shrunk) > 10 * uncertainty[0], "the case shows nothing if levels alone are as right"


def product_quantizer(spec: str, x: torch.Tensor, metric: torch.Tensor | None = None) -> ProductQuantizer:
    (codec,) = fit(spec, x[None], x[None], None if metric is None else metric[None])
    assert isinstance(codec, ProductQuantizer)
    return codec


@a_few_times
@hypothesis.given(seed=st.integers(0, 2**31), subvectors=st.sampled_from([1, 2, 4, 12]), weighted=st.booleans())
def test_a_subvector_becomes_its_nearest_centroid_under_the_metric(seed: int, subvectors: int, weighted: bool) -> None:
    x = vectors(1, 100, 12, 3, seed)[0]
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(12, 12, generator=generator)
    metric = factor @ factor.T + 0.1 * torch.eye(12)
    codec = product_quantizer(f"pq:{subvectors}x4", x, metric if weighted else None)
    d = 12 // subvectors
    decoded = through(codec, x)
    for m in range(subvectors):
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


def test_more_bits_and_more_subvectors_lose_less() -> None:
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
    x = vectors(1)
    metric = torch.ones(WIDTH)
    metric[:6] = 1e6
    (codec,) = fit("sparse:25", x, x, metric.diag()[None])
    torch.testing.assert_close(through(codec, x[0])[:, :6], x[0, :, :6], rtol=1e-3, atol=1e-3)


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
    settings = replace(SETTINGS, epochs=5)
    (codec,) = fit(
        "resid(pca:1,ae:2x8)", x[:, :384], x[:, 384:], None, settings, lambda epoch, error: reports.append(error)
    )
    assert len(reports) == 5
    assert torch.stack(reports).min().item() == pytest.approx(fvu(codec, x[0, 384:]), rel=1e-3)


def test_a_chain_of_residuals_holds_a_copy_of_the_vectors_for_each() -> None:
    for text, copies in (("pca:4", 0), ("resid(pca:4,mean)", 1), ("resid(mean,resid(mean,resid(mean,mean)))", 3)):
        assert parse_recipe(text).data_copies == copies


def test_leanllama_arithmetic() -> None:
    """4 of 1,024 numbers: 136,836 parameters, 256 times smaller, and 21.9 MB for K and V of 20 layers in float32."""
    codec = AutoencoderRecipe(4).unfitted(1024)
    assert codec.n_parameters == 136_836
    assert 1024 * 16 / codec.bits_per_token == 256
    assert 20 * 2 * codec.n_parameters * 4 / 1e6 == pytest.approx(21.9, abs=0.05)


def test_bytes_of_a_codec_are_those_of_its_tensors() -> None:
    codec = AutoencoderRecipe(4, 8).unfitted(16)
    parameters = (16 * 4 + 4) + (4 * 8 + 8) + (8 * 16 + 16)
    assert codec.n_parameters == parameters
    assert codec.nbytes == 4 * (parameters + 16 + 1)
    assert cast_parameters(codec, torch.float16).nbytes == 2 * parameters + 4 * (16 + 1)

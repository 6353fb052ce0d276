"""Codecs that carry little: matrices of few bits, and predictions of low rank."""

import pytest
import torch

from leankv.codecs import Codec, FitData, parse_recipe
from tests.codec_vectors import SETTINGS, WIDTH, fit, through, vectors


@pytest.mark.parametrize(("step", "bits"), [(0.3, 8), (0.1, 16)])
def test_matrices_take_the_bits_that_whole_steps_need(step: float, bits: int) -> None:
    """A uniform step's own error is step^2 / 12 a coordinate; 8 bits are too coarse where numbers are 100 steps."""
    generator = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(1, 4000, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    codec = fit(f"transform:s{step}", x)[0]
    error = (through(codec, x[0]) - x[0]).square().sum(dim=1).mean().item()
    assert error == pytest.approx(WIDTH * step**2 / 12, rel=0.03)
    assert codec.nbytes == pytest.approx(2 * bits / 8 * WIDTH**2, rel=0.5)


def test_a_transform_takes_two_bytes_for_each_number_of_the_coordinates_in_use() -> None:
    codec = fit("transform:s3", vectors(1, 4000))[0]
    used = len(codec.state_dict()["low"])
    assert 0 < used < WIDTH
    # Two scales, a range of two numbers and two parameters a coordinate; the mean, and the bits it claims.
    assert codec.nbytes == 2 * used * WIDTH + used * (2 * 4 + 2 * 2 + 2) + 4 * WIDTH + 16


def predicted(text: str, rows: int = 2000) -> tuple[Codec, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A codec that predicts, fitted to vectors that their contexts tell much of; both, and the metric."""
    context = vectors(1, rows, 3 * WIDTH, rank=12)
    x = context @ torch.randn(3 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) + vectors(1, rows, seed=2)
    metric = torch.diag(torch.linspace(0.1, 3, WIDTH))[None]
    data = FitData(
        x, x[:, :32], context=context, heldout_context=context[:, :32], error_metric=metric, training=SETTINGS
    )
    return parse_recipe(text).fit(data)[0], x[0], context[0], metric[0]


def weighted_error(text: str) -> float:
    codec, x, context, metric = predicted(text)
    error = x - codec.decode(codec.encode(x, context), context)
    return float((error @ metric * error).sum())


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_a_prediction_of_limited_rank_is_the_best_of_that_rank(rank: int) -> None:
    """Reduced-rank regression: what it leaves beyond the regression are the fitted values' last singular values."""
    full, x, context, metric = predicted("share:-1")
    values = (full.decode(full.encode(x, context), context) - x.mean(dim=0)) @ metric.sqrt()
    dropped = float(torch.linalg.svdvals(values)[rank:].square().sum())
    assert weighted_error(f"share:-1r{rank}") == pytest.approx(weighted_error("share:-1") + dropped, rel=2e-2)


@pytest.mark.parametrize(("rounded", "exact", "most"), [("q8", "", 1.001), ("q4", "", 1.3), ("r6q8", "r6", 1.001)])
def test_rounded_predictions_err_little_more(rounded: str, exact: str, most: float) -> None:
    assert weighted_error(f"share:-1{rounded}") < most * weighted_error(f"share:-1{exact}")


def test_weights_take_the_bits_that_they_say() -> None:
    """And a layer that sees less of the layers before carries no weights for what it does not see."""
    known, vector = 3 * WIDTH, 4 * WIDTH
    sizes = {
        "": 4 * known * WIDTH,
        "q8": known * WIDTH + vector,
        "q4": known * WIDTH // 2 + vector,
        "r5": 4 * 5 * (known + WIDTH),
        "r5q8": 5 * (known + WIDTH) + 4 * 5 + vector,
        "r5q4": 5 * (known // 2 + WIDTH) + 4 * 5 + vector,
    }
    for ending, size in sizes.items():
        assert predicted(f"share:-1{ending}")[0].nbytes == size + 2 * vector, ending
        assert predicted(f"share:-4{ending}")[0].nbytes == size + 2 * vector, ending

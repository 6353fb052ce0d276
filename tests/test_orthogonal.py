"""The trained orthogonal projection, against principal components and through its prefixes."""

from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from leankv.codecs import Code
from leankv.codecs.orthogonal import Orthogonal, OrthogonalRecipe
from tests.codec_vectors import SETTINGS, WIDTH, fit, fvu, through, vectors


def orthogonal(
    dimensions: int, x: torch.Tensor, heldout: torch.Tensor, metric: torch.Tensor | None, epochs: int
) -> tuple[Orthogonal, int]:
    """A codec, and how many epochs were reported."""
    reports: list[torch.Tensor] = []
    (codec,) = fit(
        f"ortho:{dimensions}",
        x[None],
        heldout[None],
        None if metric is None else metric[None],
        replace(SETTINGS, epochs=epochs),
        lambda epoch, error: reports.append(error),
    )
    assert isinstance(codec, Orthogonal)
    return codec, len(reports)


def prefix(codec: Orthogonal, dimensions: int) -> Orthogonal:
    """The codec of its first directions."""
    basis, scale = codec.basis[:, :dimensions].clone(), codec.scale[:dimensions].clone()
    return Orthogonal(OrthogonalRecipe(dimensions), basis, codec.mean, scale)


def nested_error(codec: Orthogonal, x: torch.Tensor, metric: torch.Tensor) -> float:
    """Error under the metric, summed over all prefixes."""
    prefixes = range(1, codec.basis.shape[1] + 1)
    errors = torch.stack([through(prefix(codec, d), x) - x for d in prefixes])
    return torch.einsum("dni,ij,dnj->", errors, metric, errors).item()


@hypothesis.settings(max_examples=10)
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
        first = prefix(codec, d)
        assert first.bits_per_token == 16 * d
        torch.testing.assert_close(first.encode(x)["z"], code["z"][:, :d], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(first.decode(Code({"z": code["z"][:, :d]})), codec.decode(Code({"z": zeroed})))


def test_an_untrained_projection_is_that_of_principal_components() -> None:
    x = vectors(1)[0]
    codec, reports = orthogonal(4, x, x, None, epochs=0)
    assert reports == 0
    for d in range(1, 5):
        assert fvu(prefix(codec, d), x) == pytest.approx(fvu(fit(f"pca:{d}", x[None])[0], x), rel=1e-3)


def test_training_a_projection_under_a_metric_lessens_the_error_over_its_prefixes() -> None:
    x = vectors(1, 1024, rank=12)[0]
    factor = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))
    metric = factor @ factor.T / WIDTH + 0.01 * torch.eye(WIDTH)
    train, unseen = x[:768], x[768:]
    start, _ = orthogonal(6, train, unseen, metric, epochs=0)
    trained, _ = orthogonal(6, train, unseen, metric, epochs=10)
    assert nested_error(trained, unseen, metric) < 0.98 * nested_error(start, unseen, metric)

"""What a compressed layer holds of one part, by itself."""

import pytest
import torch

from leankv.cache.part_store import PartStore
from tests.codec_vectors import WIDTH, fit, vectors


@pytest.mark.parametrize("spec", ["int:4g8", "transform:2", "resid(pca:2,transform:s0.3)"])
@pytest.mark.parametrize("batch", [1, 2])
def test_codes_decoded_in_pieces_read_as_decoded_at_once(
    spec: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also codes whose rows differ in length, and a last piece that is not full."""
    (codec,) = fit(spec, vectors(sites=1))
    rows = vectors(sites=batch, tokens=20, seed=1).unflatten(2, (2, WIDTH // 2)).transpose(1, 2)
    store = PartStore(codec, sinks=2, window=3)
    store.append(rows)
    whole = store.read(rows)
    assert torch.equal(whole[:, :, :2], rows[:, :, :2])
    assert torch.equal(whole[:, :, -3:], rows[:, :, -3:])
    monkeypatch.setattr("leankv.cache.part_store.PIECE", 4)
    torch.testing.assert_close(store.read(rows), whole, atol=1e-5, rtol=1e-5)

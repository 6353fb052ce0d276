"""Numbers of a small fit of every family, kept beside its revision: who changes the one has to raise the other.

Keys of stored results hold the revision. Were it left as it is, results of older code would pass for new ones.
`python -m tests.test_revisions` writes the file anew, once the revision is raised.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from leankv.cache_bytes import bytes_of_plan
from leankv.codecs import FAMILIES, fraction_of_variance_unexplained, parse_spec
from leankv.experiment import load_experiment
from leankv.progress import Silent
from leankv.run import Run
from tests.codec_vectors import SETTINGS, vectors

FILE = Path(__file__).parent / "revisions.json"
SPECS = (
    *("identity", "mean", "pca:4", "ae:4x8", "int:3g8", "int:4c", "nuq:3+5", "rot:2+qjl", "pq:6x3", "sparse:20"),
    *("ortho:4", "transform:1", "transform:s0.3", "share:-1", "resid(share:-1,transform:1)"),
)
TOLERANCE = 1e-4  # relative: other processors add in another order, and a rounding here or there goes the other way


def digest(spec: str) -> dict[str, Any]:
    """What a fit on made-up vectors comes to: bits, error, and some products of what comes back."""
    parsed = parse_spec(spec)
    x = vectors(1, 900)
    reference = x @ torch.randn(24, 72, generator=torch.Generator().manual_seed(1)) + 0.1 * vectors(1, 900, 72, seed=2)
    train, heldout, unseen = x.split([400, 200, 300], dim=1)
    known = reference.split([400, 200, 300], dim=1)
    generator = torch.Generator().manual_seed(0)
    metric = torch.diag(torch.linspace(0.5, 2, 24))[None]
    (codec,) = parsed.family.fit_beside(
        parsed.arguments, train, heldout, known[:2], metric, SETTINGS, lambda epoch, error: None
    )
    decoded = codec.decode_beside(codec.encode_beside(unseen[0], known[2][0]), known[2][0]).float()
    drawn = torch.randn(4, *decoded.shape, generator=generator)
    return {
        "revisions": parsed.revisions(),
        "bits": [float(codec.bits_per_token), float(codec.stored_bits_per_token)],
        "fvu": fraction_of_variance_unexplained(unseen[0], decoded).item(),
        "products": [float((decoded * each).sum(dtype=torch.float64)) for each in drawn],
    }


@pytest.mark.parametrize("spec", SPECS)
def test_numbers_of_a_family_change_with_its_revision_only(spec: str) -> None:
    kept, found = json.loads(FILE.read_text())[spec], digest(spec)
    again = "raise its `revision`, then run: python -m tests.test_revisions"
    assert found["revisions"] == kept["revisions"], f"{FILE.name} is of another revision; {again}"
    size = float(vectors(1, 900).norm())
    assert found["bits"] == pytest.approx(kept["bits"], rel=TOLERANCE), again
    assert found["fvu"] == pytest.approx(kept["fvu"], rel=TOLERANCE, abs=1e-9), again
    assert found["products"] == pytest.approx(kept["products"], abs=TOLERANCE * size), again


def test_every_family_has_its_numbers_here() -> None:
    families = {name for spec in SPECS for name in parse_spec(spec).revisions()}
    assert families == set(FAMILIES)


def test_a_codec_of_one_s_own_is_keyed_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it declares a revision: a file that is still being written must not find its older results."""
    found = []
    for constant in ("1", "2"):
        path = tmp_path / f"own{constant}.py"
        path.write_text(f"from leankv.codecs import Mean\nclass Own(Mean):\n    family = 'own'\n    c = {constant}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        own = importlib.import_module(path.stem).Own
        monkeypatch.setattr(own, "revision", None)
        monkeypatch.setitem(FAMILIES, "own", own)
        found.append(parse_spec("own").revisions()["own"])
    assert found[0] != found[1]
    assert all(isinstance(revision, str) for revision in found)
    assert all(type(family.revision) is int for name, family in FAMILIES.items() if name != "own")


def test_results_of_an_older_revision_are_not_found(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures, codecs, measurements and counted bytes: each lies elsewhere once its revision is raised."""

    def places() -> list[Any]:
        run = Run(load_experiment(None, {**settings, "codec.k": "int:4", "codec.v": "int:4"}), Silent())
        bytes_of_plan(run, "report", [0])
        counted = sorted((run.folder / "cells").glob("cache-bytes-*"))
        return [run.captured([0]).folder, run.codec_path((0, "k")), run.nats_path("report", [0]), counted]

    before = places()
    assert places() == before
    for index, name in enumerate(
        (
            "leankv.workplace.CAPTURE_REVISION",
            "leankv.run.FITTING_REVISION",
            "leankv.run.MEASURING_REVISION",
            "leankv.cache_bytes.COUNTING_REVISION",
        )
    ):
        with monkeypatch.context() as patched:
            patched.setattr(name, 99)
            assert places()[index] != before[index], name


if __name__ == "__main__":
    FILE.write_text(json.dumps({spec: digest(spec) for spec in SPECS}, indent=1) + "\n")

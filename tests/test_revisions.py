"""Numbers of a small fit of every family, kept beside its revision: who changes the one has to raise the other.

Keys of stored results hold the revision. Were it left as it is, results of older code would pass for new ones.
`python -m tests.test_revisions` writes the file anew, once the revision is raised.
"""

import importlib
import json
import linecache
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from leankv.cache.plan import Site
from leankv.calibration.activations import StoredActivations
from leankv.codecs import (
    FAMILIES,
    FitData,
    codec_from_tensors,
    fraction_of_variance_unexplained,
    parse_recipe,
    register,
)
from leankv.codecs.mean import Mean, MeanRecipe
from leankv.errors import UserError
from leankv.studies.stored_bytes import bytes_of_plan
from tests.codec_vectors import SETTINGS, vectors
from tests.run_folders import evaluator_of

FILE = Path(__file__).parent / "revisions.json"
SPECS = (
    *("identity", "mean", "pca:4", "ae:4x8", "int:3g8", "int:4c", "nuq:3+5", "rot:2+qjl", "pq:6x3", "sparse:20"),
    *("ortho:4", "transform:1", "transform:s0.3", "share:-1", "share:-1q4", "share:-1r4q8"),
    "resid(share:-1,transform:1)",
)
TOLERANCE = 1e-4  # relative: other processors add in another order, and a rounding here or there goes the other way


def digest(spec: str) -> dict[str, Any]:
    """What a fit on made-up vectors comes to: bits, error, and some products of what comes back."""
    recipe = parse_recipe(spec)
    x = vectors(1, 900)
    context = x @ torch.randn(24, 72, generator=torch.Generator().manual_seed(1)) + 0.1 * vectors(1, 900, 72, seed=2)
    train, heldout, unseen = x.split([400, 200, 300], dim=1)
    known = context.split([400, 200, 300], dim=1)
    generator = torch.Generator().manual_seed(0)
    metric = torch.diag(torch.linspace(0.5, 2, 24))[None]
    (codec,) = recipe.fit(
        FitData(
            train,
            heldout,
            context=known[0],
            heldout_context=known[1],
            error_metric=metric,
            training=SETTINGS,
        )
    )
    decoded = codec.decode(codec.encode(unseen[0], known[2][0]), known[2][0]).float()
    drawn = torch.randn(4, *decoded.shape, generator=generator)
    return {
        "revisions": recipe.revisions(),
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
    families = {name for spec in SPECS for name in parse_recipe(spec).revisions()}
    assert families == set(FAMILIES)


OWN = """
from leankv.codecs.mean import MeanRecipe

class OwnRecipe(MeanRecipe):
    family = grammar = "own"
    revision = None
    constant = CONSTANT

    def fit(self, data):
        return super().fit(data)
"""


def test_a_codec_of_one_s_own_is_keyed_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it declares a revision: a file that is still being written must not find its older results."""
    found = []
    for constant in ("1", "2"):
        path = tmp_path / f"own{constant}.py"
        path.write_text(OWN.replace("CONSTANT", constant))
        monkeypatch.syspath_prepend(str(tmp_path))
        own = importlib.import_module(path.stem).OwnRecipe
        monkeypatch.setitem(FAMILIES, "own", own)
        found.append(parse_recipe("own").revisions()["own"])
    assert found[0] != found[1]
    assert all(isinstance(revision, str) for revision in found)
    assert all(type(family.revision) is int for name, family in FAMILIES.items() if name != "own")


def notebook_cell(number: int, constant: str) -> Any:
    """The class that a notebook's cell defines: of no file, though Python knows the text of its functions."""
    name, text = f"<cell {number}>", OWN.replace("CONSTANT", constant)
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    names = {"__name__": "a notebook"}
    exec(compile(text, name, "exec"), names)
    return names["OwnRecipe"]


def test_a_codec_of_a_notebook_is_keyed_by_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [notebook_cell(number, constant)().revisions()["own"] for number, constant in enumerate("112")]
    assert found[0] == found[1] != found[2]
    nowhere = notebook_cell(3, "1")
    del linecache.cache["<cell 3>"]
    with pytest.raises(UserError, match=r"own cannot be read.*give its recipe a `revision`"):
        nowhere().revisions()
    monkeypatch.setattr(nowhere, "revision", 7)
    assert nowhere().revisions() == {"own": 7}


def test_a_cell_that_is_run_again_registers_again_and_another_class_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "own", notebook_cell(0, "1"))
    for constant in ("1", "2"):
        assert FAMILIES["own"] is not (again := notebook_cell(1, constant))
        assert register(register(again)) is FAMILIES["own"] is again

    class OtherRecipe(MeanRecipe):
        family = "own"

    with pytest.raises(UserError, match=r"the codec family own is a notebook.OwnRecipe already.*OtherRecipe"):
        register(OtherRecipe)
    for name in ("", "none", "a:b", "a(", None):
        monkeypatch.setattr(OtherRecipe, "family", name)
        with pytest.raises(UserError, match="OtherRecipe needs a `family`"):
            register(OtherRecipe)
    with pytest.raises(UserError, match="is no subclass of"):
        register(Mean)  # type: ignore[type-var]


def test_a_recipe_may_name_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a person writes is imported; what a file says is not."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "tried.py").write_text(TRIED)
    text = "resid(lab.tried:TriedRecipe:12,int:2)"
    with pytest.raises(UserError, match=r"'lab.tried:TriedRecipe:12' is not understood; write ae:D"):
        codec_from_tensors(text, 24, {})
    assert "lab.tried" not in sys.modules
    try:
        recipe = parse_recipe(text)
        assert recipe.text == "resid(tried:12,int:2)"
        assert recipe == parse_recipe(recipe.text) == parse_recipe(f" {text} ")
        assert set(recipe.revisions()) == {"resid", "tried", "int"}
        assert parse_recipe("lab.tried:TriedRecipe").text == "tried:0"
        with pytest.raises(UserError, match=r"codec 'tried:x' is not understood; write tried:N"):
            parse_recipe("lab.tried:TriedRecipe:x")
        with pytest.raises(UserError, match="cannot be registered as a codec family: it is no subclass of"):
            parse_recipe("lab.tried:MeanOf")
    finally:
        FAMILIES.pop("tried", None)
    for missing in ("lab.tried:Absent", "lab.absent:TriedRecipe", "absent:TriedRecipe:3"):
        with pytest.raises(UserError, match=r"not understood: no family is called .* can be imported"):
            parse_recipe(missing)


TRIED = """
from dataclasses import dataclass
from leankv.codecs.mean import MeanRecipe
MeanOf = int

@dataclass(frozen=True)
class TriedRecipe(MeanRecipe):
    number: int = 0
    family, revision, grammar = "tried", None, "tried:N"

    @classmethod
    def parse(cls, arguments):
        return cls(int(arguments or 0))

    @property
    def arguments(self):
        return str(self.number)
"""


def test_results_of_an_older_revision_are_not_found(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captures, codecs, measurements and counted bytes: each lies elsewhere once its revision is raised."""

    def places() -> list[Any]:
        evaluator = evaluator_of(settings, tmp_path, plan="int:4")
        codecs, plan = evaluator.codecs, evaluator.workspace.plan.only([0])
        bytes_of_plan(evaluator, "report", plan)
        activations = codecs.activations.of([0])
        assert isinstance(activations, StoredActivations)
        counted = sorted((tmp_path / "cells").glob("cache-bytes-*"))
        return [activations.folder, codecs.path(plan, Site(0, "k")), evaluator.nats_path(plan, "report"), counted]

    before = places()
    assert places() == before
    for index, name in enumerate(
        (
            "leankv.studies.activation_store.CAPTURE_REVISION",
            "leankv.studies.codec_store.FITTING_REVISION",
            "leankv.studies.plan_evaluator.MEASURING_REVISION",
            "leankv.studies.stored_bytes.COUNTING_REVISION",
        )
    ):
        with monkeypatch.context() as patched:
            patched.setattr(name, 99)
            assert places()[index] != before[index], name


if __name__ == "__main__":
    FILE.write_text(json.dumps({spec: digest(spec) for spec in SPECS}, indent=1) + "\n")

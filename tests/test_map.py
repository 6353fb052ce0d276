"""`leankv map`: costs against full passes, distances from the bound, what is written, and going on where it was."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import Plan, PlanSpec, Site
from leankv.calibration.activations import StoredActivations
from leankv.cli import app
from leankv.codecs import Codec
from leankv.config.presets import MAP_SPECS
from leankv.errors import UserError
from leankv.evaluation.perplexity import measure_nats
from leankv.report.columns import MAP_COLUMNS, read_map, read_spectra
from leankv.report.page.contents import read_run
from leankv.report.page.render import page
from leankv.report.page.tables import spectra_table
from leankv.report.rate_map import best_rows, codec_rows, map_markdown
from leankv.report.rate_map_figures import codecs_by_bits
from leankv.studies.activation_store import ActivationStore
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.rate_map import check_measure, map_rates, parse_recipes
from leankv.studies.spectra import spectra, variances_of
from tests.run_folders import evaluator_of, folder_of

pytestmark = pytest.mark.whole_runs

SPECS = ["transform:1", "int:2"]
RECIPES = parse_recipes(SPECS)
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def map_settings(llama_folder: Path, text_file: Path) -> dict[str, Any]:
    """More held-out vectors than numbers in one, so that spectra mean something."""
    return {
        "model.name": str(llama_folder),
        "model.device": "cpu",
        "data.dataset": str(text_file),
        "data.block_length": 64,
        "data.calibration_blocks": 12,
        "data.selection_blocks": 2,
        "fit.heldout_fraction": 0.25,
        "fit.epochs": 1,
        "protocol.sinks": 2,
    }


@pytest.fixture(scope="module")
def finished(map_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> PlanEvaluator:
    """Of a folder with a finished map: two codecs, every layer measured."""
    evaluator = evaluator_of(map_settings, tmp_path_factory.mktemp("map"))
    map_rates(evaluator, RECIPES, "all")
    return evaluator


@pytest.fixture
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the report and its figures out, which take longest."""
    monkeypatch.setattr("leankv.studies.rate_map.write_map_report", lambda folder: None)


def row_of(table: pd.DataFrame, layer: int, part: str, codec: str) -> Any:
    (row,) = table[(table["layer"] == layer) & (table["part"] == part) & (table["codec"] == codec)].itertuples()
    return row


def codec_alone(evaluator: PlanEvaluator, site: Site, spec: str) -> Codec:
    """Of a plan that compresses nothing else."""
    (recipe,) = parse_recipes([spec])
    return evaluator.codecs.plan(PlanSpec().with_sites({site: recipe}))[site]


def full_pass(evaluator: PlanEvaluator, plan: Plan) -> float:
    """The slow twin: perplexity of one pass through all layers."""
    model, protocol = evaluator.workspace.loaded.model, evaluator.protocol
    blocks = evaluator.workspace.blocks("selection")
    return measure_nats(
        model, blocks, protocol, lambda: LeanCache(model.config, plan, sinks=protocol.sinks, window=0)
    ).perplexity


# -- the table ---------------------------------------------------------------------------------------------------------


def test_a_row_for_every_layer_part_and_codec(finished: PlanEvaluator) -> None:
    table = read_map(folder_of(finished))
    assert list(table.columns) == list(MAP_COLUMNS)
    rows = list(table[["layer", "part", "codec"]].itertuples(index=False, name=None))
    assert rows == [(layer, part, codec) for layer in range(4) for part in "kv" for codec in SPECS]
    assert set(table["measured"]) == {"perplexity"}
    assert set(table["width"]) == {32}
    assert set(table["tokens"]) == {2 * 63}
    assert (table["delta_ppl_low"] <= table["delta_ppl"]).all()
    assert (table["stored_bits_per_token"] <= table["bits_per_token"]).all()


@pytest.mark.parametrize(("layer", "part"), [(0, "v"), (2, "k"), (3, "v")])
@pytest.mark.parametrize("spec", SPECS)
def test_costs_are_those_of_a_full_pass(finished: PlanEvaluator, layer: int, part: str, spec: str) -> None:
    codec = codec_alone(finished, Site(layer, part), spec)
    row = row_of(read_map(folder_of(finished)), layer, part, spec)
    base = full_pass(finished, {})
    assert row.base_ppl == pytest.approx(base, rel=1e-9)
    assert row.delta_ppl == pytest.approx(full_pass(finished, {Site(layer, part): codec}) - base, rel=1e-6, abs=1e-9)


@pytest.mark.usefixtures("unreported")
def test_parts_of_codecs_that_look_back_are_measured_alone(map_settings: dict[str, Any], tmp_path: Path) -> None:
    """Each is fitted as it is measured: given exact vectors of all that it predicts from, so nothing else is fitted."""
    spec = "resid(share:-1,int:2)"
    evaluator = evaluator_of(map_settings, tmp_path, layers="2")
    table = map_rates(evaluator, parse_recipes([spec]), "all")
    assert sorted(path.name[:11] for path in (tmp_path / "codecs").iterdir()) == ["layer-002-k", "layer-002-v"]
    base = full_pass(evaluator, {})
    for part in ("k", "v"):
        site = Site(2, part)
        cost = full_pass(evaluator, {site: codec_alone(evaluator, site, spec)}) - base
        assert row_of(table, 2, part, spec).delta_ppl == pytest.approx(cost, rel=1e-6, abs=1e-9)
    assert list(table["layer"]) == [2, 2]


def test_distances_are_those_of_the_errors_of_the_codecs(finished: PlanEvaluator) -> None:
    """From the vectors themselves, by bisection; no codec that sees its vector only comes below the bound here."""
    activations = finished.codecs.activations.of(finished.workspace.layers)
    assert isinstance(activations, StoredActivations)
    row = row_of(read_map(folder_of(finished)), 1, "v", "transform:1")
    x = activations.read(1, "v").reshape(12, 64, -1)[9:, 2:].flatten(0, 1)  # three blocks held out, without sinks
    activations.delete()
    codec = codec_alone(finished, Site(1, "v"), "transform:1")
    error = (x - codec.decode(codec.encode(x))).square().sum(dim=1).mean().item()
    variances = torch.linalg.eigvalsh(torch.cov(x.double().T, correction=0)).tolist()
    low, high = -60.0, math.log2(max(variances))
    for _ in range(100):
        level = (low + high) / 2
        bits = sum(max(0.0, math.log2(variance) - level) / 2 for variance in variances)
        low, high = (level, high) if bits > codec.bits_per_token else (low, level)
    least = sum(min(2**low, variance) for variance in variances)
    assert row.error_db_over_bound == pytest.approx(10 * math.log10(error / least), abs=1e-3)


def test_transform_is_above_the_bound_and_nearer_when_stored(finished: PlanEvaluator) -> None:
    """But for layer 0, whose values are a function of the token alone: as far from Gaussian as can be."""
    table = read_map(folder_of(finished))
    transform = table[(table["codec"] == "transform:1") & (table["layer"] > 0)]
    assert (transform["error_db_over_bound"] > 0).all()
    assert (transform["stored_error_db_over_bound"] > 0).all()
    assert (transform["stored_error_db_over_bound"] < transform["error_db_over_bound"]).all()


@pytest.mark.usefixtures("unreported")
def test_identity_costs_nothing_and_has_no_distance(map_settings: dict[str, Any], tmp_path: Path) -> None:
    table = map_rates(evaluator_of(map_settings, tmp_path, layers="1"), parse_recipes(["identity"]), "all")
    assert list(table["delta_ppl"]) == [0.0, 0.0]
    assert list(table["fvu"]) == [0.0, 0.0]
    assert table["error_db_over_bound"].isna().all()


# -- what is measured --------------------------------------------------------------------------------------------------


def test_nothing_measured_leaves_perplexity_empty(
    finished: PlanEvaluator, map_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlanEvaluator, "nats", None)
    evaluator = evaluator_of(map_settings, tmp_path)
    stale = tmp_path / "figures/map_curves.png"
    stale.parent.mkdir()
    stale.touch()
    map_rates(evaluator, RECIPES, "none")
    table = read_map(tmp_path)
    assert set(table["measured"]) == {"error"}
    assert table[["delta_ppl", "delta_ppl_low", "delta_ppl_high", "base_ppl", "tokens"]].isna().all(axis=None)
    whole = read_map(folder_of(finished))
    pd.testing.assert_frame_equal(table[["fvu", "error_db_over_bound"]], whole[["fvu", "error_db_over_bound"]])
    assert not stale.exists()
    assert (tmp_path / "figures/map_error_curves.png").read_bytes().startswith(PNG)


@pytest.mark.usefixtures("drawn_whole")
def test_some_layers_measured(finished: PlanEvaluator, map_settings: dict[str, Any], tmp_path: Path) -> None:
    table = map_rates(evaluator_of(map_settings, tmp_path, layers="1-3"), parse_recipes(["int:2"]), "0-1")
    assert list(table["measured"]) == ["perplexity"] * 2 + ["error"] * 4
    assert row_of(table, 1, "k", "int:2").delta_ppl == row_of(read_map(folder_of(finished)), 1, "k", "int:2").delta_ppl
    text = (tmp_path / "map.md").read_text()
    assert "of 2 layers reconstruction errors only" in text
    assert "| 2 | K | - | - | - | int:2 (FVU" in text
    for name in ("map_heat", "map_curves", "map_error_curves", "map_bound"):
        assert (tmp_path / f"figures/{name}.png").read_bytes().startswith(PNG)


@pytest.fixture(scope="module")
def screened(
    map_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[PlanEvaluator, PlanEvaluator]:
    """An exact map and a screened one on six blocks."""
    settings = {**map_settings, "data.selection_blocks": 6}
    exact = evaluator_of(settings, tmp_path_factory.mktemp("exact"))
    sparing = evaluator_of(settings, tmp_path_factory.mktemp("screened"), **{"sweep.screen": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leankv.studies.rate_map.write_map_report", lambda folder: None)
        for evaluator in (exact, sparing):
            map_rates(evaluator, RECIPES, "all")
    return exact, sparing


def test_a_screened_map_measures_only_the_cheapest_of_each_codec_on_all(
    screened: tuple[PlanEvaluator, PlanEvaluator],
) -> None:
    """Of 8 layers and parts 3 on six blocks, each with the exact map's cost and interval; the others on two."""
    exact, sparing = (read_map(folder_of(each)) for each in screened)
    assert set(sparing["measured"]) == {"perplexity"}
    columns = ["layer", "part", "codec", "fvu", "bits_per_token", "base_ppl"]
    pd.testing.assert_frame_equal(exact[columns], sparing[columns])
    for codec in SPECS:
        own, slow = sparing[sparing["codec"] == codec], exact[exact["codec"] == codec]
        assert sorted(own["tokens"]) == [2 * 63] * 5 + [6 * 63] * 3
        whole = own["tokens"] == 6 * 63
        for name in ("delta_ppl", "delta_ppl_low", "delta_ppl_high"):
            assert own[name][whole].tolist() == pytest.approx(slow[name][whole].tolist(), rel=1e-9)
        assert (own["delta_ppl_low"] <= own["delta_ppl"]).all()


def test_the_cost_of_two_blocks_is_that_of_these_blocks(screened: tuple[PlanEvaluator, PlanEvaluator]) -> None:
    """The two are the same for all layers and parts, whichever they are."""
    exact, sparing = screened
    table = read_map(folder_of(sparing))
    row = table[(table["tokens"] == 2 * 63) & (table["codec"] == "int:2")].iloc[0]
    base = exact.base()
    own = exact.nats(PlanSpec.uniform("int:2").only([int(row["layer"])], [row["part"]]))
    rises = [(after - before) / 63 for before, after in zip(base.nats, own.nats, strict=True)]
    costs = [base.perplexity * math.expm1((one + two) / 2) for one, two in itertools.combinations(rises, 2)]
    assert any(row["delta_ppl"] == pytest.approx(cost, rel=1e-9) for cost in costs)


def test_a_screened_map_says_how_many_tokens_its_rows_saw(screened: tuple[PlanEvaluator, PlanEvaluator]) -> None:
    exact, sparing = (map_markdown(read_map(folder_of(each))) for each in screened)
    assert ", 378 tokens of the selection split" in exact
    assert ", 126 to 378 tokens of the selection split" in sparing


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unreported")
def test_a_resumed_map_computes_nothing_and_says_the_same(
    finished: PlanEvaluator, map_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(finished)
    before = (folder / "map.csv").read_bytes()
    files = {path: path.stat().st_mtime_ns for kind in ("cells", "codecs") for path in (folder / kind).iterdir()}
    (folder / "map.csv").unlink()
    monkeypatch.setattr(ActivationStore, "of", None)
    map_rates(evaluator_of(map_settings, folder), RECIPES, "all")
    assert (folder / "map.csv").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert not list(folder.glob("activations-*"))


@pytest.mark.usefixtures("unreported")
def test_an_interrupted_map_goes_on(
    finished: PlanEvaluator, map_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, left = PlanEvaluator.nats, [7]

    def stop_after_some(self: PlanEvaluator, *args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return measure(self, *args, **kwargs)

    monkeypatch.setattr(PlanEvaluator, "nats", stop_after_some)
    with pytest.raises(KeyboardInterrupt):
        map_rates(evaluator_of(map_settings, tmp_path), RECIPES, "all")
    map_rates(evaluator_of(map_settings, tmp_path), RECIPES, "all")
    assert (tmp_path / "map.csv").read_bytes() == (folder_of(finished) / "map.csv").read_bytes()


# -- spectra, words, refusals ------------------------------------------------------------------------------------------


def test_a_spectrum_sums_to_the_variance_and_falls() -> None:
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 17) + 5
    variances = variances_of(x)
    assert sum(variances) == pytest.approx(x.double().var(dim=0, correction=0).sum().item(), rel=1e-5)
    assert variances == sorted(variances, reverse=True)


def test_spectra_stand_in_a_file_and_in_the_report(finished: PlanEvaluator) -> None:
    folder, layers = folder_of(finished), range(4)
    table = read_spectra(folder)
    for site, variances in spectra(finished, layers).items():
        own = table[(table["layer"] == site.layer) & (table["part"] == site.part)]
        assert own["component"].tolist() == [*range(1, 33)]
        assert own["variance"].tolist() == pytest.approx(variances)
    (row,) = [row for row in spectra_table(table).rows if [row[0].text, row[1].text] == ["2", "K"]]
    held = np.cumsum(spectra(finished, [2])[Site(2, "k")])
    assert [cell.value for cell in row[2:]] == [
        *(int(np.searchsorted(held, s * held[-1])) + 1 for s in (0.5, 0.9, 0.99)),
        32,
    ]
    html = page([read_run(folder)])
    assert html.count("<h2>Spectra</h2>") == 1
    assert "% with those before" in html


def test_spectra_are_kept(finished: PlanEvaluator) -> None:
    kept = spectra(finished, [0, 2])
    assert list(kept) == [(0, "k"), (0, "v"), (2, "k"), (2, "v")]
    assert not list(folder_of(finished).glob("activations-*")), "no new capture"


def test_the_report_names_the_cheapest_within_the_bits(finished: PlanEvaluator) -> None:
    table = read_map(folder_of(finished)).assign(delta_ppl=0.5)
    table.loc[table["codec"] == "int:2", "delta_ppl"] = 0.25
    assert codecs_by_bits(table)[0] == "transform:1"
    header, rows = best_rows(table)
    bits = table[(table["layer"] == 0) & (table["part"] == "k")].set_index("codec")["bits_per_token"] / 32
    rates = [float(name.split()[0]) for name in header[2:]]
    expected = [
        "int:2 (+0.250)" if r >= bits["int:2"] else "transform:1 (+0.500)" if r >= bits["transform:1"] else "-"
        for r in rates
    ]
    assert rows[0] == ["0", "K", *expected]
    assert [row[0] for row in codec_rows(table)[1]] == codecs_by_bits(table)


def test_the_report_says_what_the_error_metric_does_to_distances(finished: PlanEvaluator) -> None:
    table = read_map(folder_of(finished))
    assert "another error" not in map_markdown(table)
    assert "error metric `gradient`" in map_markdown(table.assign(error_metric="gradient"))


def test_specs() -> None:
    found = parse_recipes(["ae:4", "int:2", "ae:4x128"])
    assert [recipe.text for recipe in found] == ["ae:4", "int:2"], "ae:4x128 is ae:4"
    assert [recipe.text for recipe in parse_recipes(MAP_SPECS)] == list(MAP_SPECS)
    with pytest.raises(UserError, match="leave it out"):
        parse_recipes(["int:2", "none"])
    with pytest.raises(UserError, match="nonsense"):
        parse_recipes(["nonsense"])


def test_which_layers_to_measure() -> None:
    for text in ("all", "none", "0,2-3"):
        check_measure(text)
    with pytest.raises(UserError, match="--measure 'some'"):
        check_measure("some")


def test_the_command(map_settings: dict[str, Any], tmp_path: Path) -> None:
    wanted = {key: value for key, value in map_settings.items() if key != "data.selection_blocks"}
    sets = [piece for key, value in wanted.items() for piece in ("--set", f"{key}={value}")]
    given = ["map", "pca:4", "mean", "--layers", "1", "--blocks", "1", "-o", str(tmp_path / "run"), *sets]
    result = CliRunner().invoke(app, [*given, "--json"])
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [(row["part"], row["codec"]) for row in rows] == [(p, c) for p in "kv" for c in ("pca:4", "mean")]
    assert all(row["tokens"] == 63 and row["delta_ppl_low"] is None for row in rows)
    shown = CliRunner().invoke(app, given)
    assert "pca:4" in shown.stdout
    assert "map.csv" in shown.stdout


@pytest.mark.usefixtures("unreported")
def test_the_command_screens(map_settings: dict[str, Any], tmp_path: Path) -> None:
    sets = [piece for key, value in map_settings.items() for piece in ("--set", f"{key}={value}")]
    given = ["map", "pca:4", "--layers", "1,2", "--screen", "-o", str(tmp_path), *sets]
    result = CliRunner().invoke(app, [*given, "--set", "data.selection_blocks=3", "--json"])
    assert result.exit_code == 0, result.stderr
    assert sorted(row["tokens"] for row in json.loads(result.stdout)) == [2 * 63] * 2 + [3 * 63] * 2

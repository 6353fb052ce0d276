"""Keys wider than values (MiMo-V2-Flash: 192 and 128 numbers a head): each part is captured, coded, counted as it is.

The tiny model's layers have keys of 32 and values of 24 numbers a token; sliding ones of 64 and 48.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import leankv
from leankv.cache.footprint import Footprint
from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import PlanSpec, Site
from leankv.calibration.error_metrics import fit_error_metrics
from leankv.calibration.metric_sample import MetricSample
from leankv.config.loading import load_experiment
from leankv.config.plan_table import PARTS
from leankv.data.blocks import Blocks
from leankv.errors import UserError
from leankv.models.geometry import find_geometry
from leankv.models.inspection import info_rows, inspect_cache
from leankv.models.loading import look_at
from leankv.progress import Silent
from leankv.studies.sweep_index import Index
from leankv.studies.sweep_table import finished_row
from tests import tiny
from tests.oracles import Rounding, SlowCache, identity_plan, plan_of, recorded

WIDTHS = [(32, 24), (64, 48), (32, 24), (64, 48)]


@pytest.fixture(scope="module")
def mimo() -> Any:
    return tiny.build("mimo")


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return tiny.tokens(6, 20)


def test_the_geometry_has_both_widths(mimo: Any) -> None:
    geometry = find_geometry(mimo)
    assert geometry.width == WIDTHS
    assert geometry.bytes_per_token == 2 * sum(k + v for k, v in WIDTHS)
    info = inspect_cache(look_at(mimo, None))
    assert (info.head_dim, info.v_head_dim, info.width) == (16, 12, WIDTHS)
    assert dict(info_rows(info))["attention heads, KV heads x head dim"] == "4, [2, 4, 2, 4] x 16 (K), 12 (V)"


@pytest.mark.parametrize("kept", [(0, 0), (2, 5)], ids=["no exact rows", "sinks and window"])
def test_identity_codecs_give_the_bits_of_the_stock_cache(mimo: Any, kept: tuple[int, int]) -> None:
    caches = [
        DynamicCache(config=mimo.config),
        LeanCache(mimo.config, identity_plan(mimo), sinks=kept[0], window=kept[1]),
    ]
    stock, lean = (
        mimo.generate(
            tiny.tokens(2, 30),
            past_key_values=cache,
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for cache in caches
    )
    for ours, theirs in zip(lean.logits, stock.logits, strict=True):
        assert torch.equal(ours, theirs)


def test_a_lossy_pass_equals_one_over_reconstructions(mimo: Any) -> None:
    plan = plan_of(mimo, Rounding)
    lean, slow = LeanCache(mimo.config, plan, sinks=2, window=3), SlowCache(mimo.config, plan, 2, 3)
    with torch.no_grad():
        for chunk in tiny.tokens(2, 30).split([13, 1, 9, 7], dim=1):
            got, expected = (mimo(chunk, past_key_values=cache).logits for cache in (lean, slow))
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(got, mimo(tiny.tokens(2, 30)).logits[:, -7:], atol=1e-3)


def test_a_cache_holds_the_bytes_of_its_footprint(mimo: Any) -> None:
    """Rounding takes a byte a number; the tiny model caches float32, twice the 16 bits that footprints count."""
    plan = plan_of(mimo, Rounding)
    cache = LeanCache(mimo.config, plan, sinks=0, window=0)
    with torch.no_grad():
        mimo(tiny.tokens(1, 9), past_key_values=cache)
    bits = {site: codec.bits_per_token for site, codec in plan.items()}
    assert cache.nbytes() == Footprint(find_geometry(mimo), bits, 0, 0).compressed_bytes(9) == 9 * sum(map(sum, WIDTHS))


def test_vectors_are_captured_as_they_are_on_disk_and_in_memory(mimo: Any, text: torch.Tensor, tmp_path: Path) -> None:
    captured = leankv.capture(mimo, None, text)
    for site, expected in recorded(mimo, text).items():
        assert torch.equal(getattr(captured[site.layer], site.part), expected)
    on_disk, in_memory = (
        leankv.sweep(mimo, None, text, recipe="pca:4", sinks=0, folder=folder) for folder in (tmp_path / "run", None)
    )
    assert on_disk["fvu_v"].between(0, 1, inclusive="neither").all()
    assert list(on_disk["fvu_v"]) == list(in_memory["fvu_v"]), "codecs fitted to the same vectors"


def test_fitted_codecs_work_and_come_back_from_a_bundle(mimo: Any, text: torch.Tensor, tmp_path: Path) -> None:
    bundle = leankv.fit("transform:s0.02", mimo, None, text, sinks=2, window=4)
    assert {site: codec.width for site, codec in bundle.plan.items()} == {
        Site(layer, part): width for layer, both in enumerate(WIDTHS) for part, width in zip(PARTS, both, strict=True)
    }
    assert (bundle.key_space, bundle.spec) == ("pre-rope", PlanSpec.uniform("transform:s0.02").resolved(4))
    bundle.save(tmp_path)
    opened = leankv.load(tmp_path, mimo)
    other = tiny.tokens(2, 20, seed=1)
    report, again = (leankv.perplexity(mimo, None, other, bundle=each, chunk=8) for each in (bundle, opened))
    assert report == again
    assert report.kl is not None
    assert 0 < report.kl < 0.5
    narrower = tiny.build("mimo", v_head_dim=8)
    with pytest.raises(UserError, match="load the one it was made for"):
        leankv.load(tmp_path, narrower)


def test_a_bundle_whose_value_codec_has_the_width_of_keys_is_refused(mimo: Any, tmp_path: Path) -> None:
    bundle = leankv.fit("int:4", mimo, None, tiny.tokens(2, 20), window=0, error_metric="none")
    swapped = {Site(0, "v"): bundle.plan[Site(0, "k")]}
    replace(bundle, plan=swapped).save(tmp_path)
    with pytest.raises(UserError, match="width is 32, not the model's 24"):
        leankv.load(tmp_path, mimo)


def test_a_sweep_counts_exact_parts_by_their_own_width(mimo: Any, text: torch.Tensor, tmp_path: Path) -> None:
    for exact, position in (("k", 0), ("v", 1)):
        folder = tmp_path / exact
        spec = PlanSpec.uniform("mean").with_layers(range(4), **{exact: "none"})
        table = leankv.sweep(mimo, None, text, recipe=spec, folder=folder)
        assert list(table["bits_per_token"]) == [16 * both[position] for both in WIDTHS]
        index = Index.read(folder)
        assert index is not None
        row = finished_row(index, load_experiment(folder / "experiment.yaml", {}), 1)  # as who has loaded no model
        assert row["bits_per_token"] == 16 * WIDTHS[1][position]
        assert json.loads((folder / "sweep.json").read_text())["widths"] == [list(both) for both in WIDTHS]


@pytest.mark.parametrize("kind", ["gradient", "attention"])
def test_error_metrics_have_the_width_of_their_part(mimo: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(mimo), "_supports_sdpa", True)  # its learnt sinks aside, its attention has that form
    blocks = Blocks(tiny.tokens(2, 20), "calibration", "random")
    metrics = fit_error_metrics(kind, look_at(mimo, None), MetricSample(blocks, (0, 1), None, 0, 0), Silent())
    shapes = {site: tuple(metric.shape) for site, metric in metrics.items()}
    assert shapes == {Site(layer, part): (WIDTHS[layer][at],) * 2 for layer in (0, 1) for at, part in enumerate(PARTS)}


def test_a_model_whose_attention_cannot_be_watched_says_what_can_be_asked(mimo: Any, text: torch.Tensor) -> None:
    before = mimo.config._attn_implementation
    with pytest.raises(UserError, match=r"mimo_v2_flash.* use --error-metric gradient"):
        leankv.fit("int:4", mimo, None, text, error_metric="attention")
    assert mimo.config._attn_implementation == before


def test_share_is_refused(mimo: Any, text: torch.Tensor) -> None:
    with pytest.raises(UserError, match="keys and values of one width"):
        leankv.fit("resid(share:-1,transform:1)", mimo, None, text)

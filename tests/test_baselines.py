"""Baselines: caches that someone else wrote, found by name or by `module:factory`, and known by what makes them."""

from pathlib import Path
from typing import Any

import pytest
from transformers import DynamicCache

from leankv.errors import UserError
from leankv.evaluation.baselines import BASELINES, find_baselines, try_baseline
from leankv.models.loading import look_at
from tests import tiny
from tests.run_folders import write_factory

STOCK = f"{__name__}:stock"


def stock(config: Any) -> Any:
    """A baseline that loses nothing and saves nothing."""
    return DynamicCache(config=config)


def test_all_baselines_once() -> None:
    assert [baseline.spec for baseline in find_baselines(["all", "hqq:4", STOCK])] == [*BASELINES, STOCK]


@pytest.mark.parametrize("text", ["hqq:5", "nonsense", ":", "nowhere.to.be:found", f"{__name__}:missing", "math:pi"])
def test_a_baseline_that_there_is_not(text: str) -> None:
    with pytest.raises(UserError, match=text.split(":")[0] or "module:factory"):
        find_baselines([text])


def test_a_baseline_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"leankv\[baselines\]"):
        find_baselines(["hqq:4"])


def test_a_baseline_of_ones_own_is_known_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another module than the one named defines the factory."""
    monkeypatch.syspath_prepend(tmp_path)
    source = "def make(config):\n    return {}\n"
    makers = []
    for number in (1, 1, 2):
        named = write_factory(tmp_path, "own_cache", source.format(number))
        through = write_factory(tmp_path, "names_it", "from own_cache import make\n")
        makers.append([baseline.maker for baseline in find_baselines([named, through])])
    assert makers[0] == makers[1]
    assert all(before != after for before, after in zip(makers[1], makers[2], strict=True))
    assert makers[0][0].startswith("own_cache, source ")


def test_a_baseline_without_a_source_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"time:time cannot be read"):
        find_baselines(["time:time"])


def test_a_baseline_that_knows_no_sliding_windows() -> None:
    """Transformers' own quantized cache is for full attention only."""
    loaded = look_at(tiny.build("gemma3"), None)
    (baseline,) = find_baselines(["hqq:4"])
    with pytest.raises(UserError, match=r"hqq:4.*sliding"):
        try_baseline(baseline, loaded, tiny.tokens(1, 32), 16)

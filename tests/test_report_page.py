"""The report: one page of everything a run left, tried in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from leankv.cli import app
from leankv.errors import UserError
from leankv.report.page.contents import read_run
from leankv.report.page.render import page, write_page
from leankv.report.page.text_difference import parted
from leankv.report.summary import read_summary
from leankv.storage.files import write_json

RESULTS = Path(__file__).parent.parent / "results"
RUNS = [RESULTS / name for name in ("plans-smollm2", "smollm2-135m", "compare-smollm2", "map-smollm2")]
"""As `leankv` wrote them."""

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of four runs, one of them with what both models say."""
    folder = tmp_path_factory.mktemp("report")
    said = folder / "said"
    shutil.copytree(RUNS[1], said)
    completion = json.loads((said / "completion.json").read_text())
    write_json(said / "completion.json", completion | {"base_text": completion["text"][:30] + "<b>other</b>"})
    write_page([RUNS[0], said, *RUNS[2:]], folder / "report.html")
    return folder / "report.html"


def test_the_page_says_what_the_files_say(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    summary = read_summary(RUNS[1])
    for figure in (f"{summary.ppl:.3f}", f"{summary.base_ppl:.3f}", f"{summary.delta_percent:+.2f} %"):
        assert figure in text
    assert f"{summary.cache_ratio:.1f} times smaller for" in text
    plans = json.loads((RUNS[0] / "plans.json").read_text())
    for plan in plans:
        assert f"{plan['summary']['ppl']:.3f}" in text
        stored = plan["summary"]["base_bytes"] / plan["summary"]["stored_bytes"]  # what these searches made small
        assert f"{stored:.1f} times smaller stored for" in text
    assert "at 95 % confidence, on 31 documents" in text
    assert "&lt;b&gt;other&lt;/b&gt;" in text  # what a model says is text, not markup


def test_it_fetches_nothing_and_is_small(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert written.stat().st_size < 8e6
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=\"?(https?:)?//", text)


def test_a_full_map_stands_in_a_table_too(written: Path) -> None:
    body = written.read_text(encoding="utf-8").partition("<script>")[0]
    rows = len((RUNS[3] / "map.csv").read_text().splitlines()) - 1
    map_section = body.partition("Rate map")[2]
    assert map_section.count("<tr>") >= rows


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_texts_part_where_they_differ(same: str, base: str, ours: str) -> None:
    begin, first, second = parted(same + base, same + ours)
    assert begin + first == same + base
    assert begin + second == same + ours
    if base == ours:
        assert first == second == ""
    elif first and second:
        assert first.split(" ")[0] != second.split(" ")[0]


def test_unfinished_runs_show_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "begun"
    folder.mkdir()
    for name in ("sweep.csv", "sweep.json", "experiment.yaml"):
        if (RUNS[1] / name).is_file():
            shutil.copy(RUNS[1] / name, folder)
    text = page([read_run(folder)])
    assert "none was selected: no plan yet" in text
    assert "Cost by layer" in text
    shutil.copy(RUNS[1] / "selection.json", folder)
    assert "not measured on report text" in page([read_run(folder)])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no run"):
        read_run(tmp_path)
    (tmp_path / "experiment.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="nothing of it is finished"):
        read_run(tmp_path)


def test_report_is_a_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(RUNS[1], run)
    ran = CliRunner().invoke(app, ["report", str(run)])
    assert ran.exit_code == 0, ran.output
    assert (run / "report.html").is_file()
    assert "report.html" in ran.output


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium here; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_in_a_browser(written: Path, browser: Any, scheme: str, width: int) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    tab, wrong, asked = context.new_page(), [], []
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(written.as_uri())
    tab.wait_for_selector(".chart .main-svg")
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width

    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", paper)[:3]))
    assert (brightness < 200) == (scheme == "dark")
    ink = tab.evaluate("getComputedStyle(document.querySelector('.chart .xtick text')).fill")
    assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 400) == (scheme == "dark")

    bars = tab.locator(".chart .bars .point path").first
    bars.scroll_into_view_if_needed()
    bars.hover(force=True)
    tab.wait_for_selector(".hoverlayer .hovertext")
    assert "layer" in tab.locator(".hoverlayer .hovertext").first.text_content()

    sweep = tab.locator("table", has=tab.locator("caption", has_text="Each layer alone")).first
    column = [th.inner_text().split(" ")[0] for th in sweep.locator("th").all()].index("cost,")
    for direction in (1, -1):
        sweep.locator("th button").nth(column).click()
        costs = [float(cell) for cell in sweep.locator(f"tbody td:nth-child({column + 1})").all_inner_texts()]
        assert costs == sorted(costs, reverse=direction == -1)
    context.close()


def test_tables_are_read_without_javascript(written: Path, browser: Any) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(written.as_uri())
    assert tab.locator("noscript").count() == 1
    assert tab.get_by_text("at 95 % confidence, on 31 documents").count() >= 1
    assert tab.locator("td").count() > 500
    context.close()

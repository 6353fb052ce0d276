"""The protocol `prefix` in studies, in commands and from Python."""

import json
from pathlib import Path
from typing import Any

import pytest

import leankv
from leankv.cache.lean_cache import LeanCache
from leankv.cache.part_store import UNBOUNDED
from leankv.cache.plan import PlanSpec
from leankv.data.blocks import Blocks
from leankv.data.splits import TextSource
from leankv.errors import UserError
from leankv.evaluation.perplexity import measure_nats
from leankv.report.columns import read_compare
from leankv.report.compare import compare_title
from leankv.studies.compare import compare_caches
from tests import tiny
from tests.run_folders import evaluator_of, folder_of, refuse, succeed, succeed_json
from tests.test_data import source
from tests.test_encode_all import CONTINUATION, PREFIX, PROTOCOL, bundle_of
from tests.test_wikitext import n_tokens, write_wikitext

pytestmark = pytest.mark.whole_runs

FLAGS = ("--protocol", "prefix", "--prefix-length", 40, "--continuation", 16)
CHAIN = "resid(share:-2,transform:s0.3)"

# -- text --------------------------------------------------------------------------------------------------------------


def test_selection_text_is_put_aside_for_blocks_as_long_as_they_are_measured(tmp_path: Path) -> None:
    """So no other split takes it; calibration keeps its own block length."""
    small = {"block_length": 50, "calibration_blocks": 4, "selection_blocks": 20}
    wiki = source("wikitext-2", write_wikitext(tmp_path), **small)
    longer = TextSource(wiki._config, selection_length=90)
    tokenizer = tiny.tokenizer()
    fitted, chosen, certified = (
        longer.documents(name, tokenizer) for name in ("calibration", "selection", "certification")
    )
    assert fitted == wiki.documents("calibration", tokenizer)
    assert n_tokens(chosen) >= 20 * 90 > n_tokens(wiki.documents("selection", tokenizer))
    assert not {*fitted, *chosen} & {*certified}
    assert len(longer.blocks("selection", tokenizer, 20, 90)) == 20
    with pytest.raises(UserError, match="put aside for 20 blocks of 90"):
        longer.blocks("selection", tokenizer, 60, 90)


# -- studies and commands ----------------------------------------------------------------------------------------------


@pytest.fixture
def prefix_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Blocks of 48 tokens for calibration; prefix and continuation take 56."""
    own = {"kind": "prefix", "prefix_length": 40, "continuation": 16, "sinks": 2}
    return {**settings, **{f"protocol.{name}": value for name, value in own.items()}}


def test_plans_are_measured_as_a_full_pass_measures_them(prefix_settings: dict[str, Any], tmp_path: Path) -> None:
    """Though prefixes are computed once for all plans; blocks are long enough by themselves."""
    evaluator = evaluator_of(prefix_settings, tmp_path / "run", **{"codec.key_space": "pre-rope"})
    workspace = evaluator.workspace
    assert [workspace.blocks(split).tokens.shape[1] for split in ("calibration", "selection", "report")] == [48, 56, 56]
    model = workspace.loaded.model
    for layers in ([3], [2, 3], [0, 1, 2, 3]):
        spec = PlanSpec.uniform(CHAIN).only(layers)
        plan = evaluator.codecs.plan(spec)

        def make_cache(plan: Any = plan) -> LeanCache:
            return LeanCache(model.config, plan, sinks=2, window=UNBOUNDED, rotation=workspace.rotation)

        for split in ("selection", "report"):
            full = measure_nats(model, workspace.blocks(split), evaluator.protocol, make_cache)
            assert evaluator.nats(spec, split, extends_to_supersets=split == "selection").nats == full.nats
    assert evaluator.pair(spec, "report", "").compressed.nats == full.nats
    fed: list[int] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].shape[1]))
    evaluator.nats(PlanSpec.uniform("int:3"), "report")
    hook.remove()
    assert fed == [16] * 4


def test_cells_of_other_protocols_are_named_as_before_there_was_a_prefix(
    settings: dict[str, Any], prefix_settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = PlanSpec.uniform("int:4")

    def keyed(own: dict[str, Any]) -> list[dict[str, Any]]:
        evaluator = evaluator_of(own, tmp_path / own["protocol.kind"])
        cells = [
            json.loads(evaluator.nats_path(each).read_text()) for each in (PlanSpec(), spec) if evaluator.nats(each)
        ]
        return [cell["depends_on"]["protocol"] for cell in cells]

    fed = {"kind": "stream", "chunk": 128, "batch_size": 1}
    assert keyed({**settings, "protocol.kind": "stream"}) == [fed, {**fed, "sinks": 0, "window": 0}]
    fed = {"kind": "prefix", "batch_size": 1, "prefix_length": 40, "continuation": 16}
    assert keyed(prefix_settings) == [fed, {**fed, "sinks": 2}]


def test_a_comparison_of_prefixes(prefix_settings: dict[str, Any], tmp_path: Path) -> None:
    evaluator = evaluator_of(prefix_settings, tmp_path / "run")
    compare_caches(evaluator, {"four bits": PlanSpec.uniform("int:4g8"), "chain": PlanSpec.uniform(CHAIN)})
    table = read_compare(folder_of(evaluator)).set_index("spec")
    row = table.loc["four bits"]
    assert (row.protocol, row.context, row.tokens, row.window, row.sinks) == ("prefix", 40, 4 * 15, 0, 2)
    # Of 40 tokens two are exact, in float32 or bfloat16; the others are codes.
    (bits,) = {codec.bits_per_token for codec in evaluator.codecs.plan(PlanSpec.uniform("int:4g8")).values()}
    exact = 32 * evaluator.workspace.loaded.model.dtype.itemsize
    assert row.stored_bytes == row.held_bytes == 8 * (2 * exact + 38 * bits // 8)
    assert row.stored_ratio == pytest.approx(8 * 40 * 64 / row.stored_bytes)
    assert table.loc["chain"].stored_ratio > table.loc["chain"].cache_ratio
    assert "4 prefixes of 40 tokens of the report split, 15 predictions behind each" in compare_title(
        table.reset_index()
    )


def test_a_table_of_an_earlier_version_tells_the_stored_ratio(prefix_settings: dict[str, Any], tmp_path: Path) -> None:
    evaluator = evaluator_of(prefix_settings, tmp_path / "run")
    compare_caches(evaluator, {"chain": PlanSpec.uniform(CHAIN)})
    path = folder_of(evaluator) / "compare.csv"
    written = read_compare(path.parent)
    written.drop(columns="stored_ratio").to_csv(path, index=False)
    assert read_compare(path.parent)["stored_ratio"].tolist() == pytest.approx(written["stored_ratio"].tolist())


def test_commands_measure_prefixes(experiment: Path, bundle: Path, tmp_path: Path) -> None:
    """A selection, and a bundle that was chosen under another protocol with a window."""
    common = ("--config", experiment, "-o", tmp_path / "run", *FLAGS)
    succeed("sweep", *common)
    succeed("select", "-o", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["protocol"], summary["context"], summary["tokens"]) == ("prefix", 40, 3 * 15)
    told = succeed_json("eval-ppl", "--bundle", bundle, *FLAGS, "--blocks", 2)
    assert (told["protocol"], told["tokens"], told["block_length"], told["window"]) == ("prefix", 2 * 15, 56, 0)
    assert told["kl"] > 0
    (row,) = succeed_json("compare", "--config", experiment, "int:4", *FLAGS, "-o", tmp_path / "compare")
    assert row["context"] == 40


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sweep", "--window", 5), "a prefix is coded whole, with no exact window: set protocol.window to 0"),
        (("sweep", "--continuation", 1), "protocol.continuation must be at least 2, not 1"),
        (("sweep", "--prefix-length", 4), "nothing to code behind 4 sinks: raise protocol.prefix_length"),
        (("compare", "int:4", "--window", 5), "a prefix is coded whole"),
        (("compare", "int:4", "--baseline", "hqq:4"), "leave --baseline out"),
        (("eval-ppl", "--continuation", 100_000), "set data.report_blocks|give more text|fewer or shorter blocks"),
    ],
)
def test_what_no_prefix_can_have_is_refused(
    experiment: Path, tmp_path: Path, arguments: tuple[Any, ...], words: str
) -> None:
    command, *rest = arguments
    sentence = refuse(command, "--config", experiment, "-o", tmp_path / "run", *FLAGS, *rest)
    assert any(each in sentence for each in words.split("|")), sentence


def test_free_running_under_a_prefix_is_refused(bundle: Path) -> None:
    assert "leave one of --free-run and --protocol prefix out" in refuse(
        "eval-ppl", "--bundle", bundle, *FLAGS, "--free-run", 4
    )


# -- from Python -------------------------------------------------------------------------------------------------------


def test_perplexity_from_python() -> None:
    model, blocks = tiny.build("llama"), Blocks(tiny.tokens(3, PREFIX + CONTINUATION + 3), "all", "random tokens")
    bundle = bundle_of(model, CHAIN)
    lengths = {"prefix_length": PREFIX, "continuation": CONTINUATION}
    report = leankv.perplexity(model, None, blocks.tokens, bundle=bundle, protocol="prefix", **lengths)
    measured = measure_nats(model, blocks, PROTOCOL, lambda: bundle.new_cache(window=UNBOUNDED))
    assert report.ppl == pytest.approx(measured.perplexity, rel=1e-9)
    assert report.tokens == 3 * (CONTINUATION - 1)
    text = tiny.text(3 * 40)
    rows = len(text) // (PREFIX + CONTINUATION)  # a token a letter
    found = leankv.perplexity(model, tiny.tokenizer(), text, protocol="prefix", **lengths)
    assert found.tokens == rows * (CONTINUATION - 1)
    with pytest.raises(UserError, match=f"need blocks of 1280 tokens, not of {blocks.tokens.shape[1]}"):
        leankv.perplexity(model, None, blocks.tokens, protocol="prefix")

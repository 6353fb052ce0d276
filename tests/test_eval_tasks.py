"""Task scores: base model, bundle and baselines are asked the same, and paired sample by sample."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from scipy import stats

from leankv.report.task_scores import AGREEMENT_COLUMNS, TASK_COLUMNS, read_task_scores
from tests import tiny
from tests.run_folders import refuse, succeed, succeed_json, write_factory
from tests.test_harness import QUESTIONS

pytestmark = pytest.mark.whole_runs


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that `bundle` was made for, with a tokenizer that has a token that ends texts."""
    folder = tiny.save(tmp_path_factory.mktemp("ending"), tiny.build("llama"))
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(folder)
    return folder


# -- the command ------------------------------------------------------------------------------------------------------


def write_tasks(folder: Path) -> Path:
    """Two tasks of one's own: a choice between two, and a completion."""
    folder.mkdir()
    docs = [{"text": text, "right": right, "wrong": right[::-1] + "s"} for text, right in QUESTIONS]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cached")},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    choice = {
        "task": "own_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{[right, wrong]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    words = {
        "task": "own_words",
        "output_type": "generate_until",
        "doc_to_target": "{{right}}",
        "fewshot_split": "test",
        "num_fewshot": 2,
        "filter_list": [
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {"name": "letter", "filter": [LETTER, {"function": "take_first"}]},
        ],
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    nats = {
        "task": "own_nats",
        "output_type": "loglikelihood",
        "doc_to_target": "{{right}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }
    drawn = {**words, "task": "own_drawn", "generation_kwargs": {"do_sample": True, "temperature": 1.0}}
    for task in (choice, words, nats, drawn):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}), encoding="utf-8")
    return folder


LETTER = {"function": "regex", "regex_pattern": "([a-m])"}

FORGETTING = """
from tests.test_harness import Forgetting
def make(config):
    return Forgetting(config=config)
"""


def test_base_bundle_and_baselines_stand_side_by_side(
    bundle: Path, ending: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("multiprocessing.Pool", pytest.fail)  # a copy of a process with threads can wait for ever
    spec = write_factory(tmp_path, "forgetting_cache", FORGETTING)
    own, out = write_tasks(tmp_path / "own"), tmp_path / "scores"
    command: tuple[object, ...] = (
        *("eval-tasks", "--bundle", bundle, "--model", ending, "--include-path", own),
        *("--tasks", "own_choice,own_words,own_nats"),
        *("--baseline", spec, "--samples", 3, "--blocks", 2, "--free-run", 6, "--set", "protocol.chunk=4", "-o", out),
    )
    printed = succeed_json(*command)
    kept = read_task_scores(out)
    assert kept is not None
    scores, agreement, about = kept.scores, kept.agreement, kept.about
    assert list(scores) == list(TASK_COLUMNS)
    assert list(agreement) == list(AGREEMENT_COLUMNS)
    caches = ["base", bundle.parent.name, spec]
    rows = [(cache, task, metric) for cache in caches for task, metric in METRICS]
    assert list(zip(scores["cache"], scores["task"], scores["metric"], strict=True)) == rows
    assert set(scores["samples"]) == {3}
    assert [row["score"] for row in printed["tasks"]] == pytest.approx(scores["score"].tolist(), rel=1e-12)
    assert about["tasks"] == ["own_choice", "own_words", "own_nats"]
    check_differences(scores, out)
    assert agreement["cache"].tolist() == caches[1:]
    assert (agreement["kl"] > 0).all()
    assert agreement["cache_ratio"][0] > 1
    page = (out / "tasks.md").read_text(encoding="utf-8")
    assert "own_choice, acc" in page
    assert "Same top p" in page
    succeed("report", out)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "<h2>Task scores" in html
    assert "own_words, exact_match (whole)" in html
    answers = {path: path.read_bytes() for path in (out / "responses").iterdir()}
    assert len(answers) == 3, "one file a cache"
    table = succeed(*command).stdout
    assert max(len(line) for line in table.splitlines() if not line.startswith("written")) <= 100
    assert {path: path.read_bytes() for path in (out / "responses").iterdir()} == answers
    pd.testing.assert_frame_equal(pd.read_csv(out / "tasks.csv"), scores)
    succeed(*command, "--set", "protocol.chunk=5")
    assert len(list((out / "responses").iterdir())) == 6, "what is fed otherwise is answered anew"


METRICS = (
    ("own_choice", "acc"),
    ("own_words", "exact_match (whole)"),
    ("own_words", "exact_match (letter)"),
    ("own_nats", "perplexity"),
    ("own_nats", "acc"),
)


def check_differences(scores: pd.DataFrame, out: Path) -> None:
    """From the samples' own values; all caches were asked the same, few-shot examples included."""
    caches = list(dict.fromkeys(scores["cache"]))
    written = [next((out / "samples").glob(f"{cache.partition(':')[0]}*.jsonl")) for cache in caches]
    kept = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in written]
    base, *others = kept
    assert len({sample["prompt_hash"] for sample in base if sample["task"] == "own_words"}) == 3
    rows = {(row["cache"], row["task"], row["metric"]): row for row in scores.to_dict("records")}
    for cache, samples in zip(caches[1:], others, strict=True):
        assert [sample["prompt_hash"] for sample in samples] == [sample["prompt_hash"] for sample in base]
        for task, metric in METRICS:
            row = rows[cache, task, metric]
            assert row["difference"] == pytest.approx(row["score"] - rows["base", task, metric]["score"])
            name, _, filter_ = metric.rstrip(")").partition(" (")
            pairs = [
                (own[name], other[name])
                for own, other in zip(samples, base, strict=True)
                if own["task"] == task and own["filter"] == (filter_ or "none")
            ]
            assert len(pairs) == 3
            differ = any(own != other for own, other in pairs)
            assert differ or metric != "perplexity"
            if metric == "perplexity" or not differ:
                assert row["low"] != row["low"], "not known"
            else:
                expected = stats.ttest_rel(*zip(*pairs, strict=True)).confidence_interval(0.95)
                assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))


def test_paired_intervals_are_those_of_scipy() -> None:
    from leankv.report.task_scores import paired_interval

    own, base = [1.0, 0.0, 0.5, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0, 0.0]
    expected = stats.ttest_rel(own, base).confidence_interval(0.95)
    assert paired_interval(own, base) == pytest.approx((expected.low, expected.high))
    assert all(value != value for value in paired_interval(base, base)), "no sample differs: nothing is known"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--lengths", "100"), "at least 1024"),
        (("--lengths", "many"), "not understood"),
        (("--samples", -1), "--samples must be at least 0"),
        (("--batch-size", 0), "--batch-size must be at least 1"),
        (("--include-path", "nowhere"), "is no folder"),
        (("--baseline", "nobody:4"), "nobody"),
        ((), "has no token that ends a text"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(
    bundle: Path, tmp_path: Path, flags: tuple[object, ...], sentence: str
) -> None:
    assert sentence in refuse("eval-tasks", "--bundle", bundle, "-o", tmp_path / "out", *flags)


def test_tasks_that_cannot_be_asked_are_told(bundle: Path, ending: Path, tmp_path: Path) -> None:
    command = ("eval-tasks", "--bundle", bundle, "--model", ending, "-o", tmp_path)
    assert "niah_single_1 at --lengths is longer than the model's positions" in refuse(*command)
    own = write_tasks(tmp_path / "own")
    (own / "docs.jsonl").unlink()
    own_tasks = (*command, "--include-path", write_tasks(tmp_path / "whole"), "--tasks")
    assert "own_drawn draws its answers at random" in refuse(*own_tasks, "own_drawn")
    assert "the task own_choice cannot be asked" in refuse(*own_tasks, "own_choice", "--num-fewshot", 40)
    assert "names none" in refuse(*own_tasks, ",")
    assert "the task own_choice cannot be loaded" in refuse(*command, "--include-path", own, "--tasks", "own_choice")

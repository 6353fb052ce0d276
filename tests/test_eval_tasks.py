"""Task scores: the harness reads the cache that it is given, keeps its answers, and pairs them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.cache_utils import DynamicCache

import leankv
from leankv.cache.lean_cache import LeanCache
from leankv.config.experiment import ProtocolConfig
from leankv.data.blocks import Blocks
from leankv.errors import UserError
from leankv.evaluation.harness import CacheLM, quietly
from leankv.evaluation.harness_tasks import OFFLINE_TASKS, check_names, load_tasks
from leankv.evaluation.perplexity import measure_nats
from leankv.report.task_scores import AGREEMENT_COLUMNS, TASK_COLUMNS, read_task_scores
from leankv.storage.lines import Lines
from tests import tiny
from tests.run_folders import refuse, succeed, succeed_json, write_factory

pytestmark = pytest.mark.whole_runs

QUESTIONS = [
    ("once there was ", "a king"),
    ("and so it went", " on and on"),
    ("it was late, and ", "he slept"),
    ("no", "w"),
]
CHUNK = 8


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.build("llama")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The harness begins and ends texts with a token."""
    own = tiny.tokenizer()
    own.bos_token = own.eos_token = "<pad>"
    return own


@pytest.fixture(scope="module")
def ending(llama: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that `bundle` was made for, with that tokenizer."""
    folder = tmp_path_factory.mktemp("ending")
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def asked(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, place) for place, each in enumerate(arguments)]


def stock(model: Any) -> Any:
    return lambda mask: DynamicCache(config=model.config)


# -- what is read through the cache -----------------------------------------------------------------------------------


def test_with_the_stock_cache_answers_are_the_harness_s_own(llama: Any, tokenizer: Any) -> None:
    with quietly():
        own = HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=2)
        lm = CacheLM(llama, tokenizer, stock(llama), chunk=3, batch_size=2)
        questions = asked("loglikelihood", QUESTIONS)
        expected, found = own.loglikelihood(questions), lm.loglikelihood(questions)
        texts = asked("loglikelihood_rolling", [(tiny.text(80),), (tiny.text(40, seed=1),)])
        rolling, own_rolling = lm.loglikelihood_rolling(texts), own.loglikelihood_rolling(texts)
        prompts = asked("generate_until", [(text, {"until": ["."], "max_gen_toks": 12}) for text, _ in QUESTIONS])
        completions = lm.generate_until(prompts)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert rolling == pytest.approx(own_rolling, rel=1e-5)
    with quietly():
        assert completions == own.generate_until(prompts)


def test_a_text_s_likelihood_is_that_of_protocol_stream(llama: Any, tokenizer: Any) -> None:
    """Not that of one pass, in which the tokens would have read the window's exact neighbours only."""

    def make(mask: Any = None) -> LeanCache:
        return leankv.Cache(llama, "int:2", sinks=2, window=4)

    text = tiny.text(90)[: 11 * CHUNK]  # whole chunks: the harness does not feed the last token
    with quietly():
        (found,) = CacheLM(llama, tokenizer, make, chunk=CHUNK).loglikelihood_rolling(
            asked("loglikelihood_rolling", [(text,)])
        )
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    blocks = Blocks(torch.tensor([ids]), "report", "text")
    protocol = ProtocolConfig(kind="stream", sinks=2, window=4, chunk=CHUNK)
    assert -found == pytest.approx(measure_nats(llama, blocks, protocol, make).nats[0], rel=1e-5)
    exact = measure_nats(llama, blocks, protocol, lambda: DynamicCache(config=llama.config)).nats[0]
    assert abs(-found - exact) > 1e-2


class Forgetting(DynamicCache):
    """Hands out exact what it is given, and keeps zeros: as bad as a cache can be, and one pass does not show it."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        new = key_states.shape[2]
        keys, values = super().update(key_states * 0, value_states * 0, layer_idx, *args, **kwargs)
        return torch.cat([keys[:, :, :-new], key_states], 2), torch.cat([values[:, :, :-new], value_states], 2)


def test_a_cache_that_shows_nothing_in_one_pass_shows_all_in_chunks(llama: Any, tokenizer: Any) -> None:
    def forgetting(mask: Any) -> Forgetting:
        return Forgetting(config=llama.config)

    texts = asked("loglikelihood_rolling", [(tiny.text(90),)])
    prompts = asked("generate_until", [(tiny.text(60), {"until": [], "max_gen_toks": 1})])
    with quietly():
        exact = HFLM(pretrained=llama, tokenizer=tokenizer)
        whole, pieces = (CacheLM(llama, tokenizer, forgetting, chunk=chunk) for chunk in (512, CHUNK))
        assert whole.loglikelihood_rolling(texts) == pytest.approx(exact.loglikelihood_rolling(texts), rel=1e-5)
        assert abs(pieces.loglikelihood_rolling(texts)[0] - exact.loglikelihood_rolling(texts)[0]) > 1
        # The first token of a completion comes from the prompt alone.
        first = [lm.generate_until(prompts) for lm in (exact, whole, pieces)]
    assert first[0] == first[1] != first[2]


@pytest.mark.parametrize(("recipe", "batch_size"), [("int:6", 1), ("identity", 2)])
@torch.no_grad()
def test_completions_go_on_from_a_prompt_read_in_chunks(
    llama: Any, tokenizer: Any, recipe: str, batch_size: int
) -> None:
    """Against a plain loop over each prompt; in a batch the shorter ones are padded on the left."""

    def make(mask: Any = None) -> LeanCache:
        return leankv.Cache(llama, recipe, sinks=2, window=4, attention_mask=mask)

    def by_hand(text: str) -> str:
        cache, said = make(), []
        pieces = list(torch.tensor([tokenizer(text)["input_ids"]]).split(CHUNK, dim=1))
        for _ in range(10):
            for piece in pieces:
                logits = llama(input_ids=piece, past_key_values=cache, use_cache=True).logits
            said.append(int(logits[0, -1].argmax()))
            pieces = [torch.tensor([said[-1:]])]
        return str(tokenizer.decode(said, skip_special_tokens=True))

    texts = [tiny.text(40), tiny.text(40, seed=3)[:29]]
    with quietly():
        lm = CacheLM(llama, tokenizer, make, chunk=CHUNK, batch_size=batch_size)
        found = lm.generate_until(
            asked("generate_until", [(text, {"until": ["\0"], "max_gen_toks": 10}) for text in texts])
        )
    assert [text.rstrip("\0") for text in found] == [by_hand(text) for text in texts]


# -- answers are kept -------------------------------------------------------------------------------------------------


def test_what_was_answered_is_not_asked_again(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    passes = 0

    def counted(mask: Any) -> DynamicCache:
        nonlocal passes
        passes += 1
        return DynamicCache(config=llama.config)

    def answers() -> list[Any]:
        lm = CacheLM(llama, tokenizer, counted, responses=Lines(path))
        sampled = {"until": [], "max_gen_toks": 2, "do_sample": True, "temperature": 1.0}
        with quietly():
            return [
                lm.loglikelihood(asked("loglikelihood", QUESTIONS)),
                lm.loglikelihood_rolling(asked("loglikelihood_rolling", [("some text",)])),
                lm.generate_until(asked("generate_until", [("once", {"until": [], "max_gen_toks": 4})])),
                len(lm.generate_until(asked("generate_until", [("once", sampled)]))),
            ]

    first = answers()
    assert passes == len(QUESTIONS) + 3
    lines = path.read_bytes()
    assert answers() == first
    assert passes == len(QUESTIONS) + 4, "only what is drawn at random is asked again"
    assert path.read_bytes() == lines
    path.write_bytes(lines[: lines.rstrip().rfind(b"\n") + 20])  # killed while it wrote the last answer
    assert answers() == first
    assert passes == len(QUESTIONS) + 6
    assert path.read_bytes() == lines


def test_a_file_of_answers_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        Lines(tmp_path / "taken" / "answers.jsonl")


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_ruler_s_tasks_are_drawn_without_a_hub(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel(vocab={"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    (found,) = load_tasks(["ruler_cwe"], [1024], tmp_path, None, seed=0)
    doc = found.task.eval_docs[0]
    assert found.title == "ruler_cwe 1024"
    assert 0.5 * 1024 < len(words.encode(doc["input"])) <= 1024
    assert found.task.process_results(doc, [" ".join(doc["outputs"])])["1024"] == 1


def test_an_unknown_task_is_told_with_the_nearest_names() -> None:
    check_names(OFFLINE_TASKS, OFFLINE_TASKS)
    with pytest.raises(UserError, match=r"knows no task 'niah_singel_1'; did you mean niah_single_1"):
        check_names([*OFFLINE_TASKS, "niah_singel_1"], [*OFFLINE_TASKS, "hellaswag"])
    with pytest.raises(UserError, match="ruler-offline is what needs no hub"):
        check_names(["qqqq"], OFFLINE_TASKS)


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
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, words):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}), encoding="utf-8")
    return folder


FORGETTING = """
import torch
from tests.test_eval_tasks import Forgetting
def make(config):
    return Forgetting(config=config)
"""


def test_base_bundle_and_baselines_stand_side_by_side(
    bundle: Path, ending: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = write_factory(tmp_path, "forgetting_cache", FORGETTING)
    own, out = write_tasks(tmp_path / "own"), tmp_path / "scores"
    command: tuple[object, ...] = (
        *("eval-tasks", "--bundle", bundle, "--model", ending, "--include-path", own),
        *("--tasks", "own_choice,own_words"),
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
    assert [row["score"] for row in printed["tasks"]] == scores["score"].tolist()
    assert about["tasks"] == ["own_choice", "own_words"]
    for _, row in scores.iterrows():
        base = scores[(scores["cache"] == "base") & (scores["task"] == row["task"])].iloc[0]
        assert row["cache"] == "base" or row["difference"] == pytest.approx(row["score"] - base["score"])
    assert agreement["cache"].tolist() == caches[1:]
    assert (agreement["kl"] > 0).all()
    assert agreement["cache_ratio"][0] > 1
    page = (out / "tasks.md").read_text(encoding="utf-8")
    assert "own_choice, acc" in page
    assert "Same top p" in page
    succeed("report", out)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "<h2>Task scores" in html
    assert "own_words, exact_match" in html
    answers = {path: path.read_bytes() for path in (out / "responses").iterdir()}
    assert len(answers) == 3, "one file a cache"
    table = succeed(*command).stdout
    assert max(len(line) for line in table.splitlines() if not line.startswith("written")) <= 100
    assert {path: path.read_bytes() for path in (out / "responses").iterdir()} == answers
    pd.testing.assert_frame_equal(pd.read_csv(out / "tasks.csv"), scores)
    succeed(*command, "--set", "protocol.chunk=5")
    assert len(list((out / "responses").iterdir())) == 6, "what is fed otherwise is answered anew"


METRICS = (("own_choice", "acc"), ("own_words", "exact_match"))


def test_paired_intervals_are_those_of_scipy() -> None:
    from leankv.report.task_scores import paired_interval

    own, base = [1.0, 0.0, 0.5, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0, 0.0]
    expected = stats.ttest_rel(own, base).confidence_interval(0.95)
    assert paired_interval(own, base) == pytest.approx((expected.low, expected.high))
    assert all(value != value for value in paired_interval(base, base)), "no sample differs: nothing is known"
    assert all(value != value for value in paired_interval([(1.0, 2)], [(1.0, 2)])), "not a mean over samples"


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
    assert "the task own_choice cannot be loaded" in refuse(*command, "--include-path", own, "--tasks", "own_choice")

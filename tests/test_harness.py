"""The harness reads the cache that it is given, keeps its answers, and draws RULER's text without a hub."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import wonderwords
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
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
from leankv.storage.lines import Lines
from tests import tiny

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


def asked(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, place) for place, each in enumerate(arguments)]


def stock(model: Any) -> Any:
    return lambda: DynamicCache(config=model.config)


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

    def make() -> LeanCache:
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
    def forgetting() -> Forgetting:
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


@pytest.mark.parametrize(("batch_size", "shorter"), [(1, 11), (2, 11), (2, 0)])
@torch.no_grad()
def test_completions_go_on_from_a_prompt_read_in_chunks(
    llama: Any, tokenizer: Any, batch_size: int, shorter: int
) -> None:
    """Against a plain loop over each prompt; who else is in a batch changes nothing, also where one is shorter."""

    def make() -> LeanCache:
        return leankv.Cache(llama, "int:6", sinks=2, window=4)

    def by_hand(text: str) -> str:
        cache, said = make(), []
        pieces = list(torch.tensor([tokenizer(text)["input_ids"]]).split(CHUNK, dim=1))
        for _ in range(10):
            for piece in pieces:
                logits = llama(input_ids=piece, past_key_values=cache, use_cache=True).logits
            said.append(int(logits[0, -1].argmax()))
            pieces = [torch.tensor([said[-1:]])]
        return str(tokenizer.decode(said, skip_special_tokens=True))

    texts = [tiny.text(40)[:40], tiny.text(40, seed=3)[: 40 - shorter]]
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

    def counted() -> DynamicCache:
        nonlocal passes
        passes += 1
        return DynamicCache(config=llama.config)

    def answers() -> list[Any]:
        lm = CacheLM(llama, tokenizer, counted, responses=Lines(path))
        with quietly():
            return [
                lm.loglikelihood(asked("loglikelihood", QUESTIONS)),
                lm.loglikelihood_rolling(asked("loglikelihood_rolling", [("some text",)])),
                lm.generate_until(asked("generate_until", [("once", {"until": [], "max_gen_toks": 4})] * 2)),
            ]

    first = answers()
    assert passes == len(QUESTIONS) + 3
    lines = path.read_bytes()
    assert answers() == first
    assert passes == len(QUESTIONS) + 3
    assert path.read_bytes() == lines
    for left in (lines.rstrip().rfind(b"\n") + 20, len(lines) - 1):  # killed while it wrote the last answer
        path.write_bytes(lines[:left])
        passes = 0
        assert answers() == first
        assert passes == 2
        assert path.read_bytes() == lines


def test_a_file_of_answers_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        Lines(tmp_path / "taken" / "answers.jsonl")


# -- tasks ------------------------------------------------------------------------------------------------------------


NEEDLES = "lm_eval.tasks.ruler.prepare_niah"


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """RULER sorts all pairs of an adjective and a noun, for ten seconds; here there are few of them."""
    few = wonderwords.RandomWord()
    few._categories["adjectives"] = few._categories["adjectives"][:10]
    monkeypatch.setattr(wonderwords, "RandomWord", lambda: few)
    monkeypatch.delitem(sys.modules, NEEDLES, raising=False)
    yield
    sys.modules.pop(NEEDLES, None)


@pytest.mark.usefixtures("few_words")
@pytest.mark.parametrize("name", ["ruler_cwe", "niah_single_1"])
def test_ruler_s_tasks_are_drawn_without_a_hub(tmp_path: Path, name: str) -> None:
    words = Tokenizer(models.WordLevel(vocab={"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    (found,) = load_tasks([name], [1024], tmp_path, None, seed=0)
    doc = found.task.eval_docs[0]
    assert found.title == f"{name} 1024"
    assert 0.5 * 1024 < len(words.encode(doc["input"])) <= 1024
    assert found.task.process_results(doc, [" ".join(doc["outputs"])])["1024"] == 1


def test_an_unknown_task_is_told_with_the_nearest_names() -> None:
    check_names(OFFLINE_TASKS, OFFLINE_TASKS)
    with pytest.raises(UserError, match=r"knows no task 'niah_singel_1'; did you mean niah_single_1"):
        check_names([*OFFLINE_TASKS, "niah_singel_1"], [*OFFLINE_TASKS, "hellaswag"])
    with pytest.raises(UserError, match="ruler-offline is what needs no hub"):
        check_names(["qqqq"], OFFLINE_TASKS)

"""WikiText-2: its articles, and how its own splits become four."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from leankv.config.experiment import SPLITS
from leankv.data.tokens import SPARE_TOKENS
from leankv.errors import UserError
from tests import tiny
from tests.test_data import refusal, source, tokenizer_with_bos

ARTICLES = {"train": 30, "valid": 2, "test": 12}


def article(split: str, number: int) -> str:
    """Rows as in WikiText's raw files: a heading, paragraphs, a section."""
    one, two = (tiny.text(60, seed=200 * len(split) + 2 * number + part).split("\n")[0] for part in range(2))
    return f" = {split} {number} = \n {one} \n = = Section = = \n = = = Deeper = = = \n {two} "


def articles(split: str) -> list[str]:
    return [article(split, number) for number in range(ARTICLES[split])]


def write_wikitext(folder: Path) -> Path:
    """A small WikiText-2, with blank lines as in its raw files."""
    for split in ARTICLES:
        lines = [" \n" + line + "\n" for document in articles(split) for line in document.split("\n")]
        (folder / f"wiki.{split}.raw").write_text("".join(lines), encoding="utf-8")
    return folder


def n_tokens(documents: list[str]) -> int:
    """Of the tiny tokenizer, which makes a token of each byte."""
    return len("\n".join(documents).encode())


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    return write_wikitext(tmp_path)


@pytest.fixture
def few_are_spent(monkeypatch: pytest.MonkeyPatch) -> int:
    """So many report tokens that small files hold more."""
    monkeypatch.setattr("leankv.data.splits.SPENT_REPORT_TOKENS", 1000)
    return 1000


SMALL = {"block_length": 50, "calibration_blocks": 40, "selection_blocks": 10}


def test_wikitext_documents_are_articles_with_their_sections(wiki: Path) -> None:
    text = source("wikitext-2", wiki)
    assert text.documents("all", tiny.tokenizer()) == articles("train") + articles("valid") + articles("test")


@pytest.mark.parametrize(
    ("row", "begins"),
    [
        (" = B = ", True),
        (" = E = MC2 ( album ) = ", True),
        (" = = Section = = ", False),
        (" = = = = ", False),
        (" = Qualified for the next round ", False),
        (" as x = 3 , y = ", False),
    ],
)
def test_which_rows_begin_an_article(wiki: Path, row: str, begins: bool) -> None:
    (wiki / "wiki.valid.raw").write_text(f" = A = \n text \n{row}\n more \n", encoding="utf-8")
    documents = source("wikitext-2", wiki).documents("all", tiny.tokenizer())[ARTICLES["train"] : -ARTICLES["test"]]
    whole = [" = A = \n text ", f"{row}\n more "]
    assert documents == (whole if begins else ["\n".join(whole)])


@settings(max_examples=30)
@given(
    length=st.integers(2, 80),
    calibration=st.integers(2, 60),
    selection=st.integers(1, 60),
    order=st.permutations(SPLITS),
)
def test_wikitext_splits_never_share_a_document(
    tmp_path_factory: pytest.TempPathFactory, length: int, calibration: int, selection: int, order: list[str]
) -> None:
    text = source(
        "wikitext-2",
        write_wikitext(tmp_path_factory.mktemp("wiki")),
        block_length=length,
        calibration_blocks=calibration,
        selection_blocks=selection,
    )
    own = {split: text.documents(split, tiny.tokenizer()) for split in order}
    fitted, chosen, certified = own["calibration"], own["selection"], own["certification"]
    assert fitted + chosen[ARTICLES["valid"] :] + certified == articles("train")
    assert chosen[: ARTICLES["valid"]] == articles("valid")
    # Documents are counted one by one: the line ends between them may make it one more than it takes.
    assert n_tokens(fitted[:-1]) - len(fitted) < calibration * length + SPARE_TOKENS, "no document more than it takes"
    assert certified == [] or n_tokens(fitted) >= calibration * length
    assert certified == [] or n_tokens(chosen) >= selection * length
    assert len(chosen) == ARTICLES["valid"] or n_tokens(chosen[:-1]) - len(chosen) < selection * length


def test_wikitext_blocks_come_from_the_documents_of_their_split(wiki: Path) -> None:
    text, tokenizer = source("wikitext-2", wiki, **SMALL), tiny.tokenizer()
    for split, count in {"calibration": 40, "selection": 10, "certification": 20}.items():
        whole = tokenizer("\n".join(text.documents(split, tokenizer)))["input_ids"]
        every = [whole[first : first + 50] for first in range(0, len(whole) - 49, 50)]
        places = range(count)
        if split == "selection":
            places = [number * len(every) // count for number in range(count)]
        assert text.blocks(split, tokenizer, count, 50).tokens.tolist() == [every[place] for place in places]


def test_wikitext_calibration_blocks_are_the_beginning_of_the_train_text(wiki: Path) -> None:
    """Whatever is cut behind them; under a tokenizer whose tokens reach across rows too."""
    whole = "\n".join(articles("train"))
    reaching = Tokenizer(models.Unigram([("<unk>", 0.0), (" \n =", -1.0), *((c, -3.0) for c in set(whole))], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=reaching)
    expected = tokenizer(whole)["input_ids"]
    border = len(tokenizer("\n".join(articles("train")[:4]))["input_ids"])
    for length in range(border // 2 - 3, border // 2 + 4):
        text = source("wikitext-2", wiki, block_length=length, calibration_blocks=2)
        assert text.blocks("calibration", tokenizer, 2, length).tokens.flatten().tolist() == expected[: 2 * length]


def test_a_selection_that_validation_holds_takes_nothing_from_train(wiki: Path) -> None:
    text = source("wikitext-2", wiki, block_length=50, calibration_blocks=2, selection_blocks=2)
    assert text.documents("selection", tiny.tokenizer()) == articles("valid")


def test_a_bos_token_leaves_room_for_more_documents(wiki: Path) -> None:
    """Blocks hold fewer tokens of text then, so calibration takes as many documents as those need."""
    own = {"block_length": 2, "calibration_blocks": 1500, "selection_blocks": 1}
    with_bos = source("wikitext-2", wiki, **own).documents("calibration", tokenizer_with_bos())
    assert len(with_bos) < len(source("wikitext-2", wiki, **own).documents("calibration", tiny.tokenizer()))
    assert len(source("wikitext-2", wiki, **own).blocks("calibration", tokenizer_with_bos(), 1500, 2)) == 1500


@pytest.mark.parametrize(("split", "setting"), [("calibration", 40), ("selection", 10)])
def test_more_blocks_than_were_put_aside_are_refused_with_the_setting(wiki: Path, split: str, setting: int) -> None:
    text = source("wikitext-2", wiki, **SMALL)
    with pytest.raises(UserError) as refused:
        text.blocks(split, tiny.tokenizer(), 3 * setting, 50)
    assert f"put aside for {setting} blocks of 50" in str(refused.value)
    assert f"set data.{split}_blocks" in str(refused.value)
    more = {**SMALL, f"{split}_blocks": 3 * setting}
    assert len(source("wikitext-2", wiki, **more).blocks(split, tiny.tokenizer(), 3 * setting, 50)) == 3 * setting


def test_a_certification_split_of_nothing_is_refused_with_the_way_out(wiki: Path) -> None:
    text = source("wikitext-2", wiki, block_length=50, calibration_blocks=1000)
    assert text.documents("certification", tiny.tokenizer()) == []
    with pytest.raises(UserError, match=r"certification split .* has 0 tokens.*lower data\.calibration_blocks"):
        text.blocks("certification", tiny.tokenizer(), 1, 50)


@pytest.mark.parametrize("length", [7, 50])
def test_report_blocks_begin_behind_the_spent_tokens(wiki: Path, few_are_spent: int, length: int) -> None:
    text, whole = source("wikitext-2", wiki), tiny.tokenizer()("\n".join(articles("test")))["input_ids"]
    blocks = text.blocks("report", tiny.tokenizer(), 5, length)
    assert blocks.tokens.flatten().tolist() == whole[few_are_spent : few_are_spent + 5 * length]
    blocks = text.blocks("report", tokenizer_with_bos(), 5, length)
    assert blocks.tokens[:, 1:].flatten().tolist() == whole[few_are_spent : few_are_spent + 5 * (length - 1)]


def test_report_documents_begin_behind_the_spent_tokens(wiki: Path, few_are_spent: int) -> None:
    documents = source("wikitext-2", wiki).documents("report", tiny.tokenizer())
    before = articles("test")[: -len(documents)]
    assert before + documents == articles("test")
    assert n_tokens(before[:-1]) < few_are_spent <= n_tokens(before)


def test_a_report_split_that_is_all_spent_says_so(wiki: Path) -> None:
    with pytest.raises(UserError) as refused:
        source("wikitext-2", wiki).blocks("report", tiny.tokenizer(), 1, 50)
    assert "has 0 tokens behind the first 32768, which are spent" in str(refused.value)
    assert source("wikitext-2", wiki).documents("report", tiny.tokenizer()) == []


@pytest.mark.parametrize("name", ["wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"])
def test_a_wikitext_folder_must_hold_all_three_files_with_text_in_them(tmp_path: Path, name: str) -> None:
    path = write_wikitext(tmp_path) / name
    path.write_text(" \n \n")
    assert f"{path} is empty" in refusal("wikitext-2", tmp_path)
    path.unlink()
    assert str(path) in refusal("wikitext-2", tmp_path)

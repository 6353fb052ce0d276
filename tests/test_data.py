"""Text: sources, the four splits, and blocks."""

import itertools
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from leankv.data import Blocks, TextSource
from leankv.errors import UserError
from leankv.experiment import SPLITS, DataConfig
from tests import tiny

DOCUMENTS = [f"document {number} says {tiny.text(60, seed=number).split(chr(10))[0]}" for number in range(60)]


def source(dataset: Path | str, data_dir: Path | None = None, **changes: int) -> TextSource:
    return TextSource(DataConfig(str(dataset), None if data_dir is None else str(data_dir), **changes))


def text_of(text: TextSource, split: str) -> str:
    """The text of a split of a source whose splits are the same under all tokenizers."""
    return "\n".join(text.documents(split, tokenizer=None))


def write_txt(folder: Path, documents: list[str]) -> Path:
    path = folder / "text.txt"
    path.write_text("\n".join(documents), encoding="utf-8")
    return path


def write_jsonl(folder: Path, documents: list[str]) -> Path:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def write_parquet(folder: Path, documents: list[str]) -> Path:
    path = folder / "text.parquet"
    table = pyarrow.table({"id": [1] * len(documents), "text": pyarrow.array(documents, pyarrow.string())})
    pyarrow.parquet.write_table(table, path)
    return path


WRITERS = {"txt": write_txt, "jsonl": write_jsonl, "parquet": write_parquet}
every_format = pytest.mark.parametrize("kind", list(WRITERS))


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


def tokenizer_with_bos() -> Any:
    """The tiny tokenizer, made to begin each text with a BOS token as Llama's does."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    return tokenizer


# -- splits ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 200), min_size=4, max_size=60))
def test_each_document_is_in_one_split_and_the_order_is_kept(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    documents = [f"{number}:{'x' * length}" for number, length in enumerate(lengths)]
    path = write_txt(tmp_path_factory.mktemp("data"), documents)
    try:
        text = source(path)
    except UserError as error:
        assume("too short" not in str(error))
        raise
    splits = [text_of(text, split).split("\n") for split in SPLITS]
    assert all(splits)
    assert list(itertools.chain(*splits)) == documents
    assert text_of(text, "all") == "\n".join(documents)


def test_the_cut_is_50_10_30_10_to_the_nearest_document(tmp_path: Path) -> None:
    documents = ["x" * 99 for _ in range(50)]
    text = source(write_txt(tmp_path, documents))
    assert [len(text_of(text, split).split("\n")) for split in SPLITS] == [25, 5, 15, 5]


@every_format
def test_formats_give_the_same_text(tmp_path: Path, kind: str) -> None:
    text = source(WRITERS[kind](tmp_path, DOCUMENTS))
    assert text_of(text, "all") == "\n".join(DOCUMENTS)
    expected = source(write_txt(tmp_path, DOCUMENTS))
    assert all(text_of(text, split) == text_of(expected, split) for split in SPLITS)


@every_format
def test_blank_documents_do_not_count(tmp_path: Path, kind: str) -> None:
    with_blanks = [piece for document in DOCUMENTS for piece in (document, "", "   ")]
    assert text_of(source(WRITERS[kind](tmp_path, with_blanks)), "all") == "\n".join(DOCUMENTS)


def test_a_row_of_several_lines_is_one_document(tmp_path: Path) -> None:
    documents = ["\n".join(DOCUMENTS[start : start + 6]) for start in range(0, 60, 6)]
    text = source(write_jsonl(tmp_path, documents))
    assert [len(text_of(text, split).split("\n")) for split in SPLITS] == [30, 6, 18, 6]


def test_text_that_is_not_english_survives(tmp_path: Path) -> None:
    documents = [f"{number} – naïve 日本語 \u2028 🙂" for number in range(20)]
    for write in WRITERS.values():
        assert text_of(source(write(tmp_path, documents)), "all") == "\n".join(documents)


@pytest.mark.skipif(find_spec("gensim") is None, reason="gensim is not installed")
def test_the_wikipedia_sample_is_plain_english_in_four_splits() -> None:
    text = source("wikipedia-sample")
    texts = [text_of(text, split) for split in SPLITS]
    assert sum(map(len, texts)) > 2_000_000
    assert all(len(own) > 200_000 for own in texts)
    for own in texts:
        assert " the " in own
        assert "''" not in own
        assert "\n\n" not in own
        assert own.count("[[") + own.count("{{") < len(own) / 10_000, "wiki markup is left"


# -- WikiText-2 ------------------------------------------------------------------------------------------------------


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    return write_wikitext(tmp_path)


@pytest.fixture
def few_are_spent(monkeypatch: pytest.MonkeyPatch) -> int:
    """So many report tokens that small files hold more."""
    monkeypatch.setattr("leankv.data.SPENT_REPORT_TOKENS", 1000)
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


@settings(max_examples=30, deadline=None)
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
    assert n_tokens(fitted[:-1]) < calibration * length + 64, "no document more than it takes"
    assert certified == [] or n_tokens(fitted) >= calibration * length
    assert certified == [] or n_tokens(chosen) >= selection * length
    assert len(chosen) == ARTICLES["valid"] or n_tokens(chosen[:-1]) < selection * length


def test_wikitext_blocks_come_from_the_documents_of_their_split(wiki: Path) -> None:
    text, tokenizer = source("wikitext-2", wiki, **SMALL), tiny.tokenizer()
    for split, count in {"calibration": 40, "selection": 10, "certification": 20}.items():
        whole = tokenizer("\n".join(text.documents(split, tokenizer)))["input_ids"]
        assert text.blocks(split, tokenizer, count, 50).tokens.flatten().tolist() == whole[: 50 * count]


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


# -- blocks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> TextSource:
    return source(write_txt(tmp_path, DOCUMENTS))


@pytest.mark.parametrize(("n_blocks", "length"), [(1, 2), (3, 16), (5, 33)])
def test_blocks_are_the_text_in_order(text: TextSource, n_blocks: int, length: int) -> None:
    tokenizer = tiny.tokenizer()
    for split in SPLITS:
        blocks = text.blocks(split, tokenizer, n_blocks, length)
        assert (len(blocks), blocks.split, blocks.source) == (n_blocks, split, text.name)
        assert blocks.tokens.shape == (n_blocks, length)
        assert blocks.tokens.dtype == torch.int64
        whole = tokenizer(text_of(text, split))["input_ids"]
        assert blocks.tokens.flatten().tolist() == whole[: n_blocks * length]


@given(few=st.integers(1, 4), more=st.integers(0, 4), length=st.integers(2, 40))
@settings(max_examples=20, deadline=None)
def test_fewer_blocks_are_the_first_of_more(
    tmp_path_factory: pytest.TempPathFactory, few: int, more: int, length: int
) -> None:
    text = source(write_txt(tmp_path_factory.mktemp("data"), DOCUMENTS))
    tokenizer = tiny.tokenizer()
    longer = text.blocks("calibration", tokenizer, few + more, length)
    assert torch.equal(text.blocks("calibration", tokenizer, few, length).tokens, longer.tokens[:few])


def test_blocks_do_not_depend_on_how_long_tokens_are(tmp_path: Path) -> None:
    """Of a long text only the beginning is tokenized; words of 30 letters a token must not make that too short."""
    words = [letter * 30 for letter in "abcdefghij"]
    vocabulary = {"[UNK]": 0, **{word: index + 1 for index, word in enumerate(words)}}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")
    text = source(write_txt(tmp_path, [" ".join(words)] * 100))
    blocks = text.blocks("calibration", tokenizer, 3, 20)
    assert blocks.tokens.flatten().tolist() == list(range(1, 11)) * 6


def test_all_splits_together_are_one_text(text: TextSource) -> None:
    blocks = text.blocks("all", tiny.tokenizer(), 2, 10)
    assert blocks.split == "all"
    assert torch.equal(blocks.tokens, text.blocks("calibration", tiny.tokenizer(), 2, 10).tokens)


def test_a_tokenizer_that_begins_with_bos_has_it_begin_every_block(text: TextSource) -> None:
    tokenizer = tokenizer_with_bos()
    blocks = text.blocks("report", tokenizer, 4, 12)
    assert blocks.tokens.shape == (4, 12)
    assert blocks.tokens[:, 0].tolist() == [tokenizer.bos_token_id] * 4
    whole = tiny.tokenizer()(text_of(text, "report"))["input_ids"]
    assert blocks.tokens[:, 1:].flatten().tolist() == whole[: 4 * 11]


def test_a_bos_token_that_the_tokenizer_does_not_put_is_not_put(text: TextSource) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    blocks = text.blocks("report", tokenizer, 4, 12)
    assert not (blocks.tokens == tokenizer.bos_token_id).any()


def test_the_hash_changes_with_any_token_and_with_the_shape() -> None:
    tokens = tiny.tokens(3, 8)
    hashes = {Blocks(tokens, "report", "a").hash}
    for row in range(3):
        for column in range(8):
            other = tokens.clone()
            other[row, column] += 1
            hashes.add(Blocks(other, "report", "a").hash)
    hashes.add(Blocks(tokens.reshape(6, 4), "report", "a").hash)
    assert len(hashes) == 1 + 24 + 1


def test_the_hash_is_of_the_tokens_not_of_the_memory() -> None:
    tokens = tiny.tokens(6, 8)
    strided = Blocks(tokens[::2, ::2], "report", "a")
    assert strided.hash == Blocks(tokens[::2, ::2].clone(), "selection", "b").hash


def test_all_tokens_of_a_split_can_be_had_and_not_one_more(text: TextSource) -> None:
    tokens = len(tiny.tokenizer()(text_of(text, "report"))["input_ids"])
    assert len(text.blocks("report", tiny.tokenizer(), tokens // 7, 7)) == tokens // 7
    with pytest.raises(UserError) as refused:
        text.blocks("report", tiny.tokenizer(), math.ceil((tokens + 1) / 7), 7)
    sentence = str(refused.value)
    assert f"has {tokens} tokens" in sentence
    assert "report split" in sentence
    assert "data.report_blocks" in sentence


# -- what is refused -------------------------------------------------------------------------------------------------


def refusal(dataset: Path | str, data_dir: Path | None = None) -> str:
    """The sentence that a user reads."""
    with pytest.raises(UserError) as refused:
        source(dataset, data_dir)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", ["wikitext-3", "text.csv", "text"])
def test_an_unknown_data_set_is_answered_with_those_that_there_are(name: str) -> None:
    sentence = refusal(name)
    assert repr(name) in sentence
    assert "wikitext-2, wikipedia-sample" in sentence


@every_format
def test_a_missing_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"missing.{kind}"
    assert f"{path} does not exist" in refusal(path)


@every_format
@pytest.mark.parametrize("documents", [[], ["", "  "]], ids=["nothing", "blanks"])
def test_a_file_without_text_is_named(tmp_path: Path, kind: str, documents: list[str]) -> None:
    path = WRITERS[kind](tmp_path, documents)
    assert f"{path} holds no text" in refusal(path)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"latin.{kind}"
    path.write_bytes(b"plain text, then \xe9")
    sentence = refusal(path)
    assert f"{path} is not UTF-8" in sentence
    assert "byte 17" in sentence


@pytest.mark.parametrize(
    "row", ["{", "text", '{"body": "x"}', '"text"', "[1]", "3", "null", '{"text": 3}', '{"text": null}', "  "]
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, row: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{row}\n')
    assert f"{path}, line 3: " in refusal(path)


def test_a_parquet_file_without_a_text_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    sentence = refusal(path)
    assert str(path) in sentence
    assert "`text`" in sentence


def test_a_parquet_file_whose_text_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "numbers.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": list(range(100))}), path)
    assert str(path) in refusal(path)


def test_a_file_that_only_calls_itself_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fake.parquet"
    path.write_bytes(b"not parquet")
    assert str(path) in refusal(path)


@every_format
@pytest.mark.parametrize("count", [1, 3])
def test_too_few_documents_for_four_splits(tmp_path: Path, kind: str, count: int) -> None:
    path = WRITERS[kind](tmp_path, ["some text"] * count)
    sentence = refusal(path)
    assert "too short for four splits" in sentence
    assert f"{count} documents" in sentence


@pytest.mark.parametrize("name", ["wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"])
def test_a_wikitext_folder_must_hold_all_three_files_with_text_in_them(tmp_path: Path, name: str) -> None:
    path = write_wikitext(tmp_path) / name
    path.write_text(" \n \n")
    assert f"{path} is empty" in refusal("wikitext-2", tmp_path)
    path.unlink()
    assert str(path) in refusal("wikitext-2", tmp_path)

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

from leankv.config.experiment import SPLITS, DataConfig
from leankv.data.blocks import Blocks
from leankv.data.splits import TextSource
from leankv.errors import UserError
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


@settings(max_examples=50)
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
        if split == "selection":
            every = torch.tensor(whole[: len(whole) // length * length]).reshape(-1, length)
            spread = [number * len(every) // n_blocks for number in range(n_blocks)]
            assert torch.equal(blocks.tokens, every[spread])
        else:
            assert blocks.tokens.flatten().tolist() == whole[: n_blocks * length]


def test_selection_blocks_are_spread_over_their_split(text: TextSource) -> None:
    """From its beginning to within one stride of its end."""
    tokenizer = tiny.tokenizer()
    whole = tokenizer(text_of(text, "selection"))["input_ids"]
    blocks = text.blocks("selection", tokenizer, 4, 8).tokens.tolist()
    places = [next(at for at in range(0, len(whole), 8) if whole[at : at + 8] == block) for block in blocks]
    assert places[0] == 0
    assert places[-1] >= len(whole) * 3 // 4 - 16


@given(few=st.integers(1, 4), more=st.integers(0, 4), length=st.integers(2, 40))
@settings(max_examples=20)
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

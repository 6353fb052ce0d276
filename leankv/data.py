"""Text: sources, the three splits, and blocks of tokens.

Codecs are fitted on the *calibration* split, plans are chosen on *selection*, results are reported on *report*. A
source with splits of its own (WikiText-2) keeps them: train, validation, test. Any other is cut at document borders, in
order: 80 % calibration, 10 % selection, 10 % report. So the three never overlap.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from leankv.errors import UserError
from leankv.experiment import SPLITS, DataConfig

CALIBRATION_SHARE, SELECTION_SHARE = 0.8, 0.1  # assumption: as most text sets are cut
CHARACTERS_PER_TOKEN = 8  # assumption: more than English text needs; doubled until there are tokens enough
WIKIPEDIA_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SHORTEST_ARTICLE = 2000  # characters; leaves redirects and stubs out


@dataclass(frozen=True)
class Blocks:
    """Blocks of tokens from one split.

    Attributes:
        tokens: `[blocks, block_length]` token ids (int64, CPU).
        split: where they come from: a name in `SPLITS`, or `all`.
        source: the data set's name, for people.
    """

    tokens: torch.Tensor
    split: str
    source: str

    @property
    def hash(self) -> str:
        """sha256 (hex) of the token ids: what a result that used these blocks depends on."""
        shape = str(tuple(self.tokens.shape)).encode()
        return hashlib.sha256(shape + self.tokens.contiguous().numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, numbers: Sequence[int]) -> "Blocks":
        """Some of these blocks, in the order of `numbers`."""
        return Blocks(self.tokens[list(numbers)], self.split, self.source)


class TextSource:
    """The text of a data set, by split.

    Raises:
        UserError: the data set is unknown, missing, empty, unreadable, or too short for three splits.
    """

    def __init__(self, config: DataConfig):
        self.name = config.dataset
        if config.dataset == "wikitext-2":
            self._texts = _wikitext(config.data_dir)
        elif config.dataset == "wikipedia-sample":
            self._texts = _cut(_wikipedia_sample(), config.dataset)
        else:
            self._texts = _cut(_local_documents(Path(config.dataset)), config.dataset)

    def text(self, split: str) -> str:
        """The text of a split, or of `all` three in order."""
        if split == "all":
            return "\n".join(self._texts[name] for name in SPLITS)
        return self._texts[split]

    def blocks(self, split: str, tokenizer: Any, n_blocks: int, block_length: int) -> Blocks:
        """The first `n_blocks` blocks of a split, each `block_length` tokens.

        The text is tokenized as one stream. A tokenizer that begins a sequence with its BOS token (Llama, Gemma) has it
        begin every block, since a block is a sequence of its own to the model.

        Raises:
            UserError: the split holds fewer tokens.
        """
        bos = _bos_tokens(tokenizer)
        body = block_length - len(bos)
        wanted = n_blocks * body
        text = self.text(split)
        length = wanted * CHARACTERS_PER_TOKEN
        while True:
            # A token cut in two at the end of the piece must not be among those used, hence the spare ones.
            ids = tokenizer(text[:length], add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= wanted + 64 or length >= len(text):
                break
            length *= 2
        if len(ids) < wanted:
            raise UserError(
                f"the {split} split of {self.name} has {len(ids)} tokens, but {n_blocks} blocks of {block_length} need "
                f"{wanted}; ask for fewer or shorter blocks (data.{split}_blocks, --block-length) or give more text"
            )
        tokens = torch.tensor(ids[:wanted], dtype=torch.int64).reshape(n_blocks, body)
        if bos:
            tokens = torch.cat([torch.tensor(bos).expand(n_blocks, -1), tokens], dim=1)
        return Blocks(tokens, split, self.name)


def _bos_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: its BOS token, or nothing."""
    bos = tokenizer.bos_token_id
    probe = tokenizer("a")["input_ids"]
    return [bos] if bos is not None and probe and probe[0] == bos else []


def _cut(documents: list[str], name: str) -> dict[str, str]:
    """Cut documents into the three splits at the document borders nearest to 80 % and 90 % of the characters."""
    documents = [stripped for document in documents if (stripped := document.strip())]
    if not documents:
        raise UserError(f"{name} holds no text; give a file with text in it")
    total = sum(len(document) for document in documents)
    ends = (CALIBRATION_SHARE * total, (CALIBRATION_SHARE + SELECTION_SHARE) * total)
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    before = 0
    for document in documents:
        middle = before + len(document) / 2
        parts[SPLITS[sum(middle > end for end in ends)]].append(document)
        before += len(document)
    if empty := [split for split in SPLITS if not parts[split]]:
        raise UserError(
            f"{name} is too short for three splits: {len(documents)} documents leave none for {' and '.join(empty)}; "
            "give a text with more paragraphs"
        )
    return {split: "\n".join(own) for split, own in parts.items()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error


def _join_rows(rows: Iterable[str]) -> str:
    """WikiText rows as one text, the same whether they come from the hub or from files: blank ones dropped."""
    return "\n".join(row.rstrip("\n") for row in rows if row.strip())


def _wikitext(data_dir: str | None) -> dict[str, str]:
    """WikiText-2 raw (Merity et al., 2016), from files or from the hub."""
    if data_dir is not None:
        files = dict(zip(SPLITS, ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"), strict=True))
        texts = {split: _join_rows(_read_text(Path(data_dir) / name).split("\n")) for split, name in files.items()}
        if empty := [split for split, text in texts.items() if not text]:
            raise UserError(f"{Path(data_dir) / files[empty[0]]} is empty; put WikiText-2's raw files there")
        return texts
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what becomes of them is said below
    try:
        loaded = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
    except Exception as error:  # `datasets` raises a dozen unrelated types for "cannot be reached"
        raise UserError(
            f"WikiText-2 could not be fetched from the hub ({type(error).__name__}); give --data-dir with "
            "wiki.train.raw, wiki.valid.raw and wiki.test.raw, or use --dataset wikipedia-sample"
        ) from error
    return {
        split: _join_rows(loaded[theirs]["text"])
        for split, theirs in zip(SPLITS, ("train", "validation", "test"), strict=True)
    }


def _wikipedia_sample() -> list[str]:
    """The articles of gensim's packaged English Wikipedia extract, as plain text."""
    spec = find_spec("gensim")
    if spec is None or spec.origin is None:
        raise UserError("--dataset wikipedia-sample needs gensim; run: pip install 'leankv[wikipedia]'")
    path = Path(spec.origin).parent / "test" / "test_data" / WIKIPEDIA_FILE
    if not path.exists():
        raise UserError(f"this gensim comes without {WIKIPEDIA_FILE}; install gensim 4.3 or 4.4")
    import bz2

    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    with bz2.open(path, "rt", encoding="utf-8") as file:
        articles = (_tidy(filter_wiki(text)) for _title, text, _id in extract_pages(file, filter_namespaces=("0",)))
        return [article for article in articles if len(article) > SHORTEST_ARTICLE]


def _tidy(article: str) -> str:
    """Drop the blank lines and the quote marks of wiki emphasis that gensim's filter leaves."""
    return "\n".join(line.replace("'''", "").replace("''", "") for line in article.split("\n") if line.strip())


def _local_documents(path: Path) -> list[str]:
    """The documents of a local file: paragraphs of a .txt, rows of a .jsonl or .parquet (their `text` column)."""
    if path.suffix not in (".txt", ".jsonl", ".parquet"):
        raise UserError(
            f"unknown data set {str(path)!r}; use wikitext-2, wikipedia-sample, or a .txt, .jsonl or .parquet file"
        )
    if not path.is_file():
        raise UserError(f"the data file {path} does not exist; check --dataset")
    if path.suffix == ".txt":
        return _read_text(path).split("\n")
    if path.suffix == ".jsonl":
        return [_row_text(line, path, number) for number, line in enumerate(_read_text(path).split("\n"), 1) if line]
    import pyarrow
    import pyarrow.parquet

    try:
        column = pyarrow.parquet.read_table(path, columns=["text"])["text"]
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path} is not a parquet file with a `text` column; give one that is") from error
    rows = [value for value in column.to_pylist() if value is not None]
    if not all(isinstance(row, str) for row in rows):
        raise UserError(f"the `text` column of {path} holds no strings; give a file whose `text` column is text")
    return rows


def _row_text(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise UserError(f"{path}, line {number}: not a JSON object with a `text` key") from error
    if not isinstance(text, str):
        raise UserError(f"{path}, line {number}: `text` is not a string")
    return text

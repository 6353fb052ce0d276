"""Where text comes from: WikiText-2, the Wikipedia sample, local files. Each is read as a list of documents."""

import json
import logging
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from leankv.errors import UserError

WIKIPEDIA_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

SHORTEST_ARTICLE = 2000  # characters; leaves redirects and stubs out

WIKITEXT_SPLITS = ("train", "validation", "test")  # its own names for them

TITLE = re.compile(r" = [^=\s](.*[^=\s])? = ")  # an article's heading; a section's is ` = = Section = = `


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error


def _rows(rows: Iterable[str]) -> list[str]:
    """WikiText rows, the same whether they come from the hub or from files: blank ones dropped."""
    return [row.rstrip("\n") for row in rows if row.strip()]


def _articles(rows: Iterable[str]) -> list[str]:
    """WikiText rows as articles, each from its heading to the next one's; rows before the first go with the first.

    Few rows of tables look like headings (` = Position ; GP = ` in a team's season) and begin an article too.
    """
    articles: list[list[str]] = []
    for row in rows:
        if not articles or TITLE.fullmatch(row):
            articles.append([])
        articles[-1].append(row)
    return ["\n".join(article) for article in articles]


def wikitext(data_dir: str | None) -> dict[str, list[str]]:
    """The articles of WikiText-2 raw (Merity et al., 2016, arXiv 1609.07843), from files or from the hub.

    Returns:
        A name in `WIKITEXT_SPLITS` -> articles, whose rows joined by line ends are the split's text.

    Raises:
        UserError: a file is missing or empty, or the hub cannot be reached.
    """
    if data_dir is not None:
        files = dict(zip(WIKITEXT_SPLITS, ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"), strict=True))
        rows = {split: _rows(_read_text(Path(data_dir) / name).split("\n")) for split, name in files.items()}
        if empty := [split for split, own in rows.items() if not own]:
            raise UserError(f"{Path(data_dir) / files[empty[0]]} is empty; put WikiText-2's raw files there")
        return {split: _articles(own) for split, own in rows.items()}
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
    return {split: _articles(_rows(loaded[split]["text"])) for split in WIKITEXT_SPLITS}


def wikipedia_sample() -> list[str]:
    """The articles of gensim's packaged English Wikipedia extract, as plain text.

    Raises:
        UserError: gensim is not installed, or comes without it.
    """
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


def local_documents(path: Path) -> list[str]:
    """The documents of a local file: paragraphs of a .txt, rows of a .jsonl or .parquet (their `text` column).

    Raises:
        UserError: the file is of another kind, missing, or not what its name says.
    """
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

"""Text: the four splits of a data set, and blocks of tokens.

Codecs are fitted on the *calibration* split, whatever is chosen is chosen on *selection*, a budget is proved on
*certification*, document by document, and results are reported on *report*. The four never overlap in one experiment,
and are determined by its `DataConfig` and the tokenizer alone.

WikiText-2 has splits of its own. Its test split is for reports, without the tokens that LeanKV was developed on. Its
train split is cut at borders of documents: as many documents as hold the calibration blocks asked for; then as many as
selection wants beyond the validation split; what is left is for certification. Any other source is cut at document
borders, in order, by shares of its characters.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leankv.config.experiment import SPLITS, DataConfig
from leankv.data.blocks import Blocks
from leankv.data.sources import local_documents, wikipedia_sample, wikitext
from leankv.data.tokens import SPARE_TOKENS, bos_tokens, first_tokens, in_blocks, tokens_of
from leankv.errors import UserError

SHARES = {"calibration": 0.5, "selection": 0.1, "certification": 0.3, "report": 0.1}
"""Of the characters of a source without splits of its own. Assumption: a certificate needs tens of documents, fitting
gains little from more text than half."""

SPENT_REPORT_TOKENS = 32 * 1024
"""Tokens at the beginning of WikiText-2's test split that nothing is reported on: LeanKV's settings were developed with
results on its first 32 blocks of 1,024 tokens in view."""


class TextSource:
    """The text of a data set, by split.

    Args:
        config: which data set, and how much of it is whose.
        selection_length: tokens in a block of selection text; `config.block_length` unless given.

    Raises:
        UserError: the data set is unknown, missing, empty, unreadable, or too short for four splits.
    """

    def __init__(self, config: DataConfig, selection_length: int | None = None):
        self.name = config.dataset
        self._config = config
        self._selection_length = selection_length or config.block_length
        self._own: dict[str, list[str]] = {}
        self._cut: dict[str, list[str]] = {}
        if config.dataset == "wikitext-2":
            self._own = wikitext(config.data_dir)
        elif config.dataset == "wikipedia-sample":
            self._cut = _cut(wikipedia_sample(), config.dataset)
        else:
            self._cut = _cut(local_documents(Path(config.dataset)), config.dataset)

    def documents(self, split: str, tokenizer: Any) -> list[str]:
        """The texts of a split's documents, in order; none where nothing is left for it.

        Args:
            split: a name in `SPLITS`, or `all`: everything, unsplit.
            tokenizer: counts the tokens that decide which documents of WikiText-2 are whose. Its report documents are
                those that begin behind the spent tokens.
        """
        if split == "all":
            return [document for own in (self._own or self._cut).values() for document in own]
        if self._cut:
            return self._cut[split]
        if split == "report":
            test = self._own["test"]
            return test[documents_with(SPENT_REPORT_TOKENS, test, tokenizer) :]
        train, validation, data = self._own["train"], self._own["validation"], self._config
        n_bos = len(bos_tokens(tokenizer))
        # Spare ones, so that no token of the blocks is another for the text's being cut behind them.
        fitted = documents_with(data.calibration_blocks * (data.block_length - n_bos) + SPARE_TOKENS, train, tokenizer)
        if split == "calibration":
            return train[:fitted]
        left = train[fitted:]
        chosen_on = data.selection_blocks * (self._selection_length - n_bos)
        wanted = documents_with(chosen_on, validation + left, tokenizer)
        chosen_by = max(0, wanted - len(validation))
        return validation + left[:chosen_by] if split == "selection" else left[chosen_by:]

    def blocks(self, split: str, tokenizer: Any, n_blocks: int, block_length: int) -> Blocks:
        """`n_blocks` blocks of a split, each `block_length` tokens: the first ones; of selection text, spread over it.

        The text is tokenized as one stream; `leankv.data.tokens` says where a BOS token stands. Neighbouring blocks are
        often of one article, so what is chosen by a few of them suits that article.

        Raises:
            UserError: the split holds fewer tokens.
        """
        bos = bos_tokens(tokenizer)
        body = block_length - len(bos)
        wanted = n_blocks * body
        spent = SPENT_REPORT_TOKENS if self._own and split == "report" else 0
        documents = self._own["test"] if spent else self.documents(split, tokenizer)
        text = "\n".join(documents)
        spread = split == "selection"
        ids = (tokens_of(text, tokenizer) if spread else first_tokens(text, tokenizer, spent + wanted))[spent:]
        if len(ids) < wanted:
            raise UserError(self._too_short(split, len(ids), n_blocks, block_length, wanted))
        if not spread:
            return Blocks(in_blocks(ids[:wanted], bos, block_length), split, self.name)
        every = in_blocks(ids, bos, block_length)
        return Blocks(every, split, self.name).take([number * len(every) // n_blocks for number in range(n_blocks)])

    def _too_short(self, split: str, tokens: int, n_blocks: int, block_length: int, wanted: int) -> str:
        """What a split lacks, and the way out."""
        has = f"the {split} split of {self.name} has {tokens} tokens"
        if self._own and split == "report":
            has += f" behind the first {SPENT_REPORT_TOKENS}, which are spent"
        needs = f"{n_blocks} blocks of {block_length} need {wanted}"
        setting = f"data.{split}_blocks"
        if self._own and split in ("calibration", "selection"):
            given = getattr(self._config, f"{split}_blocks")
            length = self._config.block_length if split == "calibration" else self._selection_length
            if n_blocks * block_length > given * length:
                return (
                    f"{has}, put aside for {given} blocks of {length}, but {needs}; set {setting} "
                    "to as many as you ask for, so that no other split takes their text"
                )
        way_out = f"ask for fewer or shorter blocks ({setting}, --block-length) or give more text"
        if self._own and split == "certification":
            way_out = f"lower data.calibration_blocks, whose text comes first, or {way_out}"
        return f"{has}, but {needs}; {way_out}"


def documents_with(tokens: int, documents: Sequence[str], tokenizer: Any) -> int:
    """How many of the first documents hold `tokens` tokens when they are read as one text; all if they hold fewer."""
    # Documents one by one give nearly as many tokens as their text, so little is tokenized that is not wanted.
    count = found = 0
    while count < len(documents) and found < tokens:
        found += len(tokens_of(documents[count], tokenizer))
        count += 1
    while count < len(documents) and len(tokens_of("\n".join(documents[:count]), tokenizer)) < tokens:
        count += 1
    return count


def _cut(documents: list[str], name: str) -> dict[str, list[str]]:
    """Cut documents into the four splits, at the document borders nearest to `SHARES` of the characters."""
    documents = [stripped for document in documents if (stripped := document.strip())]
    if not documents:
        raise UserError(f"{name} holds no text; give a file with text in it")
    total = sum(len(document) for document in documents)
    ends = [total * sum(list(SHARES.values())[: count + 1]) for count in range(len(SPLITS) - 1)]
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    before = 0
    for document in documents:
        middle = before + len(document) / 2
        parts[SPLITS[sum(middle > end for end in ends)]].append(document)
        before += len(document)
    if empty := [split for split in SPLITS if not parts[split]]:
        raise UserError(
            f"{name} is too short for four splits: {len(documents)} documents leave none for {' and '.join(empty)}; "
            "give a text with more paragraphs"
        )
    return parts

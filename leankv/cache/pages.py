"""Pages: the codes of 256 tokens of a prompt, and what they follow, so that prompts that begin alike share pages.

A page is named by a hash of its tokens and of the name of the page before it; the first follows a hash of all that its
codes depend on. So a name stands for a whole prefix. A page holds codes of all its tokens (sinks aside, and layers
that the bundle leaves exact): there is no exact window inside a stored prefix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leankv.cache.bundle import Bundle
from leankv.cache.contents import DamagedError, Held, Sealed, sealed_in, tensors_of
from leankv.cache.part_store import cut, overlap
from leankv.cache.saved_cache import check_origin, rooms_of
from leankv.cache.tensor_file import read_about, read_tensors, write_tensors
from leankv.errors import UserError
from leankv.storage.files import hash_of

PAGE_FORMAT = 1

PAGE = 256
"""Tokens of a page."""

WHAT, WAY_OUT = "the page", "it is left out, and computed again"


@dataclass(frozen=True)
class About:
    """What a page says of itself.

    Attributes:
        number: how many pages are before it.
        parent: name of the page before it, or of what it all depends on.
        is_exact: whether its tokens were computed exactly, before they were coded; not through codes of others.
        title: what its prompt was called when it was added.
    """

    number: int
    parent: str
    is_exact: bool
    title: str


def root_of(bundle: Bundle) -> str:
    """What the name of every first page follows."""
    made_of = [PAGE_FORMAT, PAGE, bundle.checksum, bundle.made_for["fingerprint"], bundle.sinks]
    return hash_of(made_of)


def names_of(root: str, tokens: Sequence[int]) -> list[str]:
    """The names of all whole pages of some tokens, each with the one before it in front: root and first, and so on."""
    names = [root]
    for first in range(0, len(tokens) - PAGE + 1, PAGE):
        names.append(hash_of([names[-1], list(tokens[first : first + PAGE])]))
    return names


def write_page(path: Path, about: About, held: Mapping[str, Held], bundle: Bundle) -> None:
    """Write what stores hold of one page's tokens.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    codecs = {f"{site.layer}.{site.part}": codec for site, codec in bundle.plan.items()}
    tensors, streams = tensors_of(held, codecs)
    table = {
        "format": PAGE_FORMAT,
        "codecs": bundle.checksum,
        "model": bundle.made_for["fingerprint"],
        "number": about.number,
        "parent": about.parent,
        "exact": about.is_exact,
        "title": about.title,
        "streams": streams,
    }
    write_tensors(path, tensors, table)


def read_page(path: Path, number: int, parent: str, bundle: Bundle) -> dict[str, Sealed]:
    """What stores hold of the page that follows `parent`, not yet decoded: `opened` decodes all pages together.

    Raises:
        UserError: it is damaged, or another page than it should be.
    """
    tensors, table = read_tensors(path, WHAT, WAY_OUT)
    try:
        about = _about(table)
        check_origin(path, WHAT, table, bundle)
        if (about.number, about.parent) != (number, parent):
            raise DamagedError("it is another page than its name says")
        rooms = rooms_of(bundle, bundle.sinks if number == 0 else 0)
        sealed = sealed_in(tensors, table["streams"], rooms, 1)
        for name, own in sealed.items():
            if own.length != PAGE or (rooms[name].codec is not None and own.window is not None):
                raise DamagedError(f"{name} holds {own.length} tokens of {PAGE}, or exact ones among them")
    except DamagedError as error:
        raise UserError(f"{WHAT} {path} cannot be: {error}; {WAY_OUT}") from error
    return sealed


def about_page(path: Path) -> About:
    """What a page says of itself; its codes are not read.

    Raises:
        UserError: it is cut off, or no page.
    """
    return _about_of(path, read_about(path, WHAT, WAY_OUT))


def checked_page(path: Path) -> About:
    """The same, of a page that was read whole.

    Raises:
        UserError: something in it is not as it was written.
    """
    return _about_of(path, read_tensors(path, WHAT, WAY_OUT)[1])


def _about_of(path: Path, table: Mapping[str, Any]) -> About:
    try:
        return _about(table)
    except DamagedError as error:
        raise UserError(f"{WHAT} {path} cannot be: {error}; {WAY_OUT}") from error


def _about(table: Mapping[str, Any]) -> About:
    if table.get("format") != PAGE_FORMAT:
        raise DamagedError(f"its format is {table.get('format')!r}, and this version reads {PAGE_FORMAT}")
    kinds = {"number": int, "parent": str, "exact": bool, "title": str, "streams": dict}
    for name, kind in kinds.items():
        if type(table.get(name)) is not kind:
            raise DamagedError(f"its {name} is {table.get(name)!r}")
    return About(table["number"], table["parent"], table["exact"], table["title"])


def part_of(held: Held, first: int, last: int) -> Held:
    """Tokens `first` to `last` of those that a store holds, copied."""
    sinks = 0 if held.sinks is None else held.sinks.shape[2]
    coded = 0 if held.code is None else held.code.shape[1]
    code_first, code_last = overlap(first - sinks, last - sinks, coded)
    return Held(
        cut(held.sinks, first, last),
        held.code.narrow(code_first, code_last).clone() if held.code is not None and code_last > code_first else None,
        cut(held.window, first - sinks - coded, last - sinks - coded),
    )

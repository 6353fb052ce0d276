"""A prefix store: prompts kept on disk as codes, so that whoever begins alike need not compute it again.

    store = leankv.PrefixStore("prefixes", bundle, model, max_bytes=10**9)
    store.add(system_prompt_ids)                       # computed exactly once, coded whole
    cache = store.cache_for(ids)                       # holds the longest stored prefix of them
    model.generate(ids, past_key_values=cache)         # computes the rest

What a stored prefix costs in quality is what the protocol `prefix` measures (`leankv.evaluation.perplexity`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int

from leankv.cache.bundle import Bundle
from leankv.cache.contents import DamagedError, Held, Sealed, held_by, opened
from leankv.cache.lean_cache import LeanCache
from leankv.cache.pages import PAGE, About, about_page, checked_page, names_of, part_of, read_page, root_of, write_page
from leankv.cache.part_store import UNBOUNDED
from leankv.cache.saved_cache import fill, forget_unseen, rooms_of
from leankv.cache.tensor_file import UnreadableError
from leankv.errors import UserError
from leankv.evaluation.exact_prefixes import ExactPrefixes
from leankv.models.structure import max_positions
from leankv.storage.files import check_output_dir
from leankv.storage.memory_budget import MemoryBudget
from leankv.storage.page_folder import PageFolder

Ids = Int[torch.Tensor, "1 T"]


@dataclass(frozen=True)
class StoredPrefix:
    """A prompt in a store: pages up to one that no other follows.

    Attributes:
        title: what it was called when it was added.
        tokens: in its pages.
        nbytes: of its pages, those included that it shares with others.
        shared: tokens in pages that another prompt begins with too.
    """

    title: str
    tokens: int
    nbytes: int
    shared: int


class PrefixStore:
    """Prefixes of one bundle in a folder. Many processes may use it, and many bundles may lie in one folder.

    Args:
        folder: made where it is missing.
        bundle: codes and decodes; its window plays no part in what is stored.
        model: the model that the bundle was made for.
        max_bytes: of all pages; what was used longest ago goes first. None for no limit.
        on_damage: told in a sentence of each page that is damaged, or cannot be read, and so is computed again. Those
            that are damaged are removed.

    Raises:
        UserError: the folder cannot be written, or the bundle has more sinks than a page has tokens.
    """

    def __init__(
        self,
        folder: str | Path,
        bundle: Bundle,
        model: Any,
        max_bytes: int | None = None,
        on_damage: Callable[[str], None] = lambda sentence: None,
    ):
        if bundle.sinks > PAGE:
            raise UserError(
                f"the bundle keeps {bundle.sinks} sinks exact, and a store has room for those of one page of {PAGE} "
                "tokens; make it with fewer"
            )
        check_output_dir(Path(folder))
        self.pages = PageFolder(Path(folder), max_bytes)
        self.bundle, self.model, self.on_damage = bundle, model, on_damage
        self._root = root_of(bundle)

    def stored_tokens(self, input_ids: Ids) -> int:
        """How many of these tokens, from the first on, lie in the store."""
        return PAGE * len(self._stored(self._names(input_ids)))

    def stored_bytes(self, input_ids: Ids) -> int:
        """Bytes of their pages."""
        return sum(self.pages.size(name) for name in self._stored(self._names(input_ids)))

    def cache_for(self, input_ids: Ids) -> LeanCache:
        """A cache that holds the longest stored prefix of a prompt; `model.generate` computes the rest.

        The last token is always left to be computed, since it makes the first prediction.
        """
        names = self._names(input_ids)
        found: list[dict[str, Sealed]] = []
        for number, name in enumerate(self._stored(names)):
            try:
                found.append(read_page(self.pages.path(name), number, names[number], self.bundle))
            except UserError as error:
                self._damaged(name, error)
                break
        cache = self.bundle.new_cache()
        tokens = min(PAGE * len(found), input_ids.shape[1] - 1)
        if tokens <= 0:
            return cache
        try:
            held = opened(found, rooms_of(self.bundle, self.bundle.sinks))
        except DamagedError as error:  # of a page whose checksum is right: no way to tell which
            for name in names[1 : len(found) + 1]:
                self._damaged(name, error)
            return cache
        self.pages.used(names[1 : len(found) + 1])
        if tokens < PAGE * len(found):
            held = {name: part_of(own, 0, tokens) for name, own in held.items()}
        fill(cache, held, tokens, self.model.device)
        forget_unseen(cache)
        return cache

    def _damaged(self, name: str, error: Exception) -> None:
        self.on_damage(str(error))
        if not isinstance(error, UnreadableError):
            self.pages.drop([name])

    def add(self, input_ids: Ids, title: str = "") -> int:
        """Compute a prompt exactly, and store all its whole pages; how many were not there.

        Pages that `put` made through codes are made anew.

        Raises:
            UserError: it is longer than the model allows, a page has no room, or the folder cannot be written.
        """
        names, length = self._names(input_ids), input_ids.shape[1]
        limit = max_positions(self.model.config)
        if limit is not None and length > limit:
            raise UserError(f"a prompt of {length} tokens is longer than the model's {limit} positions; shorten it")
        if len(names) == 1:
            return 0
        with self.pages.working_on(names[-1]):
            self.pages.used(names[1:])  # while this computes, others may make room
            if written := self._missing(names):
                whole = input_ids[:, : PAGE * (len(names) - 1)].to(self.model.device)
                held = held_by(self._computed(whole).layers)
                written = self._missing(names)
                for number in written:
                    self._write(names, number, held, is_exact=True, title=title)
        self.pages.used(names[1:])
        return len(written)

    def _missing(self, names: Sequence[str]) -> list[int]:
        """The pages of a prompt that are not there as they are computed exactly."""
        return [number for number, name in enumerate(names[1:]) if not self._is_exact(name)]

    def put(self, cache: LeanCache, input_ids: Ids, title: str = "") -> int:
        """Store the whole pages of a cache that are codes already, and are not there; how many those were.

        What a cache computed after codes was computed through them, so it may say other things than `add` would; and
        tokens in its exact window, or behind a sliding window, are not there to be stored.

        Args:
            cache: of this bundle, with one row and no padding.
            input_ids: that it was filled with; more may follow behind.
            title: as in `add`.

        Raises:
            UserError: the cache is another bundle's, has other sinks, rows or padding, or holds more than these tokens;
                a page has no room, or the folder cannot be written.
        """
        self._require_ours(cache)
        held, seen = held_by(cache.layers), cache.get_seq_length()
        if cache.padding is not None or any(own.batch != 1 for own in held.values()) or seen > input_ids.shape[1]:
            raise UserError("a store takes the cache of one row, without padding, with all the tokens that it holds")
        compressed = {f"{site.layer}.{site.part}" for site in self.bundle.plan}
        coded = [_coded_tokens(own, seen, name in compressed) for name, own in held.items()]
        names = self._names(input_ids[:, : min(coded, default=0)])
        written = [
            self._write(names, number, held, is_exact=False, title=title)
            for number, name in enumerate(names[1:])
            if name not in self.pages
        ]
        self.pages.used(names[1:])
        return sum(written)

    def prefixes(self) -> list[StoredPrefix]:
        """What lies in the store, the prompts used last first. Pages are not read, but for what they say of
        themselves; those that are cut off or no pages are told of, and left out."""
        about = self._about_all()
        children: dict[str, int] = {}
        for own in about.values():
            children[own.parent] = children.get(own.parent, 0) + 1
        found = []
        for name in reversed(about):
            if name in children:
                continue
            chain = [name]
            # Numbers fall towards the beginning, so this ends whatever damaged pages say of themselves.
            while (parent := about[chain[-1]].parent) in about and about[parent].number < about[chain[-1]].number:
                chain.append(parent)
            if about[chain[-1]].parent != self._root:
                continue  # another bundle's, or its beginning is gone
            shared = [place for place, own in enumerate(chain) if children.get(own, 0) > 1]
            tokens_shared = PAGE * (len(chain) - shared[0]) if shared else 0
            sizes = [self.pages.size(own) for own in chain]
            found.append(StoredPrefix(about[name].title, PAGE * len(chain), sum(sizes), tokens_shared))
        return found

    def drop(self, input_ids: Ids | None = None) -> int:
        """Remove a prompt's pages but for those that other prompts begin with, or all pages; the bytes that were freed.

        Args:
            input_ids: of the prompt; None for everything, other bundles' pages too.
        """
        if input_ids is None:
            return self.pages.drop(self.pages.keys())
        names = self._stored(self._names(input_ids))
        begun_with = {own.parent for name, own in self._about_all().items() if name not in names}
        freed = 0
        while names and names[-1] not in begun_with:
            freed += self.pages.drop([names.pop()])
        return freed

    # -- inside --------------------------------------------------------------------------------------------------------

    def _require_ours(self, cache: LeanCache) -> None:
        """Refuse a cache whose codes are not what this store's pages hold.

        Raises:
            UserError: it is one.
        """
        origin = cache.origin if isinstance(cache, LeanCache) else None
        is_ours = (
            origin is not None
            and origin.fingerprint == self.bundle.made_for["fingerprint"]
            and origin.checksum() == self.bundle.checksum
        )
        if not is_ours or cache.sinks != self.bundle.sinks:
            raise UserError(
                f"a store takes the caches of its own bundle, with its {self.bundle.sinks} sinks; make the cache with "
                "bundle.new_cache()"
            )

    def _names(self, input_ids: Ids) -> list[str]:
        if len(input_ids) != 1:
            raise UserError(f"a store takes one prompt at a time, not {len(input_ids)}")
        return names_of(self._root, input_ids[0].tolist())

    def _stored(self, names: list[str]) -> list[str]:
        """The names of pages from the first on that are there, without a gap."""
        found = []
        for name in names[1:]:
            if name not in self.pages:
                break
            found.append(name)
        return found

    def _about_all(self) -> dict[str, About]:
        """What all pages say of themselves, by name, those used last at the end; damaged ones are told of, left out."""
        about = {}
        for name in self.pages.keys():  # noqa: SIM118 - no mapping
            try:
                about[name] = about_page(self.pages.path(name))
            except UserError as error:
                self.on_damage(str(error))
        return about

    def _is_exact(self, name: str) -> bool:
        if name not in self.pages:
            return False
        try:
            return checked_page(self.pages.path(name)).is_exact
        except UserError as error:
            self.on_damage(str(error))
            return False

    @torch.no_grad()
    def _computed(self, tokens: Ids) -> LeanCache:
        """A cache that computed these tokens exactly, and then coded them whole."""
        cache = self.bundle.new_cache(window=UNBOUNDED)
        cache.activate_past_recording()  # or tokens that no sliding window sees any more would be missing
        ExactPrefixes(self.model, MemoryBudget(0)).fill(cache, tokens)
        cache.encode_all()
        return cache

    def _write(self, names: list[str], number: int, held: Mapping[str, Held], is_exact: bool, title: str) -> bool:
        first = PAGE * number
        own = {name: part_of(each, first, first + PAGE) for name, each in held.items()}
        about = About(number, names[number], is_exact, title)
        return self.pages.add(
            names[number + 1],
            lambda path: write_page(path, about, own, self.bundle),
            replace=is_exact,
            kept=names,
        )


def _coded_tokens(held: Held, seen: int, is_compressed: bool) -> int:
    """Tokens from the first on that stand as pages have them: sinks and codes, or exact where nothing is compressed."""
    if held.length < seen:
        return 0  # a sliding window has dropped the first
    return held.length - (held.window.shape[2] if is_compressed and held.window is not None else 0)

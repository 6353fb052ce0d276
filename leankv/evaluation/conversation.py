"""A conversation whose cache outlives the process: what was said, and the codes of it, in two files.

Each turn feeds what the cache does not hold yet. After it, cache and text are written; whoever opens the conversation
again goes on where it ended, and computes nothing twice.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from leankv.cache.bundle import Bundle
from leankv.cache.lean_cache import LeanCache
from leankv.cache.saved_cache import load_cache
from leankv.errors import UserError
from leankv.evaluation.generation import Completion, chat_ids, complete
from leankv.models.loading import LoadedModel
from leankv.models.structure import max_positions
from leankv.storage.files import read_json, write_json


class Conversation:
    """What was said so far, and the cache that holds it.

    Args:
        loaded: the model; its tokenizer has a chat template.
        bundle: of that model.
        folder: keeps it, under `name`; None for a conversation that ends with the process.
        name: of the conversation.
        on_damage: told in a sentence when what is kept of the cache cannot be used; it is computed again.

    Attributes:
        turns: `{"role": ..., "content": ...}`, as chat templates take them.

    Raises:
        UserError: there is no chat template, or the file with the turns is damaged.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        bundle: Bundle,
        folder: Path | None = None,
        name: str = "conversation",
        on_damage: Callable[[str], None] = lambda sentence: None,
    ):
        if loaded.tokenizer.chat_template is None:
            raise UserError(f"the tokenizer of {loaded.name} has no chat template; take a model that was made to chat")
        self.loaded, self.bundle = loaded, bundle
        self.turns: list[dict[str, str]] = []
        self._ids: list[int] = []  # what the cache was fed, and perhaps more
        self._cache: LeanCache = bundle.new_cache()
        self._text = None if folder is None else folder / f"{name}.json"
        self._codes = None if folder is None else folder / f"{name}.safetensors"
        if self._text is not None and self._text.is_file():
            self._open(self._text, on_damage)

    def _open(self, text: Path, on_damage: Callable[[str], None]) -> None:
        kept: Any = read_json(text)
        try:
            self.turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in kept["turns"]]
            self._ids = [int(number) for number in kept["ids"]]
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{text} is no conversation ({error}); remove it, or give another --name") from error
        assert self._codes is not None
        try:
            tokens = torch.tensor([self._ids], dtype=torch.int64)
            self._cache = load_cache(self._codes, self.bundle, tokens, self.loaded.model.device)
        except UserError as error:
            on_damage(str(error))
            self._ids = []

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds."""
        return self._cache.get_seq_length()

    def begin_anew(self) -> None:
        """Forget all that was said; files are replaced by the next turn's."""
        self.turns, self._ids, self._cache = [], [], self.bundle.new_cache()

    def say(
        self, content: str, max_new_tokens: int, temperature: float, seed: int, on_text: Callable[[str], None]
    ) -> Completion:
        """One turn of the user's, and the model's answer, which is handed to `on_text` as it comes.

        Raises:
            UserError: the conversation is longer than the model allows, or cannot be written.
        """
        turns = [*self.turns, {"role": "user", "content": content}]
        ids = chat_ids(self.loaded.tokenizer, turns)
        limit = max_positions(self.loaded.model.config)
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise UserError(
                f"the conversation has {len(ids)} tokens, and the model has room for {limit}, its answer included; "
                "begin another one"
            )
        self._roll_back_to(ids)
        self._ids = ids  # should this turn be interrupted
        completion = complete(self.loaded, self._cache, torch.tensor([ids]), max_new_tokens, temperature, seed, on_text)
        self._ids = completion.ids[0].tolist()
        self.turns = [*turns, {"role": "assistant", "content": completion.text}]
        if self._text is not None and self._codes is not None:
            self._cache.save(self._codes, completion.ids)
            write_json(self._text, {"turns": self.turns, "ids": self._ids})
        return completion

    def _roll_back_to(self, ids: list[int]) -> None:
        """Take off what the cache holds and these tokens do not begin with: templates may write an answer otherwise."""
        held = self.tokens
        known = min(held, len(ids) - 1, len(self._ids))
        alike = next((n for n in range(known) if ids[n] != self._ids[n]), known)
        if alike == held:
            return
        try:
            self._cache.crop(alike - held)
        except RuntimeError:  # a sliding window has dropped what would be needed
            self._cache = self.bundle.new_cache()

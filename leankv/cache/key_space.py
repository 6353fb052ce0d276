"""The key space: where key codecs take their vectors, and where in the text those stand."""

import torch
from jaxtyping import Float, Int64

from leankv import compiled
from leankv.compiled.packed_rows import BLOCK, Meeting
from leankv.errors import UserError
from leankv.models.rope import KeyRotation, Table

Keys = Float[torch.Tensor, "batch heads tokens head_dim"]


class KeySpace:
    """Where the key codec of one layer takes its vectors, if that is not where the cache holds them.

    Keys are rotated by their positions. A token's position follows from its place in its row, and from how much left
    padding the row has: so the padding is held here, and repeated and reordered as the rows are.

    Args:
        rotation: takes cached keys to the key space of codecs, and back.
        layer: whose keys.
        padding: `[B]`, tokens of left padding in the rows of the prompt; None for none.
        ends_pass: whether no other layer's keys are read after these in a forward pass.
    """

    def __init__(
        self,
        rotation: KeyRotation,
        layer: int,
        padding: Int64[torch.Tensor, " batch"] | None,
        ends_pass: bool = False,
    ):
        self._rotation, self._layer, self._ends_pass = rotation, layer, ends_pass
        self._of_prompt = None if padding is None else padding.cpu()  # where positions are reckoned
        self._of_rows: torch.Tensor | None = None  # once there are rows

    def begin(self, batch: int) -> None:
        """Note how many rows there are: beams of one prompt stand behind each other.

        Raises:
            UserError: they are not those of the prompt's mask, nor each of them as often.
        """
        if self._of_rows is not None or self._of_prompt is None:
            return
        prompts = len(self._of_prompt)
        if batch < prompts or batch % prompts:
            raise UserError(
                f"the cache was made with an attention_mask of {prompts} rows and cannot take a batch of {batch}; make "
                "one with the mask of that batch"
            )
        self._of_rows = self._of_prompt.repeat_interleave(batch // prompts)

    @property
    def padding(self) -> Int64[torch.Tensor, " batch"] | None:
        """Tokens of left padding in each row; None where there is none, or there are no rows."""
        return self._of_rows

    def restore(self, padding: Int64[torch.Tensor, " batch"] | None) -> None:
        """Have such rows."""
        self._of_rows = None if padding is None else padding.cpu()

    def end(self) -> None:
        """These keys were read: tables that layers share in a forward pass go with the last of them."""
        if self._ends_pass:
            self._rotation.forget()

    def clear(self) -> None:
        """Forget the rows."""
        self._of_rows = None

    def index(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        if self._of_rows is not None:
            self._of_rows = self._of_rows[rows.cpu()]

    def enter(self, keys: Keys, first: int) -> Keys:
        """Cached keys, of which the first is token `first` of the sequence, as codecs take them."""
        return self._rotation.remove(self._layer, keys, self._positions(first, keys.shape[2]))

    def leave(self, keys: Keys, first: int) -> Keys:
        """The way back."""
        return self._rotation.restore(self._layer, keys, self._positions(first, keys.shape[2]))

    # A score depends on how far a query is from a key. So pieces of codes are all rotated as if each began the text, by
    # one table, and what turns them the rest of the way turns the few queries the other way.

    def offsets(self, count: int, device: torch.device) -> Table | None:
        """The table that rotates the tokens of a piece, `count` of them at most, from where it begins."""
        return self._rotation.table_at(self._layer, torch.arange(count)[None], device)

    def turned(self, keys: Keys, offsets: Table | None) -> Keys:
        """Keys of one piece as codecs give them, rotated from where it begins."""
        table = None if offsets is None else (offsets[0][:, : keys.shape[2]], offsets[1][:, : keys.shape[2]])
        return self._rotation.turned(self._layer, keys, table)

    def met(self, queries: Keys, first: int) -> Keys:
        """Queries as they meet `turned` keys of a piece whose first token is `first` of the sequence."""
        padding = torch.zeros(1, dtype=torch.int64) if self._of_rows is None else self._of_rows
        table = self._rotation.turning_back_at(self._layer, (first - padding)[:, None], queries.device)
        return self._rotation.turned(self._layer, queries, table)

    def meeting(self, queries: Float[torch.Tensor, "1 heads groups head_dim"], first: int, count: int) -> Meeting:
        """How `count` keys as codecs give them, the first token `first` of the sequence, meet queries of one row."""
        offsets = self.offsets(min(BLOCK, count), queries.device)
        if offsets is None:
            return Meeting.as_cached(queries[0])
        padding = 0 if self._of_rows is None else int(self._of_rows)
        places = torch.arange(first - padding, first - padding + count, BLOCK)
        table = self._rotation.turning_back_at(self._layer, places[None], queries.device)
        assert table is not None, "there is one of offsets"
        halves = self._rotation.rotates_halves(self._layer)
        each = queries.flatten(1, 2)[:, None].expand(-1, len(places), -1, -1)
        blocks = compiled.rotated_by_token(each, *table, halves)[0].unflatten(1, queries.shape[1:3])
        return Meeting(blocks, offsets[0][0], offsets[1][0], halves)

    def _positions(self, first: int, count: int) -> torch.Tensor:
        """Positions `[B or 1, T]` of `count` tokens of the sequence from token `first` on."""
        places = torch.arange(first, first + count)[None]
        if self._of_rows is None:
            return places
        return (places - self._of_rows[:, None]).clamp_min(0)

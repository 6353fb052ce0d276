"""The key space: where key codecs take their vectors, and where in the text those stand."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64

Rotate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Keys `[B, heads, T, head_dim]` and their positions `[B or 1, T]` -> keys in another key space."""

Keys = Float[torch.Tensor, "batch heads tokens head_dim"]


class KeySpace:
    """Where the key codec of one layer takes its vectors, if that is not where the cache holds them.

    Keys are rotated by their positions. A token's position follows from its place in its row, and from how much left
    padding the row has: so the padding is held here, and repeated and reordered as the rows are.

    Args:
        remove: takes cached keys to the key space of codecs.
        restore: takes them back.
        padding: `[B]`, tokens of left padding in the rows of the prompt; None for none.
    """

    def __init__(self, remove: Rotate, restore: Rotate, padding: Int64[torch.Tensor, " batch"] | None):
        self._remove = remove
        self._restore = restore
        self._of_prompt = padding
        self._of_rows: torch.Tensor | None = None  # once there are rows

    def begin(self, batch: int) -> None:
        """Note how many rows there are: beams of one prompt stand behind each other."""
        if self._of_rows is None and self._of_prompt is not None:
            self._of_rows = self._of_prompt.repeat_interleave(batch // len(self._of_prompt))

    def clear(self) -> None:
        """Forget the rows."""
        self._of_rows = None

    def index(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        if self._of_rows is not None:
            self._of_rows = self._of_rows[rows.to(self._of_rows.device)]

    def to(self, device: torch.device, non_blocking: bool = False) -> None:
        """Bring what is held to a device."""
        if self._of_rows is not None:
            self._of_rows = self._of_rows.to(device, non_blocking=non_blocking)

    def enter(self, keys: Keys, first: int) -> Keys:
        """Cached keys, of which the first is token `first` of the sequence, as codecs take them."""
        return self._remove(keys, self._positions(first, keys.shape[2]))

    def leave(self, keys: Keys, first: int) -> Keys:
        """The way back."""
        return self._restore(keys, self._positions(first, keys.shape[2]))

    def _positions(self, first: int, count: int) -> torch.Tensor:
        """Positions `[B or 1, T]` of `count` tokens of the sequence from token `first` on."""
        places = torch.arange(first, first + count)[None]
        if self._of_rows is None:
            return places
        return (places - self._of_rows.cpu()[:, None]).clamp_min(0)

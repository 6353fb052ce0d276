"""What a compressed layer holds of its keys, or of its values: sinks, codes, window.

Three runs of tokens lie behind each other: the *sinks* (the first S tokens, exact), the codes, and the *window* (the
latest R tokens, exact). Tokens enter at the end of the window and are encoded when they leave it; with S = R = 0 every
vector that attention reads, the current token's included, went through the codec.

Keys may be encoded in another key space than the cache's: un-rotated before the codec, rotated back after it, by
positions that follow from a token's place in its row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from leankv.codecs import Code, Codec

Turn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Keys `[B, heads, T, head_dim]` and their positions `[B or 1, T]` -> keys in another key space."""


@dataclass(frozen=True)
class KeySpace:
    """Where a codec takes its vectors, if that is not where the cache holds them.

    Attributes:
        enter: from the cached keys.
        leave: back to them.
        padding: `[B]`, by how much a token's position falls short of its place in the row.
    """

    enter: Turn
    leave: Turn
    padding: torch.Tensor | None


class PartStore:
    """The keys or the values of one layer, `[B, heads, tokens, head_dim]`, as sinks, codes and window."""

    def __init__(self, codec: Codec | None, sinks: int, window: int, space: KeySpace | None = None):
        self.codec = codec
        self.sinks = sinks
        self.window = window
        self.space = space
        self.seen = 0  # tokens of the sequence so far, those that a sliding window dropped included
        self.sink_rows: torch.Tensor | None = None
        self.code: Code | None = None  # each tensor [B, tokens, ...]
        self.window_rows: torch.Tensor | None = None

    def append(self, rows: torch.Tensor) -> None:
        """Take in new tokens, and encode what leaves the window."""
        missing = max(self.sinks - self.seen, 0)
        self.seen += rows.shape[2]
        if self.codec is None:
            self.window_rows = _cat(self.window_rows, rows)
            return
        padding = self.space.padding if self.space is not None else None
        if self.space is not None and padding is not None and len(padding) != len(rows):
            # Beams of one prompt stand behind each other.
            self.space = replace(self.space, padding=padding.repeat_interleave(len(rows) // len(padding)))
        if missing:
            self.sink_rows = _cat(self.sink_rows, rows[:, :, :missing])
            rows = rows[:, :, missing:]
        rows = _cat(self.window_rows, rows)
        leaving = max(rows.shape[2] - self.window, 0)
        if leaving:
            self._encode(rows[:, :, :leaving], self.seen - rows.shape[2])
            rows = rows[:, :, leaving:].clone()
        self.window_rows = rows if rows.shape[2] else None

    def _positions(self, first: int, count: int) -> torch.Tensor:
        """Positions `[B or 1, T]` of `count` tokens of the sequence from token `first` on."""
        places = torch.arange(first, first + count)[None]
        if self.space is None or self.space.padding is None:
            return places
        return (places - self.space.padding.cpu()[:, None]).clamp_min(0)

    def _encode(self, rows: torch.Tensor, first: int) -> None:
        """Encode `rows`, of which the first is token `first` of the sequence."""
        assert self.codec is not None
        batch, heads, tokens, head_dim = rows.shape
        if self.space is not None:
            rows = self.space.enter(rows, self._positions(first, tokens))
        vectors = rows.transpose(1, 2).reshape(batch * tokens, heads * head_dim)
        code = self.codec.encode(vectors)
        code = {name: tensor.unflatten(0, (batch, tokens)) for name, tensor in code.items()}
        if self.code is not None:
            code = {name: torch.cat([self.code[name], tensor], dim=1) for name, tensor in code.items()}
        self.code = code

    def read(self, like: torch.Tensor) -> torch.Tensor:
        """All tokens held, `[B, heads, tokens, head_dim]`, in the dtype of `like`."""
        decoded = None
        if self.code is not None and self.codec is not None:
            batch, tokens = next(iter(self.code.values())).shape[:2]
            vectors = self.codec.decode({name: tensor.flatten(0, 1) for name, tensor in self.code.items()})
            decoded = vectors.reshape(batch, tokens, like.shape[1], like.shape[3]).transpose(1, 2)
            if self.space is not None:
                first = self.seen - len(self) + _length(self.sink_rows, 2)
                decoded = self.space.leave(decoded, self._positions(first, tokens))
            decoded = decoded.to(like.dtype)
        pieces = [piece for piece in (self.sink_rows, decoded, self.window_rows) if piece is not None]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def __len__(self) -> int:
        return sum(self._lengths())

    def _lengths(self) -> tuple[int, int, int]:
        coded = next(iter(self.code.values())).shape[1] if self.code is not None else 0
        return _length(self.sink_rows, 2), coded, _length(self.window_rows, 2)

    def keep(self, start: int, stop: int) -> None:
        """Forget all tokens but those from `start` to `stop`, counted from the first one held."""
        sinks, coded, _ = self._lengths()
        self.seen -= max(len(self) - stop, 0)

        def cut(tensor: torch.Tensor, dim: int, offset: int) -> torch.Tensor | None:
            first = min(max(start - offset, 0), tensor.shape[dim])
            last = min(max(stop - offset, first), tensor.shape[dim])
            if last == first:
                return None
            if last - first == tensor.shape[dim]:
                return tensor
            return tensor.narrow(dim, first, last - first).clone()  # a view would keep the whole storage alive

        if self.sink_rows is not None:
            self.sink_rows = cut(self.sink_rows, 2, 0)
        if self.code is not None:
            kept = {name: cut(tensor, 1, sinks) for name, tensor in self.code.items()}
            self.code = {name: t for name, t in kept.items() if t is not None} or None
        if self.window_rows is not None:
            self.window_rows = cut(self.window_rows, 2, sinks + coded)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor held; `function` acts on the batch dimension or moves to a device."""
        if self.sink_rows is not None:
            self.sink_rows = function(self.sink_rows)
        if self.code is not None:
            self.code = {name: function(tensor) for name, tensor in self.code.items()}
        if self.window_rows is not None:
            self.window_rows = function(self.window_rows)
        if self.space is not None and self.space.padding is not None:
            self.space = replace(self.space, padding=function(self.space.padding))

    def tensors(self) -> list[torch.Tensor]:
        exact = [rows for rows in (self.sink_rows, self.window_rows) if rows is not None]
        return exact + list((self.code or {}).values())


def _length(tensor: torch.Tensor | None, dim: int) -> int:
    return 0 if tensor is None else tensor.shape[dim]


def _cat(first: torch.Tensor | None, second: torch.Tensor) -> torch.Tensor:
    """`first` (or nothing) and `second` along the tokens; always a copy, so that the model's own can be freed."""
    return second.clone() if first is None else torch.cat([first, second], dim=2)

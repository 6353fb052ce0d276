"""What a compressed layer holds of its keys, or of its values: sinks, codes, window.

Three runs of tokens lie behind each other: the *sinks* (the first S tokens, exact), the codes, and the *window* (the
latest R tokens, exact). Tokens enter at the end of the window and are encoded when they leave it; with S = R = 0 every
vector that attention reads, the current token's included, went through the codec.

Keys may be encoded in another key space than the cache's: un-rotated before the codec, rotated back after it, by
positions that follow from a token's place in its row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from leankv.codecs import Code, Codec
from leankv.codecs.ragged import Ragged
from leankv.codecs.share import as_context

PIECE = 4096
"""Tokens decoded at a time: what bounds temporaries. With 1,024 two cores were slower; see the log, 2026-11-24."""

Turn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Keys `[B, heads, T, head_dim]` and their positions `[B or 1, T]` -> keys in another key space."""


@dataclass(frozen=True)
class KeySpace:
    """Where a codec takes its vectors, if that is not where the cache holds them.

    Attributes:
        enter: from the cached keys.
        leave: back to them.
        padding: `[B]`, by how much a token's position falls short of its place in the row of a prompt.
    """

    enter: Turn
    leave: Turn
    padding: torch.Tensor | None


class PartStore:
    """The keys or the values of one layer, `[B, heads, tokens, head_dim]`, as sinks, codes and window."""

    def __init__(
        self,
        codec: Codec | None,
        sinks: int,
        window: int,
        space: KeySpace | None = None,
        references: Sequence["PartStore"] = (),
    ):
        self.codec = codec
        self.sinks = sinks
        self.window = window
        self.space = space
        self.code_space = None if codec is None or codec.lossless else space
        self.references = references  # read before this one in every forward pass; what the codec predicts from
        self.readers = 0  # stores that have this one among their references
        for store in references:
            store.readers += 1
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        self.seen = 0  # tokens of the sequence so far, those that a sliding window dropped included
        self.sink_rows: torch.Tensor | None = None
        self.code: Code | None = None  # each tensor [B, tokens, ...]
        self.window_rows: torch.Tensor | None = None
        self._padding: torch.Tensor | None = None  # [B], of the rows held: the space's, repeated and put in their order
        self._left = 0  # readers that are still to come in this forward pass
        self._context: torch.Tensor | None = None  # [B, tokens, W], 16 bits, until the last reader of a step took them
        self._first_in_context = 0  # which token of the sequence they begin with

    def append(self, rows: torch.Tensor) -> None:
        """Take in new tokens, and encode what leaves the window."""
        missing = max(self.sinks - self.seen, 0)
        self.seen += rows.shape[2]
        if self._padding is None and self.space is not None and self.space.padding is not None:
            # Beams of one prompt stand behind each other.
            self._padding = self.space.padding.repeat_interleave(len(rows) // len(self.space.padding))
        if self.codec is None:
            self.window_rows = _cat(self.window_rows, rows)
            return
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
        if self._padding is None:
            return places
        return (places - self._padding.cpu()[:, None]).clamp_min(0)

    def _encode(self, rows: torch.Tensor, first: int) -> None:
        """Encode `rows`, of which the first is token `first` of the sequence."""
        assert self.codec is not None
        batch, _, tokens, _ = rows.shape
        if self.code_space is not None:
            rows = self.code_space.enter(rows, self._positions(first, tokens))
        vectors = _as_vectors(rows).flatten(0, 1)
        if self.codec.looks_back:
            code = self.codec.encode_beside(vectors, self._reference(first, tokens, batch, vectors.device))
        else:
            code = self.codec.encode(vectors)
        code = {name: _unflat(rows, batch) for name, rows in code.items()}
        if self.code is not None:
            code = {name: _followed(self.code[name], tensor) for name, tensor in code.items()}
        self.code = code

    def _reference(self, first: int, count: int, batch: int, device: torch.device) -> torch.Tensor:
        """What is known of `count` tokens from token `first` on: `[B * count, R]`; nothing (R = 0) in a first layer."""
        known = [store.context(first, count).to(device) for store in self.references]
        nothing = torch.empty(batch, count, 0, dtype=torch.float16, device=device)
        return torch.cat([nothing, *known], dim=2).flatten(0, 1)

    def context(self, first: int, count: int) -> torch.Tensor:
        """Tokens from `first` on as attention reads them, for readers: in the key space of codecs, `[B, count, W]`."""
        assert self._context is not None, "a reference is read before the stores that look at it"
        start = first - self._first_in_context
        return self._context[:, start : start + count]

    def release(self) -> None:
        """One of the readers has what it needs for this forward pass."""
        self._left -= 1
        if self._left == 0:
            self._context = None

    def _shown(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """What readers see of `rows` `[B, heads, T, head_dim]` as cached, the first of them token `first`."""
        if self.space is not None:
            rows = self.space.enter(rows, self._positions(first, rows.shape[2]))
        return as_context(_as_vectors(rows))

    def read(self, like: torch.Tensor) -> torch.Tensor:
        """All tokens held, `[B, heads, tokens, head_dim]`, in the dtype of `like`."""
        sinks, coded, window = self._lengths()
        shown: list[torch.Tensor] = []
        if window and not sinks + coded and self.window_rows is not None and self.window_rows.dtype == like.dtype:
            whole = self.window_rows
        else:
            whole = like.new_empty(*like.shape[:2], sinks + coded + window, like.shape[3])
            if self.sink_rows is not None:
                whole[:, :, :sinks] = self.sink_rows
            # What vectors are predicted from stands beside them, so there are fewer at a time.
            piece = max(1, PIECE // (1 + len(self.references)))
            for first in range(0, coded, piece):
                last, token = min(first + piece, coded), self._first_coded() + first
                vectors = self._decode(first, last, like.device)
                rows = vectors.unflatten(2, (like.shape[1], like.shape[3])).transpose(1, 2)
                if self.readers:
                    shown.append(as_context(vectors) if self.code_space is self.space else self._shown(rows, token))
                if self.code_space is not None:
                    rows = self.code_space.leave(rows, self._positions(token, last - first))
                # One copy casts, brings into the order of heads and puts in place.
                whole[:, :, sinks + first : sinks + last] = rows
            if self.window_rows is not None:
                whole[:, :, sinks + coded :] = self.window_rows
        for store in self.references:
            store.release()
        self._left, self._first_in_context = self.readers, self._first_coded()
        if self.codec is None and self.readers and self.window_rows is not None:
            # Held exact; which of these tokens are codes in the stores that look here, they know.
            shown = [self._shown(self.window_rows, self._first_coded())]
        self._context = torch.cat(shown, dim=1) if len(shown) > 1 else shown[0] if shown else None
        return whole

    def _first_coded(self) -> int:
        """Which token of the sequence the codes begin with."""
        return self.seen - len(self) + _length(self.sink_rows, 2)

    def _decode(self, first: int, last: int, device: torch.device) -> torch.Tensor:
        """Vectors `[B, tokens, W]` of the codes from `first` to `last`, in the key space of codecs."""
        assert self.codec is not None
        assert self.code is not None
        code = {name: _flat(_columns(rows, first, last)) for name, rows in self.code.items()}
        batch = len(next(iter(self.code.values())))
        if self.codec.looks_back:
            reference = self._reference(self._first_coded() + first, last - first, batch, device)
            return self.codec.decode_beside(code, reference).unflatten(0, (batch, -1))
        return self.codec.decode(code).unflatten(0, (batch, -1))

    def __len__(self) -> int:
        return sum(self._lengths())

    def _lengths(self) -> tuple[int, int, int]:
        coded = next(iter(self.code.values())).shape[1] if self.code is not None else 0
        return _length(self.sink_rows, 2), coded, _length(self.window_rows, 2)

    def keep(self, start: int, stop: int) -> None:
        """Forget all tokens but those from `start` to `stop`, counted from the first one held."""
        sinks, coded, _ = self._lengths()
        self.seen -= max(len(self) - stop, 0)

        def part_of(tokens: int, offset: int) -> tuple[int, int]:
            first = min(max(start - offset, 0), tokens)
            return first, min(max(stop - offset, first), tokens)

        def cut(tensor: torch.Tensor, dim: int, offset: int) -> torch.Tensor | None:
            first, last = part_of(tensor.shape[dim], offset)
            if last == first:
                return None
            if last - first == tensor.shape[dim]:
                return tensor
            return tensor.narrow(dim, first, last - first).clone()  # a view would keep the whole storage alive

        if self.sink_rows is not None:
            self.sink_rows = cut(self.sink_rows, 2, 0)
        if self.code is not None:
            first, last = part_of(coded, sinks)
            if last == first:
                self.code = None
            elif last - first < coded:
                # Views would keep all of the storage alive.
                self.code = {name: _columns(rows, first, last).clone() for name, rows in self.code.items()}
        if self.window_rows is not None:
            self.window_rows = cut(self.window_rows, 2, sinks + coded)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor held; `function` acts on the batch dimension or moves to a device."""
        if self.sink_rows is not None:
            self.sink_rows = function(self.sink_rows)
        if self.code is not None:
            self.code = {name: _applied(function, tensor) for name, tensor in self.code.items()}
        if self.window_rows is not None:
            self.window_rows = function(self.window_rows)
        if self._padding is not None:
            self._padding = function(self._padding)

    def parked(self) -> list[bytes]:
        """What is held as it would be stored: sinks and window as they are, codes parked, a stream for each row."""
        exact = [rows for rows in (self.sink_rows, self.window_rows) if rows is not None]
        streams = [rows.contiguous().view(torch.uint8).cpu().numpy().tobytes() for rows in exact]
        if self.code is not None and self.codec is not None:
            batch, tokens = next(iter(self.code.values())).shape[:2]
            numbers = torch.arange(batch * tokens).reshape(batch, tokens)
            for own in numbers:
                streams.append(self.codec.park({name: _flat(t)[own] for name, t in self.code.items()}))
        return streams


def _as_vectors(rows: torch.Tensor) -> torch.Tensor:
    """`[B, heads, T, head_dim]` -> `[B, T, W]`."""
    return rows.transpose(1, 2).flatten(2)


def _flat(rows: torch.Tensor | Ragged) -> torch.Tensor | Ragged:
    """`[B, T, ...]` -> `[B * T, ...]`."""
    return rows.flatten() if isinstance(rows, Ragged) else rows.flatten(0, 1)


def _unflat(rows: torch.Tensor | Ragged, batch: int) -> torch.Tensor | Ragged:
    """The way back from `_flat`."""
    return rows.unflatten((batch, -1)) if isinstance(rows, Ragged) else rows.unflatten(0, (batch, -1))


def _columns(rows: torch.Tensor | Ragged, first: int, last: int) -> torch.Tensor | Ragged:
    """Tokens `first` to `last` of each row of the batch."""
    return rows.columns(first, last) if isinstance(rows, Ragged) else rows[:, first:last]


def _followed(first: torch.Tensor | Ragged, second: torch.Tensor | Ragged) -> torch.Tensor | Ragged:
    if isinstance(first, Ragged):
        assert isinstance(second, Ragged)
        return first.followed_by(second)
    assert isinstance(second, torch.Tensor)
    return torch.cat([first, second], dim=1)


def _applied(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor | Ragged) -> torch.Tensor | Ragged:
    if isinstance(rows, torch.Tensor):
        return function(rows)
    # What a function on the batch dimension does, or where it moves tensors to, shows on the rows' numbers.
    numbers = function(torch.arange(rows.counts.numel(), device=rows.data.device).reshape(rows.shape))
    return rows.to(numbers.device)[numbers]


def _length(tensor: torch.Tensor | None, dim: int) -> int:
    return 0 if tensor is None else tensor.shape[dim]


def _cat(first: torch.Tensor | None, second: torch.Tensor) -> torch.Tensor:
    """`first` (or nothing) and `second` along the tokens; always a copy, so that the model's own can be freed."""
    return second.clone() if first is None else torch.cat([first, second], dim=2)

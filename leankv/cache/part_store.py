"""What a compressed layer holds of its keys, or of its values: sinks, codes, window.

Three runs of tokens lie behind each other: the *sinks* (the first S tokens, exact), the codes, and the *window* (the
latest R tokens, exact). Tokens enter at the end of the window and are encoded when they leave it; with S = R = 0 every
vector that attention reads, the current token's included, went through the codec.

Encoding one token takes as many operations as encoding many, and a step has little else to do. So those that leave the
window may wait, exact behind it, until there are E of them: as KIVI's residual does (arXiv 2402.02750).

With an `UNBOUNDED` window nothing becomes a code by itself: `encode_all` codes whatever is held exact behind the sinks,
whole, and what comes after is exact again. So a prompt is computed exactly, and saved as codes.

Keys may be encoded in another key space than the cache's (`leankv.cache.key_space`), and codecs may predict from what
other stores show (`leankv.cache.cross_layer`).
"""

import sys
from collections.abc import Sequence

import torch
from jaxtyping import Float

from leankv.cache.code_runs import CodeRuns
from leankv.cache.cross_layer import CrossLayer, Shown
from leankv.cache.key_space import KeySpace
from leankv.codecs import Code, Codec, Factored
from leankv.codecs.share import as_context
from leankv.compiled.packed_rows import Meeting, PackedRows

PIECE = 4096
"""Tokens decoded at a time: what bounds temporaries. With 1,024 two cores were slower; see the log, 2026-11-24."""

GPU_PIECE = 16384
"""On a GPU, where starting many small operations takes longer than they do. Assumption: what so many tokens take is
small beside a GPU's memory."""

UNBOUNDED = sys.maxsize
"""As a window: every token behind the sinks stays exact until `encode_all`."""

Rows = Float[torch.Tensor, "batch heads tokens head_dim"]
Some = Float[torch.Tensor, "batch heads _ head_dim"]
Like = Float[torch.Tensor, "batch heads new head_dim"]
"""Rows of a forward pass: dtype, device and heads are those of all that the store hands out."""


class PartStore:
    """The keys or the values of one layer, `[B, heads, tokens, head_dim]`, as sinks, codes and window.

    Args:
        codec: None to hold all exact.
        sinks: first tokens held exact.
        window: latest tokens held exact, at least; `UNBOUNDED` for all, until `encode_all`.
        encode_every: E; tokens that left the window are encoded once there are so many. 1 where there is no window.
        space: where codecs take the vectors; as cached unless given.
        sources: stores that are read before this one in every forward pass, and that the codec predicts from.
    """

    keeps_decoded = False

    def __init__(
        self,
        codec: Codec | None,
        sinks: int,
        window: int,
        space: KeySpace | None = None,
        sources: Sequence["PartStore"] = (),
        encode_every: int = 1,
    ):
        self.codec = codec
        self.sinks = sinks
        self.window = window
        self.encode_every = encode_every if window else 1
        self.space = space
        self.code_space = None if codec is None or codec.lossless else space
        self.cross_layer: CrossLayer = CrossLayer([store.cross_layer for store in sources])
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        self.seen = 0  # tokens of the sequence so far, those that a sliding window dropped included
        self.sink_rows: torch.Tensor | None = None
        self.code: CodeRuns | None = None  # [B, tokens]
        self.window_rows: torch.Tensor | None = None
        self._buffer: Shown | None = None  # while pieces are read: what readers see of all codes
        self._matrix: torch.Tensor | None = None  # meanwhile: what loops multiply by
        self.cross_layer.clear()
        if self.space is not None:
            self.space.clear()

    def restore(self, seen: int, sinks: Some | None, code: Code | None, window: Some | None) -> None:
        """Hold what another store of the same kind held, after `seen` tokens of its sequence."""
        self.clear()
        self.seen, self.sink_rows, self.window_rows = seen, sinks, window
        self.code = None if code is None else CodeRuns([code])

    def append(self, rows: Rows) -> None:
        """Take in new tokens, and encode what leaves the window."""
        if self.space is not None:
            self.space.begin(len(rows))
        missing = max(self.sinks - self.seen, 0)
        self.seen += rows.shape[2]
        if self.codec is None:
            self.window_rows = _behind(self.window_rows, rows)
            return
        if missing:
            self.sink_rows = _behind(self.sink_rows, rows[:, :, :missing])
            rows = rows[:, :, missing:]
        rows = _behind(self.window_rows, rows)
        leaving = rows.shape[2] - self.window
        if leaving >= self.encode_every:
            self._encode(self.codec, rows[:, :, :leaving], self.seen - rows.shape[2])
            rows = rows[:, :, leaving:].clone()
        self.window_rows = rows if rows.shape[2] else None

    def _encode(self, codec: Codec, rows: Rows, first: int) -> None:
        """Encode `rows`, of which the first is token `first` of the sequence."""
        batch, _, tokens, _ = rows.shape
        if self.code_space is not None:
            rows = self.code_space.enter(rows, first)
        vectors = _as_vectors(rows).flatten(0, 1)
        context = None
        if codec.n_context_layers:
            context = self.cross_layer.known(first, tokens, batch, vectors.device)
        code = codec.encode(vectors, context).unflatten(batch)
        self.code = CodeRuns([code]) if self.code is None else self.code.append(code)

    def encode_all(self) -> None:
        """Encode every token behind the sinks that is held exact, window included.

        The stores of a cache do this one after another, each after its sources, as they are read: what a codec predicts
        from is what its sources decode of the same tokens, and no forward pass is needed for that.
        """
        rows = self.window_rows
        if self.codec is not None and rows is not None:
            self._encode(self.codec, rows, self.seen - rows.shape[2])
            self.window_rows = None
        if rows is not None and (self.cross_layer.readers or self.keeps_decoded):
            self.read(rows)  # shows to readers what decoding gives
        else:
            self.cross_layer.show([], self._first_coded())
        if self.space is not None:
            self.space.end()

    def read(self, like: Like) -> Rows:
        """All tokens held, in the dtype of `like`."""
        sinks, coded, window = self._lengths()
        shown: list[torch.Tensor] = []
        skipped = 0
        if window and not sinks + coded and self.window_rows is not None and self.window_rows.dtype == like.dtype:
            whole = self.window_rows
        else:
            whole = like.new_empty(*like.shape[:2], sinks + coded + window, like.shape[3])
            if self.sink_rows is not None:
                whole[:, :, :sinks] = self.sink_rows
            if self.codec is not None and self.code is not None:
                skipped = self._read_codes(self.codec, self.code, whole[:, :, sinks : sinks + coded], shown)
            if self.window_rows is not None:
                whole[:, :, sinks + coded :] = self.window_rows
        if self.codec is None and self.cross_layer.readers and self.window_rows is not None:
            # Held exact; which of these tokens are codes in the stores that look here, they know.
            shown = [self._shown(self.window_rows, self._first_coded())]
        self.cross_layer.show(shown, self._first_coded() + skipped)
        if self.space is not None:
            self.space.end()
        return whole

    def _read_codes(self, codec: Codec, code: CodeRuns, into: Rows, shown: list[torch.Tensor]) -> int:
        """Put what all codes stand for into place; `shown` gets what readers see, from the code on that is returned."""
        self._decode(codec, code, 0, into, shown)
        return 0

    def _decode(self, codec: Codec, code: CodeRuns, start: int, into: Rows, shown: list[torch.Tensor]) -> None:
        """Decode codes from the one numbered `start` on into place, piece by piece; `shown` gets what readers see."""
        batch, coded = code.shape
        if self.cross_layer.readers:  # at once: pieces that are joined later stand in memory twice
            shown.append(torch.empty(batch, coded - start, codec.width, dtype=torch.float16, device=into.device))
        piece = self.piece_length(into.device)
        for first in range(start, coded, piece):
            last = min(first + piece, coded)
            rows, seen = self._decoded_codes(codec, code, first, last, into)
            if seen is not None:
                shown[0][:, first - start : last - start] = seen
            if self.code_space is not None:
                rows = self.code_space.leave(rows, self._first_coded() + first)
            # One copy casts, brings into the order of heads and puts in place.
            into[:, :, first:last] = rows

    def _decoded_codes(
        self, codec: Codec, code: CodeRuns, first: int, last: int, like: Like
    ) -> tuple[Rows, Shown | None]:
        """Codes `first` to `last` as their codec gives them, float32; and as readers see them, where any do."""
        batch, token = code.shape[0], self._first_coded() + first
        context = None
        if codec.n_context_layers:
            context = self.cross_layer.known(token, last - first, batch, like.device)
        vectors = codec.decode(code.narrow(first, last).flatten(), context).unflatten(0, (batch, -1))
        rows = vectors.unflatten(2, (like.shape[1], like.shape[3])).transpose(1, 2)
        seen = None
        if self.cross_layer.readers:
            seen = as_context(vectors) if self.code_space is self.space else self._shown(rows, token)
        return rows, seen

    # -- piece by piece, for attention that reads codes ---------------------------------------------------------------

    def begin_reading(self, like: Like, added: int = 0) -> None:
        """Show what readers see from now on: of codes, the last `added` at once, and others as pieces are read."""
        self._buffer = self._matrix = None
        if not self.cross_layer.readers:
            return
        if self.codec is None:
            seen = [] if self.window_rows is None else [self._shown(self.window_rows, self._first_coded())]
            self.cross_layer.offer(seen[0] if seen else None, self._first_coded())
        elif self.code is not None:
            batch, coded = self.code.shape
            self._buffer = torch.empty(batch, coded, self.codec.width, dtype=torch.float16, device=like.device)
            self.cross_layer.offer(self._buffer, self._first_coded())
            if added:
                _, seen_now = self._decoded_codes(self.codec, self.code, coded - added, coded, like)
                assert seen_now is not None, "there are readers"
                self._buffer[:, coded - added :] = seen_now

    def piece(self, first: int, last: int, like: Like) -> tuple[Rows, int | None]:
        """Tokens `first` to `last` of those held, all of them sinks, codes, or in the window; in any float dtype.

        And, where these are in the key space of codes and not as cached, which token of the sequence they begin with.
        """
        sinks, coded, _ = self._lengths()
        if last <= sinks and self.sink_rows is not None:
            return self.sink_rows[:, :, first:last], None
        if first >= sinks + coded and self.window_rows is not None:
            return self.window_rows[:, :, first - sinks - coded : last - sinks - coded], None
        assert self.codec is not None
        assert self.code is not None
        assert sinks <= first
        assert last <= sinks + coded
        rows, seen = self._decoded_codes(self.codec, self.code, first - sinks, last - sinks, like)
        if self._buffer is not None and seen is not None:
            self._buffer[:, first - sinks : last - sinks] = seen
        return rows, None if self.code_space is None else self._first_coded() + first - sinks

    def factored(self, first: int, last: int) -> Factored | None:
        """The same tokens as products, `[batch * tokens]` of them, where decoding is one and nobody else sees them."""
        if self.codec is None or self.code is None or not self.holds_codes(first, last) or self.code_space is not None:
            return None
        if self.cross_layer.readers or self.codec.n_context_layers:
            return None
        return self.codec.factored(self._codes(self.code, first, last))

    @property
    def has_loops(self) -> bool:
        """Whether compiled loops can read all the codes that are held."""
        if self.codec is None or self.code is None:
            return True
        return self.codec.has_packed_rows and self.batch == 1 and not self.cross_layer.readers

    def holds_codes(self, first: int, last: int) -> bool:
        """Whether these tokens are codes, all of them."""
        sinks, coded, _ = self._lengths()
        return sinks <= first and last <= sinks + coded

    def packed(self, first: int, last: int) -> PackedRows:
        """Tokens that are codes, as compiled loops read them, where there are some (`has_loops`)."""
        assert self.codec is not None
        assert self.code is not None
        sinks, coded, _ = self._lengths()
        matrix = self.codec.loop_matrix() if self._matrix is None else self._matrix
        # The exact window is read after the last code, and would stand beside a matrix that nobody reads any more.
        self._matrix = None if last == sinks + coded else matrix
        return self.codec.packed_rows(self._codes(self.code, first, last), matrix)

    def meeting(self, first: int, last: int, queries: Float[torch.Tensor, "1 heads groups head_dim"]) -> Meeting:
        """How keys that are codes, read by compiled loops, meet the queries of one token."""
        if self.code_space is None:
            return Meeting.as_cached(queries[0])
        place = self._first_coded() + first - _length(self.sink_rows)
        return self.code_space.meeting(queries, place, last - first)

    def _codes(self, code: CodeRuns, first: int, last: int) -> Code:
        """Of tokens held, `[batch * tokens]`."""
        sinks = _length(self.sink_rows)
        return code.narrow(first - sinks, last - sinks).flatten()

    def end_reading(self) -> None:
        """All pieces were read: let go of what this store predicts from."""
        self.cross_layer.end()
        self._buffer = self._matrix = None
        if self.space is not None:
            self.space.end()

    def borders(self) -> set[int]:
        """Numbers of tokens held at which sinks, runs of codes or window begin or end."""
        sinks, coded, window = self._lengths()
        runs = () if self.code is None else self.code.borders()
        return {0, sinks, *(sinks + first for first in runs), sinks + coded, sinks + coded + window}

    def piece_length(self, device: torch.device) -> int:
        """Tokens that are decoded at a time: what codes are predicted from stands beside them, so there are fewer."""
        return max(1, (PIECE if device.type == "cpu" else GPU_PIECE) // (1 + len(self.cross_layer.sources)))

    def _shown(self, rows: Rows, first: int) -> torch.Tensor:
        """What readers see of `rows` as cached, `[B, T, W]`, the first of them token `first`."""
        if self.space is not None:
            rows = self.space.enter(rows, first)
        return as_context(_as_vectors(rows))

    def _first_coded(self) -> int:
        """Which token of the sequence the codes begin with."""
        return self.seen - len(self) + _length(self.sink_rows)

    def __len__(self) -> int:
        return sum(self._lengths())

    def _lengths(self) -> tuple[int, int, int]:
        return _length(self.sink_rows), self.n_codes, _length(self.window_rows)

    @property
    def n_codes(self) -> int:
        """Tokens held as codes."""
        return 0 if self.code is None else self.code.shape[1]

    @property
    def batch(self) -> int:
        """Rows held; 0 where there are no tokens."""
        held = [len(rows) for rows in (self.sink_rows, self.window_rows) if rows is not None]
        return held[0] if held else 0 if self.code is None else self.code.shape[0]

    def keep(self, start: int, stop: int) -> None:
        """Forget all tokens but those from `start` to `stop`, counted from the first one held."""
        sinks, coded, _ = self._lengths()
        self.seen -= max(len(self) - stop, 0)

        first, last = overlap(start - sinks, stop - sinks, coded)
        if last == first:
            self.code = None
        elif self.code is not None and last - first < coded:
            self.code = CodeRuns([self.code.narrow(first, last).clone()])
        behind = sinks + coded
        self.sink_rows = cut(self.sink_rows, start, stop)
        self.window_rows = cut(self.window_rows, start - behind, stop - behind)

    def index(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, by number (any number of times) or by mask, in this order."""
        if self.sink_rows is not None:
            self.sink_rows = self.sink_rows[rows.to(self.sink_rows.device)]
        if self.code is not None:
            self.code = self.code.index(rows)
        if self.window_rows is not None:
            self.window_rows = self.window_rows[rows.to(self.window_rows.device)]
        if self.space is not None:
            self.space.index(rows)

    def to(self, device: torch.device) -> None:
        """Bring everything held to a device, without waiting for it."""
        if self.sink_rows is not None:
            self.sink_rows = self.sink_rows.to(device, non_blocking=True)
        if self.code is not None:
            self.code = self.code.to(device, non_blocking=True)
        if self.window_rows is not None:
            self.window_rows = self.window_rows.to(device, non_blocking=True)

    def serialized(self) -> list[bytes]:
        """What is held as it would be stored: sinks and window as they are, codes serialized, a stream for each row."""
        exact = [rows for rows in (self.sink_rows, self.window_rows) if rows is not None]
        streams = [rows.contiguous().view(torch.uint8).cpu().numpy().tobytes() for rows in exact]
        if self.code is not None and self.codec is not None:
            streams += [self.codec.serialize(row) for row in self.code.whole().rows()]
        return streams


def _as_vectors(rows: Rows) -> Float[torch.Tensor, "batch tokens width"]:
    return rows.transpose(1, 2).flatten(2)


def _length(rows: torch.Tensor | None) -> int:
    return 0 if rows is None else rows.shape[2]


def overlap(start: int, stop: int, count: int) -> tuple[int, int]:
    """What of `start` to `stop` lies within the first `count`."""
    first = min(max(start, 0), count)
    return first, min(max(stop, first), count)


def cut(rows: torch.Tensor | None, start: int, stop: int) -> torch.Tensor | None:
    """Tokens `start` to `stop` of those there are; None for none."""
    first, last = overlap(start, stop, _length(rows))
    if rows is None or last == first:
        return None
    # A view would keep all of the storage alive: hence a copy.
    return rows if last - first == rows.shape[2] else rows[:, :, first:last].clone()


def _behind(first: torch.Tensor | None, second: torch.Tensor) -> torch.Tensor:
    """`first` (or nothing) and `second` along the tokens; always a copy, so that the model's own can be freed."""
    return second.clone() if first is None else torch.cat([first, second], dim=2)

"""What stores hold, as tensors that a file can take: codes serialized by their codecs, all else as it is.

Saved caches and the pages of a prefix store are made of it. All cores take part: a stream is one store's codes of one
row of the batch, and no stream needs another.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int

from leankv.cache.layers import LeanLayer
from leankv.codecs import Code, Codec
from leankv.errors import UserError
from leankv.storage.files import hash_of

STREAMS = "streams"
"""The tensor with all streams behind each other; others are named `LAYER.PART.KIND`."""

MOST_TOKENS = 2**31 - 1  # assumption: of any sequence

TOKEN_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

EXPANDED, ALLOWANCE = 10, 16 * 1024**2
"""Codes may take so many times the bytes of their file in memory, and so many bytes beside. Streams are smaller than
codes, and tokens may take no bits at all; a file that claims more is not believed (assumption)."""


@dataclass(frozen=True)
class Held:
    """What one store holds: three runs of tokens behind each other, each None where it is empty.

    Attributes:
        sinks: `[B, heads, tokens, head_dim]`, exact.
        code: `[B, tokens]`.
        window: `[B, heads, tokens, head_dim]`, exact.
    """

    sinks: torch.Tensor | None = None
    code: Code | None = None
    window: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens."""
        exact = sum(rows.shape[2] for rows in (self.sinks, self.window) if rows is not None)
        return exact + (0 if self.code is None else self.code.shape[1])

    @property
    def batch(self) -> int:
        """Rows; 0 where nothing is held."""
        exact = [len(rows) for rows in (self.sinks, self.window) if rows is not None]
        return exact[0] if exact else 0 if self.code is None else self.code.shape[0]


@dataclass(frozen=True)
class Room:
    """What a store can hold.

    Attributes:
        codec: of its codes; None where there are none.
        heads: of its vectors.
        head_dim: numbers of a head.
        sinks: most exact tokens in front.
    """

    codec: Codec | None
    heads: int
    head_dim: int
    sinks: int


def held_by(layers: Sequence[Any]) -> dict[str, Held]:
    """What each store of a cache's layers holds, by `LAYER.PART`; exact layers hold all as their window."""
    found: dict[str, Held] = {}
    for number, layer in enumerate(layers):
        if isinstance(layer, LeanLayer):
            own = {
                part: Held(store.sink_rows, None if store.code is None else store.code.whole(), store.window_rows)
                for part, store in layer.parts.items()
            }
        elif layer.is_initialized:
            own = {"k": Held(window=layer.keys), "v": Held(window=layer.values)}
        else:
            own = {}
        found |= {f"{number}.{part}": held for part, held in own.items()}
    return found


def hash_of_tokens(tokens: Int[torch.Tensor, "B T"], batch: int, seen: int) -> str:
    """sha256 (hex) of the ids of what a cache took in.

    Args:
        tokens: ids; more may follow behind.
        batch: rows that the cache holds.
        seen: tokens of each row that it took in.

    Raises:
        UserError: they are no ids, or not of so many rows and tokens.
    """
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2 or tokens.dtype not in TOKEN_DTYPES:
        raise UserError("the tokens of a cache are a tensor of whole numbers [rows, tokens]; give the input_ids")
    if (len(tokens) != batch and seen) or tokens.shape[1] < seen:
        raise UserError(
            f"the cache took in {seen} tokens in each of {batch} rows, and the tokens given are "
            f"{list(tokens.shape)}; give the ids of all that it was fed"
        )
    return hash_of(tokens[:, :seen].tolist())


class DamagedError(Exception):
    """What a file says cannot be; says what."""


def tensors_of(
    held: Mapping[str, Held], codecs: Mapping[str, Codec]
) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """Tensors, and a table: store -> how many tokens are codes, and the bytes of each row's stream.

    Args:
        held: `LAYER.PART` -> what it holds.
        codecs: of the stores that hold codes.
    """
    tensors: dict[str, torch.Tensor] = {}
    work: list[Callable[[], bytes]] = []
    coded: dict[str, int] = {}
    for name, own in held.items():
        exact = {"sinks": own.sinks, "window": own.window}
        tensors |= {f"{name}.{kind}": rows.cpu().contiguous() for kind, rows in exact.items() if rows is not None}
        if own.code is not None:
            coded[name] = own.code.shape[1]
            work += [_serializing(codecs[name], row) for row in own.code.rows()]
    streams = iter(_on_all_cores(work))
    table, pieces = {}, []
    for name, tokens in coded.items():
        own_streams = [next(streams) for _ in range(held[name].batch)]
        table[name] = [tokens, *map(len, own_streams)]
        pieces += own_streams
    joined = bytearray().join(pieces)
    tensors[STREAMS] = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
    return tensors, table


@dataclass(frozen=True)
class Sealed:
    """What a file has of one store, checked, and not yet decoded.

    Attributes:
        sinks: as in `Held`.
        streams: of the rows of a batch; empty where nothing is coded.
        tokens: in each stream.
        window: as in `Held`.
    """

    sinks: torch.Tensor | None
    streams: tuple[bytes, ...]
    tokens: int
    window: torch.Tensor | None

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.tokens + sum(rows.shape[2] for rows in (self.sinks, self.window) if rows is not None)


def sealed_in(
    tensors: Mapping[str, torch.Tensor], table: Mapping[str, Any], rooms: Mapping[str, Room], batch: int
) -> dict[str, Sealed]:
    """What `tensors_of` made, checked before memory is taken for what it stands for.

    Args:
        tensors: as a file has them.
        table: likewise.
        rooms: what each store can hold.
        batch: rows of everything.

    Raises:
        DamagedError: something is of another kind or size than a store's.
    """
    streams = tensors.get(STREAMS)
    if streams is None or streams.dtype != torch.uint8 or streams.ndim != 1:
        raise DamagedError("it has no streams")
    exact = {name: rows for name, rows in tensors.items() if name != STREAMS}
    unknown = [name for name in exact if name.rpartition(".")[0] not in rooms] + [n for n in table if n not in rooms]
    if unknown:
        raise DamagedError(f"{unknown[0]!r} belongs to no codec")
    lengths = {name: _checked_lengths(name, own, rooms[name], batch) for name, own in table.items()}
    claimed = sum(
        batch * own[0] * codec.bits_per_token / 8
        for name, own in lengths.items()
        if (codec := rooms[name].codec) is not None
    )
    file_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if claimed > EXPANDED * file_bytes + ALLOWANCE:
        raise DamagedError(f"it claims more tokens than its {file_bytes} bytes can hold")
    if sum(sum(own[1:]) for own in lengths.values()) != len(streams):
        raise DamagedError("its streams have other lengths than it says")
    data, place = streams.numpy(), 0
    cut: dict[str, tuple[bytes, ...]] = {}
    for name, (_, *sizes) in lengths.items():
        ends = [place + sum(sizes[: number + 1]) for number in range(batch)]
        cut[name] = tuple(data[end - size : end].tobytes() for end, size in zip(ends, sizes, strict=True))
        place = ends[-1]
    found: dict[str, Sealed] = {}
    for name, room in rooms.items():
        sinks, window = (_checked_rows(name, kind, exact, room, batch) for kind in ("sinks", "window"))
        if sinks is not None and sinks.shape[2] > room.sinks:
            raise DamagedError(f"{name} has {sinks.shape[2]} sinks, more than {room.sinks}")
        tokens = lengths[name][0] if name in lengths else 0
        found[name] = Sealed(sinks, cut.get(name, ()), tokens, window)
    return found


def opened(pages: Sequence[Mapping[str, Sealed]], rooms: Mapping[str, Room]) -> dict[str, Held]:
    """What files have of each store, decoded; several are pages of one row, behind each other.

    Raises:
        DamagedError: a stream cannot be read.
    """
    coded = {name: [page[name] for page in pages if page[name].streams] for name in rooms}
    work = {name: _deserializing(rooms[name], own) for name, own in coded.items() if own}
    try:
        codes = dict(zip(work, _on_all_cores(work.values()), strict=True))
    # What codecs raise on what none has written. Torch's RuntimeError is none of it: memory may be short.
    except (ValueError, IndexError) as error:
        raise DamagedError(f"a stream cannot be read: {error}") from error
    found: dict[str, Held] = {}
    for name in rooms:
        windows = [rows for page in pages if (rows := page[name].window) is not None]
        window = torch.cat(windows, dim=2) if len(windows) > 1 else windows[0] if windows else None
        found[name] = Held(pages[0][name].sinks, codes.get(name), window)
    return found


def _checked_lengths(name: str, own: Any, room: Room, batch: int) -> list[int]:
    is_list = isinstance(own, list) and all(isinstance(n, int) and 0 <= n <= MOST_TOKENS for n in own)
    if not is_list or len(own) != batch + 1 or own[0] < 1 or room.codec is None:
        raise DamagedError(f"what it says of the codes of {name} cannot be")
    return list(own)


def _checked_rows(
    name: str, kind: str, exact: Mapping[str, torch.Tensor], room: Room, batch: int
) -> torch.Tensor | None:
    rows = exact.get(f"{name}.{kind}")
    if rows is None:
        return None
    if not rows.is_floating_point() or rows.ndim != 4 or not 1 <= rows.shape[2] <= MOST_TOKENS:
        raise DamagedError(f"{name}.{kind} is no exact vectors")
    if (rows.shape[0], rows.shape[1], rows.shape[3]) != (batch, room.heads, room.head_dim):
        raise DamagedError(f"{name}.{kind} has shape {list(rows.shape)}, not that of {batch} rows of this model's")
    return rows


def _serializing(codec: Codec, code: Code) -> Callable[[], bytes]:
    return lambda: codec.serialize(code)


def _deserializing(room: Room, pages: Sequence[Sealed]) -> Callable[[], Code]:
    assert room.codec is not None, "no codec, no streams"
    codec, batch = room.codec, len(pages[0].streams)
    streams = [stream for page in pages for stream in page.streams]
    tokens = [page.tokens for page in pages for _ in page.streams]
    return lambda: codec.deserialize_all(streams, tokens).unflatten(batch)


def _on_all_cores(work: Iterable[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return [each.result() for each in [pool.submit(own) for own in work]]

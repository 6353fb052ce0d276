"""Lossless entropy coding of integers by static probabilities, with constriction's asymmetric numeral systems (ANS).

Each column of a chunk has a table of probabilities of the values -K to K and of "another value", which is then written
in 16 bits (`leankv.codecs.coding.shapes` makes them). One chunk is one stream: its overhead is 4 to 8 bytes, and a bit
a column. Where numba is installed, the same streams are written and read by compiled loops (`leankv.compiled.ans`).
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from jaxtyping import Float, Float32, Float64, Int64

from leankv import compiled

OTHER_OFFSET, OTHER_RANGE = 1 << 15, 1 << 16  # values outside of a table: -32768 to 32767


def frequencies_of(
    q: Int64[torch.Tensor, "tokens integers"], largest: int
) -> Float32[torch.Tensor, "integers {2*largest+2}"]:
    """Counts of the values -K to K (K is `largest`), and of all others, in each column of `q`."""
    flat = _symbols(q, largest) + torch.arange(q.shape[1], device=q.device) * (2 * largest + 2)
    counts = torch.bincount(flat.flatten(), minlength=q.shape[1] * (2 * largest + 2))
    return counts.reshape(q.shape[1], 2 * largest + 2).float()


def entropy_of(frequencies: Float[torch.Tensor, "integers symbols"]) -> Float64[torch.Tensor, " integers"]:
    """Entropy of each column in bits a value."""
    p = frequencies.double() / frequencies.sum(dim=1, keepdim=True)
    return -(p * p.clamp_min(1e-300).log2()).sum(dim=1)


def bits_of(
    q: Int64[torch.Tensor, "tokens integers"], probabilities: Float64[torch.Tensor, "integers symbols"]
) -> float:
    """Bits that `encode_columns` takes for `q`, its few bytes of overhead left out."""
    largest = probabilities.shape[1] // 2 - 1
    surprise = -(probabilities / probabilities.sum(dim=1, keepdim=True)).log2()
    surprise[:, -1] += math.log2(OTHER_RANGE)
    return float(surprise.gather(1, _symbols(q, largest).T.to(surprise.device)).sum())


def _symbols(q: torch.Tensor, largest: int) -> torch.Tensor:
    """Columns of a table of frequencies: 0 to 2 K for the values -K to K, then one for all others."""
    return torch.where(q.abs() <= largest, q + largest, 2 * largest + 1)


def encode_columns(
    q: Float32[torch.Tensor, "tokens integers"], probabilities: Float[torch.Tensor, "integers symbols"]
) -> bytes:
    """Bytes of whole numbers `q`, coded column by column; of those that are zero throughout a bit says so."""
    columns, largest = q.cpu().T.contiguous(), probabilities.shape[1] // 2 - 1
    if len(q):
        low, high = columns.aminmax(dim=1)
        size = torch.maximum(high, -low)
    else:
        size = torch.zeros(len(columns))
    is_used = size > 0
    columns, tables = columns[is_used], probabilities[is_used].numpy().astype(numpy.float32)
    outside = columns.new_empty(0)
    if (size > largest).any():
        outside = columns.T[(columns.abs() > largest).T]  # token by token
    head = struct.pack("<I", len(outside)) + numpy.packbits(is_used.numpy()).tobytes()
    others = (outside.numpy().astype(numpy.int32) + OTHER_OFFSET).astype(numpy.uint16)
    encode = compiled.encode_symbols if compiled.serves(columns) else _encode_symbols
    return head + encode(columns, tables, others).astype("<u4").tobytes()


def decode_columns(
    streams: Sequence[bytes], tokens: Sequence[int], probabilities: Float[torch.Tensor, "integers symbols"]
) -> Float32[torch.Tensor, "_ integers"]:
    """The way back, of streams of so many tokens, behind each other.

    Raises:
        ValueError: one is no stream. Many other bytes give some numbers or others.
    """
    tables, count = probabilities.numpy().astype(numpy.float32), len(probabilities)
    columns, first = torch.zeros(count, sum(tokens)), 0
    is_compiled = compiled.serves(probabilities)
    tables = compiled.borders_of(tables) if is_compiled else tables
    decode = compiled.decode_symbols if is_compiled else _decode_symbols
    for data, length in zip(streams, tokens, strict=True):
        start = 4 + (count + 7) // 8
        if len(data) < start or (len(data) - start) % 4:
            raise ValueError("a stream is cut off")
        (n_others,) = struct.unpack_from("<I", data)
        if n_others > length * count:
            raise ValueError("a stream names more values than it has")
        is_used = numpy.unpackbits(numpy.frombuffer(data, numpy.uint8, start - 4, 4), count=count).astype(bool)
        words = numpy.frombuffer(data, "<u4", offset=start).astype(numpy.uint32)
        found, others = decode(words, length, n_others, tables[is_used])
        _put_others(found, others, probabilities.shape[1] // 2)
        columns[torch.from_numpy(is_used), first : first + length] = found
        first += length
    return columns.T  # as decoders have them, the tokens of an integer beside each other


def _put_others(found: torch.Tensor, others: Any, outside: int) -> None:
    """Put values from outside of tables where `outside` stands for them, token by token."""
    places = (found == outside).T
    if int(places.sum()) != len(others):
        raise ValueError("a stream names other values than it has")
    if len(others):
        found.T[places] = torch.from_numpy(others.astype(numpy.float32) - OTHER_OFFSET)


def _encode_symbols(columns: torch.Tensor, tables: Any, others: Any) -> Any:
    import constriction

    largest = tables.shape[1] // 2 - 1
    coder = constriction.stream.stack.AnsCoder()
    symbols = torch.where(columns.abs() <= largest, columns + largest, 2 * largest + 1).numpy().astype(numpy.int32)
    # A stack: what is written last is read first.
    if len(others):
        coder.encode_reverse(others.astype(numpy.int32), _uniform())
    for own, table in reversed(list(zip(symbols, tables, strict=True))):
        coder.encode_reverse(own, _model(table))
    return coder.get_compressed()


def _decode_symbols(words: Any, tokens: int, n_others: int, tables: Any) -> tuple[torch.Tensor, Any]:
    import constriction

    largest = tables.shape[1] // 2 - 1
    coder = constriction.stream.stack.AnsCoder(words)
    columns = torch.empty(len(tables), tokens)
    for own, table in zip(columns, tables, strict=True):
        own.copy_(torch.from_numpy(coder.decode(_model(table), tokens) - largest))
    others = coder.decode(_uniform(), n_others) if n_others else numpy.empty(0)
    return columns, others


def _model(table: Any) -> Any:
    import constriction

    return constriction.stream.model.Categorical(table, perfect=False)


def _uniform() -> Any:
    import constriction

    return constriction.stream.model.Uniform(OTHER_RANGE)

"""Lossless entropy coding of integers by static probabilities, with constriction's asymmetric numeral systems (ANS).

Each column of a chunk has a table of probabilities of the values -K to K and of "another value", which is then written
in 16 bits (`leankv.codecs.coding.shapes` makes them). One chunk is one stream: its overhead is some 4 bytes, not some
bits a value.
"""

import math
import struct
from typing import Any

import numpy
import torch
from jaxtyping import Float, Float32, Float64, Int64

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
    q: Int64[torch.Tensor, "tokens integers"], probabilities: Float64[torch.Tensor, "integers symbols"]
) -> bytes:
    """Bytes of `q`, coded column by column."""
    import constriction

    largest = probabilities.shape[1] // 2 - 1
    coder = constriction.stream.stack.AnsCoder()
    symbols = q.numpy()
    outside = numpy.abs(symbols) > largest
    others = symbols[outside].astype(numpy.int32) + OTHER_OFFSET
    coded = numpy.where(outside, 2 * largest + 1, symbols + largest).astype(numpy.int32)
    # A stack: what is written last is read first.
    if len(others):
        coder.encode_reverse(others, _uniform())
    for column in reversed(range(q.shape[1])):
        coder.encode_reverse(numpy.ascontiguousarray(coded[:, column]), _model(probabilities[column]))
    return struct.pack("<I", len(others)) + coder.get_compressed().tobytes()


def decode_columns(
    data: bytes, tokens: int, probabilities: Float64[torch.Tensor, "integers symbols"]
) -> Int64[torch.Tensor, "{tokens} integers"]:
    """The way back."""
    import constriction

    largest = probabilities.shape[1] // 2 - 1
    (n_others,) = struct.unpack_from("<I", data)
    coder = constriction.stream.stack.AnsCoder(numpy.frombuffer(data, dtype=numpy.uint32, offset=4))
    if not len(probabilities):
        return torch.empty(tokens, 0, dtype=torch.int64)
    columns = [coder.decode(_model(row), tokens) for row in probabilities]
    symbols = numpy.stack(columns, axis=1).astype(numpy.int64)
    outside = symbols == 2 * largest + 1
    symbols -= largest
    if n_others:
        symbols[outside] = coder.decode(_uniform(), n_others) - OTHER_OFFSET
    return torch.from_numpy(symbols)


def _model(probabilities: torch.Tensor) -> Any:
    import constriction

    return constriction.stream.model.Categorical(probabilities.numpy().astype(numpy.float32), perfect=False)


def _uniform() -> Any:
    import constriction

    return constriction.stream.model.Uniform(OTHER_RANGE)

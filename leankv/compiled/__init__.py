"""Inner loops that numba compiles for the CPU, where it is installed (`pip install 'leankv[cpu]'`).

Torch runs decoding as many small operations, each a pass over memory. Every loop here has its twin of torch operations
beside its caller, which serves where numba is missing, and on other devices. Twins agree to the last bits of float32.
"""

from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy
import torch


@cache
def _kernels() -> Any:
    # Numba takes half a second to import; nothing needs it before something is decoded.
    return import_module("leankv.compiled.kernels")


@cache
def _ans() -> Any:
    return import_module("leankv.compiled.ans")


@cache
def compiler() -> str:
    """Which compiler these loops go through, for the key of what is measured; `none` where it is missing."""
    return f"numba {version('numba')}" if find_spec("numba") else "none"


def serves(tensor: torch.Tensor) -> bool:
    """Whether compiled loops can work on a tensor like this: on the CPU, and no gradient is wanted."""
    is_differentiated = tensor.requires_grad and torch.is_grad_enabled()
    return tensor.device.type == "cpu" and not is_differentiated and compiler() != "none"


def packed_numbers(numbers: torch.Tensor, bits: int, n_bytes: int) -> torch.Tensor:
    """Whole numbers `[N, count]` of any dtype, each of so many bits: uint8 `[N, n_bytes]`."""
    packed = torch.empty(len(numbers), n_bytes, dtype=torch.uint8)
    _kernels().pack_numbers(array_of(numbers.to(torch.uint8)), bits, packed.numpy())
    return packed


def affine_levels(
    packed: torch.Tensor, bits: int, low: torch.Tensor, step: torch.Tensor, group: int, width: int
) -> torch.Tensor:
    """`low + step q` of packed numbers: `[N, width]`, float32.

    Args:
        packed: uint8 `[N, bytes]`, as `leankv.codecs.coding.packing.pack` makes it.
        bits: of a number.
        low, step: `[N, width / group]`, of each group of neighbouring numbers; or one row for all.
        group: numbers in a group.
        width: numbers in a row.
    """
    out = torch.empty(len(packed), width)
    low, step = (side.detach().float().contiguous().reshape(-1, width // group) for side in (low, step))
    _kernels().affine_levels(array_of(packed), 0, len(packed), bits, low.numpy(), step.numpy(), group, out.numpy())
    return out


def table_levels(packed: torch.Tensor, bits: int, table: torch.Tensor, width: int) -> torch.Tensor:
    """`table[q]` of packed numbers: `[N, width]`, float32."""
    out = torch.empty(len(packed), width)
    _kernels().table_levels(array_of(packed), bits, array_of(table), out.numpy())
    return out


def radix_values(
    packed: torch.Tensor,
    places: torch.Tensor,
    columns: torch.Tensor,
    factor: torch.Tensor,
    levels: torch.Tensor,
    low: torch.Tensor,
) -> torch.Tensor:
    """What `leankv.codecs.coding.mixed_radix.MixedRadix.values` gives, token by token neighbours in memory.

    Args:
        packed: uint8 `[N, bytes]`.
        places: int32 `[P]`, the byte that each packed integer lies in.
        columns: int32 `[P]`, which of the J integers it is.
        factor: float32 `[P]`, what it is multiplied by in its byte.
        levels: float32 `[J]`.
        low: float32 `[J]`.
    """
    out = torch.empty(len(low), len(packed))
    arrays = [array_of(tensor) for tensor in (packed, places, columns, factor, levels, low)]
    _kernels().radix_values(*arrays, out.numpy())
    return out.T


def radix_packed(
    q: torch.Tensor,
    places: torch.Tensor,
    columns: torch.Tensor,
    factor: torch.Tensor,
    levels: torch.Tensor,
    low: torch.Tensor,
    n_bytes: int,
) -> torch.Tensor:
    """What `leankv.codecs.coding.mixed_radix.MixedRadix.pack` gives, of float32 `[N, J]`; see `radix_values`."""
    packed = torch.zeros(len(q), n_bytes, dtype=torch.uint8)
    arrays = [array_of(tensor) for tensor in (q.T, places, columns, factor, levels, low)]
    _kernels().pack_radix(*arrays, packed.numpy())
    return packed


def escapes_of(
    q: torch.Tensor, low: torch.Tensor, levels: torch.Tensor, item: int, linear: int, fine: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Items `[total, item]` of what is out of its range in float32 `[N, J]`, and how many each token has, int32 `[N]`.

    Args:
        q: whole numbers that an item can say.
        low, levels: float32 `[J]`, the ranges.
        item: bytes of one, 2 or 3: which integer, in one byte or two, and a byte for its value.
        linear: sizes up to it are exact.
        fine: larger ones stand `2^(1/fine)` apart.
    """
    counts = torch.zeros(len(q), dtype=torch.int32)
    columns, ends = array_of(q.T), [array_of(tensor) for tensor in (low, levels)]
    _kernels().count_outside(columns, *ends, counts.numpy())
    starts = counts.cumsum(0) - counts
    items = torch.empty(int(counts.sum()), item, dtype=torch.uint8)
    _kernels().take_escapes(columns, *ends, starts.numpy(), linear, fine, items.numpy())
    return items, counts


def put_escapes(q: torch.Tensor, counts: torch.Tensor, items: torch.Tensor, sizes: torch.Tensor) -> None:
    """Set the integers that escapes say, in place.

    Args:
        q: float32 `[N, J]`, as `radix_values` gives it.
        counts: uint8 `[N]`, escapes of each token.
        items: uint8 `[total, 2 or 3]`: which integer, in one byte or two, and a byte for its value.
        sizes: float32 `[256]`, the value that each such byte means.
    """
    _kernels().put_escapes(0, len(q), array_of(counts), array_of(items), 0, array_of(sizes), q.T.numpy())


Array = numpy.ndarray[Any, numpy.dtype[Any]]


def encode_symbols(columns: torch.Tensor, probabilities: Array, others: Array) -> Array:
    """The words that constriction's `AnsCoder` would write: columns, the first on top, above what is outside of tables.

    Args:
        columns: float32 `[J, N]`, whole numbers.
        probabilities: float32 `[J, 2 K + 2]`, of -K to K and of all others.
        others: uint16, those, token by token, in the order in which they are read.
    """
    largest = probabilities.shape[1] // 2 - 1
    return numpy.asarray(_ans().encode(array_of(columns), largest, borders_of(probabilities), others))


def decode_symbols(words: Array, tokens: int, n_others: int, borders: Array) -> tuple[torch.Tensor, Array]:
    """The way back: `[J, N]`, in which K + 1 stands for what is outside of the table, and the others, uint16.

    Args:
        words: uint32.
        tokens: N.
        n_others: how many are outside of their tables.
        borders: `borders_of` the probabilities.
    """
    largest = (borders.shape[1] - 3) // 2
    q, others = torch.empty(len(borders), tokens), numpy.empty(n_others, numpy.uint16)
    _ans().decode(words, largest, borders, q.numpy(), others)
    return q, others


def borders_of(probabilities: Array) -> Array:
    """What lies before each symbol, of 2^24, and the end, uint32 `[J, 2 K + 3]`.

    As constriction rounds probabilities (`fast_quantized_cdf`): in float32, with one added for each symbol, so that
    none is impossible.
    """
    symbols = probabilities.shape[1]
    sums = numpy.cumsum(probabilities, axis=1, dtype=numpy.float32)
    before = numpy.concatenate([numpy.zeros_like(sums[:, :1]), sums[:, :-1]], axis=1)
    scale = numpy.float32((1 << _ans().PRECISION) - symbols) / sums[:, -1:]
    left = (before * scale).astype(numpy.uint32) + numpy.arange(symbols, dtype=numpy.uint32)
    end = numpy.full((len(left), 1), 1 << _ans().PRECISION, dtype=numpy.uint32)
    return numpy.concatenate([left, end], axis=1)


def rotated(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, halves: bool) -> torch.Tensor:
    """What `leankv.models.rope.rotate` gives of `[B, heads, T, head_dim]`; else as `rotated_by_token`."""
    return rotated_by_token(k.detach().transpose(1, 2), cos, sin, halves).transpose(1, 2)


def rotated_by_token(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, halves: bool) -> torch.Tensor:
    """The same, where all heads of a token are neighbours.

    Args:
        k: `[B, T, heads, head_dim]`.
        cos, sin: `[B or 1, T or 1, rotary]`.
        halves: whether the pairs are halves of the rotated dimensions, or else neighbours.
    """
    by_token = k.float().contiguous()
    out = torch.empty_like(by_token)
    tables = [array_of(table.float().expand(-1, by_token.shape[1], -1)) for table in (cos, sin)]
    assert all(len(table) in (1, len(by_token)) for table in tables), "loops read where they are told to"
    _kernels().rotate(by_token.numpy(), *tables, halves, out.numpy())
    return out


def array_of(tensor: torch.Tensor) -> Any:
    """What loops take: the tensor's own memory, where it is contiguous."""
    return (tensor.detach() if tensor.requires_grad else tensor).contiguous().numpy()

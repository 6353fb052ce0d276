"""Small unsigned integers in whole bytes: J numbers of b bits take `ceil(J b / 8)` bytes a row.

Little-endian throughout: number j of a row occupies bits `b j` to `b j + b - 1` of it, the lowest bit of a byte first.
"""

import torch
from jaxtyping import Float, Shaped, UInt8

from leankv import compiled


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that a row of `count` numbers of `bits` bits takes."""
    return -(-count * bits // 8)


def pack(values: Shaped[torch.Tensor, "tokens count"], bits: int) -> UInt8[torch.Tensor, "tokens bytes"]:
    """Pack whole numbers of any dtype, from 0 to `2^bits - 1`, into `ceil(count bits / 8)` bytes; bits from 1 to 8."""
    rows, count = values.shape
    if compiled.serves(values):
        return compiled.packed_numbers(values, bits, packed_bytes(count, bits))
    # Eight numbers are one word of `bits` bytes, whatever `bits` is, and a word fits an int64.
    words = torch.zeros(rows, -(-count // 8), dtype=torch.int64, device=values.device)
    for place in range(8):
        column = values[:, place::8]
        words[:, : column.shape[1]] |= column.long() << (bits * place)
    packed = torch.empty(rows, packed_bytes(count, bits), dtype=torch.uint8, device=values.device)
    for place in range(bits):
        column = packed[:, place::bits]
        column.copy_((words[:, : column.shape[1]] >> (8 * place)) & 0xFF)
    return packed


def unpack(packed: UInt8[torch.Tensor, "tokens bytes"], bits: int, count: int) -> UInt8[torch.Tensor, "tokens {count}"]:
    """The inverse of `pack`: uint8 `[N, count]`."""
    rows = packed.shape[0]
    if 8 % bits == 0:  # no number lies in two bytes
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        values = (packed[:, :, None] >> shifts) & (2**bits - 1)
        return values.flatten(1)[:, :count]
    words = torch.zeros(rows, -(-count // 8), dtype=torch.int64, device=packed.device)
    for place in range(bits):
        column = packed[:, place::bits]
        words[:, : column.shape[1]] |= column.long() << (8 * place)
    values = torch.empty(rows, count, dtype=torch.uint8, device=packed.device)
    for place in range(8):
        column = values[:, place::8]
        # Shifting a negative word brings ones in from the left; the mask drops them.
        column.copy_((words[:, : column.shape[1]] >> (bits * place)) & (2**bits - 1))
    return values


def looked_up(
    table: Float[torch.Tensor, " levels"], packed: UInt8[torch.Tensor, "tokens bytes"], bits: int, count: int
) -> Float[torch.Tensor, "tokens {count}"]:
    """`table[q]` of packed numbers `q`."""
    if compiled.serves(packed):
        return compiled.table_levels(packed, bits, table, count)
    return table[unpack(packed, bits, count).int()]

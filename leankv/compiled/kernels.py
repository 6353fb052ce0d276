"""The loops themselves; `leankv.compiled` says what they do. They run on one core, and let go of Python's lock.

Arrays are copied number by number: for `a[...] = b` numba also compiles the sentence that says how shapes differ, for
some seconds each.
"""

import math

import numpy
from numba import njit

TILE = 32
"""Tokens at a time: with 192 float32 numbers each they fit the first level of a core's own cache (32 KB)."""

HALF = numpy.float32(0.5)
ONE = numpy.float32(1)


@njit(nogil=True, cache=True)
def unpack_row(row, bits, numbers):  # type: ignore[no-untyped-def]
    """A row of bytes -> its numbers, the lowest bits of a byte first."""
    count = len(numbers)
    if bits == 4:
        for j in range(count // 2):
            numbers[2 * j] = row[j] & 15
            numbers[2 * j + 1] = row[j] >> 4
        if count % 2:
            numbers[count - 1] = row[count // 2] & 15
        return
    mask = (1 << bits) - 1
    for first in range(0, count, 8):  # eight numbers are one word of `bits` bytes
        word = 0
        start = first // 8 * bits
        for place in range(min(bits, len(row) - start)):
            word |= int(row[start + place]) << (8 * place)
        for place in range(min(8, count - first)):
            numbers[first + place] = (word >> (bits * place)) & mask


@njit(nogil=True, cache=True)
def pack_numbers(numbers, bits, packed):  # type: ignore[no-untyped-def]
    count = numbers.shape[1]
    for n in range(len(numbers)):
        row, into = numbers[n], packed[n]
        for first in range(0, count, 8):
            word = 0
            for place in range(min(8, count - first)):
                word |= int(row[first + place]) << (bits * place)
            start = first // 8 * bits
            for place in range(min(bits, len(into) - start)):
                into[start + place] = (word >> (8 * place)) & 255


@njit(nogil=True, cache=True)
def affine_levels(packed, first, count, bits, low, step, group, out):  # type: ignore[no-untyped-def]
    """Of `count` rows from the one numbered `first` on."""
    numbers = numpy.empty(out.shape[1], numpy.uint8)
    for n in range(count):
        side = first + n if len(low) > 1 else 0
        row, into = packed[first + n], out[n]
        if bits == 4 and group % 2 == 0:
            _pairs(row, low[side], step[side], group, into)
            continue
        unpack_row(row, bits, numbers)
        for g in range(low.shape[1]):
            bottom, size = low[side, g], step[side, g]
            for j in range(g * group, (g + 1) * group):
                into[j] = bottom + size * numpy.float32(numbers[j])


@njit(nogil=True, cache=True)
def _pairs(row, low, step, group, into):  # type: ignore[no-untyped-def]
    """Numbers of four bits, of which a byte holds two of one group. As slices and 32-bit integers these are vectors."""
    half = group // 2
    for g in range(len(low)):
        bottom, size = low[g], step[g]
        source, target = row[g * half : (g + 1) * half], into[g * group : (g + 1) * group]
        for j in range(half):
            both = numpy.int32(source[j])
            target[2 * j] = bottom + size * numpy.float32(numpy.int32(both & numpy.int32(15)))
            target[2 * j + 1] = bottom + size * numpy.float32(numpy.int32(both >> numpy.int32(4)))


@njit(nogil=True, cache=True)
def table_levels(packed, bits, table, out):  # type: ignore[no-untyped-def]
    numbers = numpy.empty(out.shape[1], numpy.uint8)
    for n in range(len(packed)):
        unpack_row(packed[n], bits, numbers)
        for j in range(out.shape[1]):
            out[n, j] = table[numbers[j]]


@njit(nogil=True, cache=True)
def radix_tile(packed, first, count, places, columns, factor, levels, low, bytes_, q):  # type: ignore[no-untyped-def]
    """Integers of `count` rows from the one numbered `first` on, column by column `[J, TILE]`.

    `bytes_` `[n_bytes, TILE]` is what it works in; behind `count`, both hold anything.
    """
    for j in range(len(low)):
        q[j, :] = low[j]
    for n in range(count):
        row = packed[first + n]
        for byte in range(len(row)):
            bytes_[byte, n] = row[byte]
    for p in range(len(places)):
        j = columns[p]
        above, radix, bottom = ONE / factor[p], levels[j], low[j]
        over = ONE / radix
        row, into = bytes_[places[p]], q[j]
        for n in range(TILE):
            # Whole numbers by cutting off, which vectors can; half a unit keeps them from where it would matter that a
            # reciprocal is inexact.
            left = numpy.float32(numpy.int32((row[n] + HALF) * above))
            into[n] = bottom + (left - radix * numpy.float32(numpy.int32((left + HALF) * over)))


@njit(nogil=True, cache=True)
def radix_values(packed, places, columns, factor, levels, low, out):  # type: ignore[no-untyped-def]
    bytes_ = numpy.zeros((packed.shape[1], TILE), numpy.float32)
    q = numpy.empty((len(low), TILE), numpy.float32)
    for first in range(0, len(packed), TILE):
        count = min(TILE, len(packed) - first)
        radix_tile(packed, first, count, places, columns, factor, levels, low, bytes_, q)
        for j in range(len(q)):
            for n in range(count):
                out[j, first + n] = q[j, n]


@njit(nogil=True, cache=True)
def count_outside(q, low, levels, counts):  # type: ignore[no-untyped-def]
    for j in range(len(q)):
        bottom, top = low[j], low[j] + levels[j]
        for n in range(q.shape[1]):
            if not (bottom <= q[j, n] < top):  # as `take_escapes` has it: of what is no number, too
                counts[n] += 1


@njit(nogil=True, cache=True)
def pack_radix(q, places, columns, factor, levels, low, packed):  # type: ignore[no-untyped-def]
    for p in range(len(places)):
        j, byte = columns[p], places[p]
        most, bottom, weight = levels[j] - ONE, low[j], factor[p]
        for n in range(q.shape[1]):
            packed[n, byte] += numpy.uint8(min(max(q[j, n] - bottom, numpy.float32(0)), most) * weight)


@njit(nogil=True, cache=True)
def take_escapes(q, low, levels, starts, linear, fine, items):  # type: ignore[no-untyped-def]
    wide = items.shape[1] == 3
    for j in range(len(q)):
        bottom, top = low[j], low[j] + levels[j]
        for n in range(q.shape[1]):
            value = q[j, n]
            if bottom <= value < top:
                continue
            size = abs(value)
            if size > linear:
                size = linear + round(fine * math.log2(size / linear))
            place = starts[n]
            items[place, 0] = j % 256
            if wide:
                items[place, 1] = j // 256
            items[place, items.shape[1] - 1] = int(size) + (128 if value < 0 else 0)
            starts[n] += 1


@njit(nogil=True, cache=True)
def put_escapes(first, count, counts, items, item, sizes, q):  # type: ignore[no-untyped-def]
    """Of `count` tokens from the one numbered `first` on, whose items begin with `item`; where the next ones begin."""
    wide = items.shape[1] == 3
    for n in range(count):
        for _ in range(counts[first + n]):
            which = int(items[item, 0])
            if wide:
                which += 256 * int(items[item, 1])
            q[which, n] = sizes[items[item, items.shape[1] - 1]]
            item += 1
    return item


@njit(nogil=True, cache=True)
def rotate(k, cos, sin, halves, out):  # type: ignore[no-untyped-def]
    batch, tokens, heads, head_dim = k.shape
    rotary = cos.shape[2]
    half = rotary // 2
    for b in range(batch):
        row = b if len(cos) > 1 else 0
        for n in range(tokens):
            own_cos, own_sin = cos[row, n], sin[row, n]
            for h in range(heads):
                vector, into = k[b, n, h], out[b, n, h]
                if halves:
                    for i in range(half):
                        first, second = vector[i], vector[half + i]
                        into[i] = first * own_cos[i] - second * own_sin[i]
                        into[half + i] = second * own_cos[half + i] + first * own_sin[half + i]
                else:
                    for i in range(half):
                        first, second = vector[2 * i], vector[2 * i + 1]
                        into[2 * i] = first * own_cos[2 * i] - second * own_sin[2 * i]
                        into[2 * i + 1] = second * own_cos[2 * i + 1] + first * own_sin[2 * i + 1]
                for i in range(rotary, head_dim):
                    into[i] = vector[i]

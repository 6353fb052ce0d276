"""The loops themselves; `leankv.compiled` says what they do. They run on one core, and let go of Python's lock."""

import math

import numpy
from numba import njit

TILE = 64  # tokens at a time: what they take stays in a core's own cache

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
def affine_levels(packed, bits, low, step, group, out):  # type: ignore[no-untyped-def]
    numbers = numpy.empty(out.shape[1], numpy.uint8)
    for n in range(len(packed)):
        unpack_row(packed[n], bits, numbers)
        side = n if len(low) > 1 else 0
        for g in range(low.shape[1]):
            bottom, size = low[side, g], step[side, g]
            for j in range(g * group, (g + 1) * group):
                out[n, j] = bottom + size * numpy.float32(numbers[j])


@njit(nogil=True, cache=True)
def table_levels(packed, bits, table, out):  # type: ignore[no-untyped-def]
    numbers = numpy.empty(out.shape[1], numpy.uint8)
    for n in range(len(packed)):
        unpack_row(packed[n], bits, numbers)
        for j in range(out.shape[1]):
            out[n, j] = table[numbers[j]]


@njit(nogil=True, cache=True)
def radix_values(packed, places, columns, factor, levels, low, out):  # type: ignore[no-untyped-def]
    tokens, n_bytes = packed.shape
    for j in range(len(low)):
        out[j, :] = low[j]
    tile = numpy.empty((n_bytes, TILE), numpy.float32)
    for first in range(0, tokens, TILE):
        count = min(TILE, tokens - first)
        for n in range(count):
            for byte in range(n_bytes):
                tile[byte, n] = packed[first + n, byte]
        for p in range(len(places)):
            j = columns[p]
            above, radix, bottom = ONE / factor[p], levels[j], low[j]
            over = ONE / radix
            row = tile[places[p]]
            into = out[j, first : first + count]
            for n in range(count):
                # Rounded down: half a unit keeps quotients from where an inexact reciprocal would matter.
                left = numpy.floor((row[n] + HALF) * above)
                into[n] = bottom + (left - radix * numpy.floor((left + HALF) * over))


@njit(nogil=True, cache=True)
def count_outside(q, low, levels, counts):  # type: ignore[no-untyped-def]
    for j in range(len(q)):
        bottom, top = low[j], low[j] + levels[j]
        for n in range(q.shape[1]):
            if q[j, n] < bottom or q[j, n] >= top:
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
def put_escapes(q, counts, items, sizes):  # type: ignore[no-untyped-def]
    place = 0
    wide = items.shape[1] == 3
    for n in range(len(counts)):
        for _ in range(counts[n]):
            which = int(items[place, 0])
            if wide:
                which += 256 * int(items[place, 1])
            q[which, n] = sizes[items[place, items.shape[1] - 1]]
            place += 1


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

"""The loops of `leankv.compiled.packed_rows`: a tile of codes is decoded, read, and forgotten.

They run on one core, and let go of Python's lock. `fastmath`, so that sums are taken in any order, and in vectors.
"""

import numpy
from numba import njit

from leankv.compiled.kernels import TILE, affine_levels, put_escapes, radix_tile, unpack_row
from leankv.compiled.packed_rows import BLOCK


@njit(nogil=True, cache=True, fastmath=True)
def _meet(tile, count, first, cos, sin, halves, queries, scores):  # type: ignore[no-untyped-def]
    """Scores of a tile's keys, of which the first is the one numbered `first`."""
    _, heads, groups, head_dim = queries.shape
    rotary = cos.shape[1]
    half = rotary // 2
    turned = numpy.empty(head_dim, numpy.float32)
    for n in range(count):
        block, near = (first + n) // BLOCK, (first + n) % BLOCK
        if not rotary:
            block = near = 0
        own_cos, own_sin = cos[near], sin[near]
        for h in range(heads):
            vector = tile[n, h * head_dim : (h + 1) * head_dim]
            if halves:
                for i in range(half):
                    turned[i] = vector[i] * own_cos[i] - vector[half + i] * own_sin[i]
                for i in range(half):
                    turned[half + i] = vector[half + i] * own_cos[half + i] + vector[i] * own_sin[half + i]
            else:
                for i in range(half):
                    even, odd = 2 * i, 2 * i + 1
                    turned[even] = vector[even] * own_cos[even] - vector[odd] * own_sin[even]
                    turned[odd] = vector[odd] * own_cos[odd] + vector[even] * own_sin[odd]
            for i in range(rotary, head_dim):
                turned[i] = vector[i]
            for g in range(groups):
                query = queries[block, h, g]
                product = numpy.float32(0)
                for i in range(head_dim):
                    product += turned[i] * query[i]
                scores[first + n, h * groups + g] = product


@njit(nogil=True, cache=True, fastmath=True)
def _add(tile, count, first, weights, sums):  # type: ignore[no-untyped-def]
    """Add a tile's vectors to sums, each by its weight."""
    heads, groups, head_dim = sums.shape
    for n in range(count):
        own = weights[first + n]
        for h in range(heads):
            vector = tile[n, h * head_dim : (h + 1) * head_dim]
            for g in range(groups):
                weight = own[h * groups + g]
                into = sums[h, g]
                for i in range(head_dim):
                    into[i] += weight * vector[i]


# -- B bits a number, evenly spaced ------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def affine_scores(own, begin, end, width, meeting, scores):  # type: ignore[no-untyped-def]
    packed, bits, low, step, group = own
    tile = numpy.empty((TILE, width), numpy.float32)
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        affine_levels(packed, first, count, bits, low, step, group, tile)
        cos, sin, halves, queries = meeting
        _meet(tile, count, first, cos, sin, halves, queries, scores)


@njit(nogil=True, cache=True)
def affine_sums(own, begin, end, width, weights, sums):  # type: ignore[no-untyped-def]
    packed, bits, low, step, group = own
    tile = numpy.empty((TILE, width), numpy.float32)
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        affine_levels(packed, first, count, bits, low, step, group, tile)
        _add(tile, count, first, weights, sums)


# -- levels of a table, scaled and shifted; some numbers as they are ---------------------------------------------------


@njit(nogil=True, cache=True, fastmath=True)
def _table_tile(packed, first, count, bits, table, scale, shift, values, index, tile):  # type: ignore[no-untyped-def]
    width = tile.shape[1]
    numbers = numpy.empty(width, numpy.uint8)
    for n in range(count):
        unpack_row(packed[first + n], bits, numbers)
        into = tile[n]
        for j in range(width):
            into[j] = table[numbers[j]]
        for j in range(width):
            into[j] = shift[j] + scale[j] * into[j]
        for slot in range(index.shape[1]):
            j = index[first + n, slot]
            into[j] = shift[j] + values[first + n, slot]


@njit(nogil=True, cache=True)
def table_scores(own, begin, end, width, meeting, scores):  # type: ignore[no-untyped-def]
    packed, bits, table, scale, shift, values, index = own
    cos, sin, halves, queries = meeting
    tile = numpy.empty((TILE, width), numpy.float32)
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        _table_tile(packed, first, count, bits, table, scale, shift, values, index, tile)
        _meet(tile, count, first, cos, sin, halves, queries, scores)


@njit(nogil=True, cache=True)
def table_sums(own, begin, end, width, weights, sums):  # type: ignore[no-untyped-def]
    packed, bits, table, scale, shift, values, index = own
    tile = numpy.empty((TILE, width), numpy.float32)
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        _table_tile(packed, first, count, bits, table, scale, shift, values, index, tile)
        _add(tile, count, first, weights, sums)


# -- numbers, then a product ------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True, fastmath=True)
def _synthesize(q, count, mean, synthesis, tile):  # type: ignore[no-untyped-def]
    """`mean + q B`, four numbers of a token at a time: one pass over its vector for four products."""
    for n in range(count):
        for i in range(len(mean)):
            tile[n, i] = mean[i]
    full = len(synthesis) // 4 * 4
    for j in range(0, full, 4):
        row0, row1, row2, row3 = synthesis[j], synthesis[j + 1], synthesis[j + 2], synthesis[j + 3]
        for n in range(count):
            q0, q1, q2, q3 = q[j, n], q[j + 1, n], q[j + 2, n], q[j + 3, n]
            if q0 == 0 and q1 == 0 and q2 == 0 and q3 == 0:  # coordinates of little variance, behind all others
                continue
            into = tile[n]
            for i in range(len(into)):
                into[i] += q0 * row0[i] + q1 * row1[i] + q2 * row2[i] + q3 * row3[i]
    for j in range(full, len(synthesis)):
        row0 = synthesis[j]
        for n in range(count):
            into = tile[n]
            for i in range(len(into)):
                into[i] += q[j, n] * row0[i]


@njit(nogil=True, cache=True, fastmath=True)
def _add_columns(q, count, first, weights, own_weights, sums):  # type: ignore[no-untyped-def]
    """Add a tile's numbers `[J, count]` to sums `[J, queries]`, each by its token's weight."""
    queries = len(own_weights)
    for n in range(count):
        for g in range(queries):
            own_weights[g, n] = weights[first + n, g]
    for j in range(len(q)):
        numbers = q[j]
        for g in range(queries):
            row, total = own_weights[g], numpy.float32(0)
            for n in range(count):
                total += row[n] * numbers[n]
            sums[j, g] += total


# -- of a table, each token's scaled ----------------------------------------------------------------------------------


@njit(nogil=True, cache=True, fastmath=True)
def _scaled_tile(packed, first, count, bits, table, scale, q):  # type: ignore[no-untyped-def]
    """Numbers of `count` rows from the one numbered `first` on, column by column `[J, TILE]`."""
    numbers = numpy.empty(len(q), numpy.uint8)
    for n in range(count):
        unpack_row(packed[first + n], bits, numbers)
        own = scale[first + n]
        for j in range(len(q)):
            q[j, n] = own * table[numbers[j]]


@njit(nogil=True, cache=True)
def scaled_scores(own, begin, end, width, meeting, scores):  # type: ignore[no-untyped-def]
    packed, bits, table, scale, synthesis, mean = own
    cos, sin, halves, queries = meeting
    q = numpy.empty((len(synthesis), TILE), numpy.float32)
    tile = numpy.empty((TILE, width), numpy.float32)
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        _scaled_tile(packed, first, count, bits, table, scale, q)
        _synthesize(q, count, mean, synthesis, tile)
        _meet(tile, count, first, cos, sin, halves, queries, scores)


@njit(nogil=True, cache=True)
def scaled_sums(own, begin, end, width, weights, sums):  # type: ignore[no-untyped-def]
    """Sums of numbers, `[J, queries]`: one product by the synthesis makes them vectors."""
    packed, bits, table, scale, synthesis, _ = own
    q = numpy.empty((len(synthesis), TILE), numpy.float32)
    own_weights = numpy.empty((weights.shape[1], TILE), numpy.float32)
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        _scaled_tile(packed, first, count, bits, table, scale, q)
        _add_columns(q, count, first, weights, own_weights, sums)


# -- in mixed radix with escapes ---------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def _first_escape(begin, counts):  # type: ignore[no-untyped-def]
    """Which item the escapes of a token begin with."""
    item = 0
    for n in range(begin):
        item += int(counts[n])
    return item


@njit(nogil=True, cache=True)
def radix_scores(own, begin, end, width, meeting, scores):  # type: ignore[no-untyped-def]
    (packed, places, columns, factor, levels, low), (counts, items, sizes), (synthesis, mean) = own
    cos, sin, halves, queries = meeting
    bytes_ = numpy.zeros((packed.shape[1], TILE), numpy.float32)
    q = numpy.empty((len(low), TILE), numpy.float32)
    tile = numpy.empty((TILE, width), numpy.float32)
    item = _first_escape(begin, counts)
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        radix_tile(packed, first, count, places, columns, factor, levels, low, bytes_, q)
        item = put_escapes(first, count, counts, items, item, sizes, q)
        _synthesize(q, count, mean, synthesis, tile)
        _meet(tile, count, first, cos, sin, halves, queries, scores)


@njit(nogil=True, cache=True)
def radix_sums(own, begin, end, width, weights, sums):  # type: ignore[no-untyped-def]
    """Sums of integers, `[J, queries]`: one product by the synthesis makes them vectors."""
    (packed, places, columns, factor, levels, low), (counts, items, sizes), _ = own
    bytes_ = numpy.zeros((packed.shape[1], TILE), numpy.float32)
    q = numpy.empty((len(low), TILE), numpy.float32)
    own_weights = numpy.empty((weights.shape[1], TILE), numpy.float32)
    item = _first_escape(begin, counts)
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        radix_tile(packed, first, count, places, columns, factor, levels, low, bytes_, q)
        item = put_escapes(first, count, counts, items, item, sizes, q)
        _add_columns(q, count, first, weights, own_weights, sums)

"""Asymmetric numeral systems (Duda, 2009, arXiv 0902.0271): the loops of constriction's `AnsCoder`, compiled.

Words of 32 bits, a state of 64, probabilities of 24: the streams are those that constriction writes, to the last bit.
The loops run on one core, and let go of Python's lock.
"""

import numpy
from numba import njit

WORD, PRECISION = 32, 24
BUCKETS = 256  # assumption: of quantiles, by their highest bits
_WORD, _PRECISION = numpy.uint64(WORD), numpy.uint64(PRECISION)
_FULL = numpy.uint64(1 << WORD)  # a state is at least so large, while there are words left
_QUANTILES = numpy.uint64((1 << PRECISION) - 1)
_SHIFT = numpy.uint32(PRECISION - 8)
_USUALLY = numpy.uint32(0.8 * (1 << PRECISION))
_OTHERS = numpy.uint64(1 << (PRECISION - 16))  # of 2^24, for each of the 2^16 values outside of a table


@njit(nogil=True, cache=True)
def _push(words, length, state, left, weight):  # type: ignore[no-untyped-def]
    """Put a symbol of `weight` of the 2^24, the first of which is `left`, on the stack; its length, and the state."""
    if state >> (numpy.uint64(64) - _PRECISION) >= weight:
        words[length] = state & (_FULL - numpy.uint64(1))
        length += 1
        state >>= _WORD
    return length, ((state // weight) << _PRECISION) | (left + state % weight)


@njit(nogil=True, cache=True)
def encode(q, largest, borders, others):  # type: ignore[no-untyped-def]
    """Whole numbers `[J, N]`, and those of them, as 16 bits, that lie outside of the table: words.

    Args:
        q: float32.
        largest: K, the largest of the table.
        borders: uint32 `[J, 2 K + 3]`, what lies before each symbol, of 2^24.
        others: uint16, in the order in which they are met token by token.
    """
    words = numpy.empty(q.size + len(others) + 2, numpy.uint32)
    length, state = 0, numpy.uint64(0)
    for place in range(len(others) - 1, -1, -1):
        length, state = _push(words, length, state, _OTHERS * numpy.uint64(others[place]), _OTHERS)
    for j in range(len(q) - 1, -1, -1):
        own, edges = q[j], borders[j]
        for n in range(len(own) - 1, -1, -1):
            value = int(own[n])
            symbol = value + largest if -largest <= value <= largest else 2 * largest + 1
            left = numpy.uint64(edges[symbol])
            length, state = _push(words, length, state, left, numpy.uint64(edges[symbol + 1]) - left)
    while state > numpy.uint64(0):
        words[length] = state & (_FULL - numpy.uint64(1))
        length += 1
        state >>= _WORD
    return words[:length].copy()


@njit(nogil=True, cache=True)
def decode(words, largest, borders, q, others):  # type: ignore[no-untyped-def]
    """The way back: fills `q`, where what is outside of the table is K + 1, and `others`."""
    length, state = len(words), numpy.uint64(0)
    while length > 0 and state < _FULL:
        length -= 1
        state = (state << _WORD) | numpy.uint64(words[length])
    first_in = numpy.empty(BUCKETS, numpy.int64)
    for j in range(len(q)):
        into, edges = q[j], borders[j]
        low_zero = high_zero = edges[0]
        if edges[largest + 1] - edges[largest] > _USUALLY:  # then to ask for it first mispredicts few
            low_zero, high_zero = edges[largest], edges[largest + 1]
        symbol = 0
        # The first symbol of each: to look it up mispredicts fewer branches than to search.
        for bucket in range(BUCKETS):
            while edges[symbol + 1] <= bucket << _SHIFT:
                symbol += 1
            first_in[bucket] = symbol
        for n in range(len(into)):
            quantile = numpy.uint32(state & _QUANTILES)
            symbol = largest
            if not low_zero <= quantile < high_zero:
                symbol = first_in[quantile >> _SHIFT]
                while edges[symbol + 1] <= quantile:
                    symbol += 1
            into[n] = symbol - largest
            left = numpy.uint64(edges[symbol])
            weight = numpy.uint64(edges[symbol + 1]) - left
            state = (state >> _PRECISION) * weight + (numpy.uint64(quantile) - left)
            if state < _FULL and length > 0:
                length -= 1
                state = (state << _WORD) | numpy.uint64(words[length])
    for place in range(len(others)):
        rest = state & _QUANTILES
        others[place] = rest // _OTHERS
        state = (state >> _PRECISION) * _OTHERS + rest % _OTHERS
        if state < _FULL and length > 0:
            length -= 1
            state = (state << _WORD) | numpy.uint64(words[length])

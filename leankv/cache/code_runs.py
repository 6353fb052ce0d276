"""The codes of a store as runs of tokens, so that a step appends to the last run and does not copy the others."""

import itertools
from collections.abc import Iterator, Sequence

import torch

from leankv.codecs import Code

RUN = 256
"""Tokens after which a new run begins: half as many are copied a step, on average. Assumption: few beside what a step
reads."""

LONGEST = 2048
"""Tokens up to which full runs that are equally long become one. Assumption: few enough that making one of two is not
felt, and enough that a long text is read in few pieces."""


class CodeRuns:
    """The code of B rows of T tokens, in runs behind each other; a run is never changed.

    Args:
        runs: codes `[B, tokens]`, at least one.
    """

    def __init__(self, runs: Sequence[Code]):
        self._runs = tuple(runs)

    @property
    def shape(self) -> tuple[int, int]:
        """`(B, T)`."""
        return self._runs[0].shape[0], sum(run.shape[1] for run in self._runs)

    def append(self, code: Code) -> "CodeRuns":
        """With a code `[B, tokens]` behind it.

        On a GPU as one run: copying is quick there, and to read several starts as many operations for each.
        """
        if code.tensors()[0].device.type != "cpu":
            return CodeRuns([self.whole().append(code)])
        *before, last = self._runs
        if last.shape[1] < RUN:
            last = last.append(code)
        else:
            before, last = [*before, last], code
        # As digits carry: of each length there is one run at most, but of the longest.
        while before and RUN <= last.shape[1] == before[-1].shape[1] < LONGEST:
            last = before.pop().append(last)
        return CodeRuns([*before, last])

    def borders(self) -> Iterator[int]:
        """Numbers of the tokens that runs begin with."""
        return itertools.accumulate((run.shape[1] for run in self._runs[:-1]), initial=0)

    def narrow(self, first: int, last: int) -> Code:
        """Tokens `first` to `last`; views where they lie in one run and can be."""
        parts, start = [], 0
        for run in self._runs:
            length = run.shape[1]
            begin, end = max(first - start, 0), min(last - start, length)
            if begin < end:
                parts.append(run if end - begin == length else run.narrow(begin, end))
            start += length
        return parts[0].append(*parts[1:]) if parts else self._runs[0].narrow(0, 0)

    def whole(self) -> Code:
        """All of it as one code."""
        return self.narrow(0, self.shape[1])

    def index(self, rows: torch.Tensor) -> "CodeRuns":
        """Copies of rows, by number or by mask."""
        return CodeRuns([run.index(rows) for run in self._runs])

    def to(self, device: torch.device, non_blocking: bool = False) -> "CodeRuns":
        """The same on a device."""
        return CodeRuns([run.to(device, non_blocking) for run in self._runs])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(run.nbytes for run in self._runs)

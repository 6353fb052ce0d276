"""What a search chooses from: for each site some options, each with its size and what its error is predicted to cost.

Knows numbers only. A *choice* says which option each site takes; `measure`, which is handed in, says what it costs.

Where options predict from what earlier sites leave, their sizes and errors follow from the choice there: behind coarse
sites there is more left to code, and more is lost. Each option has a size and an error at every *level* of what it
predicts from, and says at which level it leaves its own site; between two levels all are read off a line, at the mean
level of the sites it predicts from.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Choice = tuple[int, ...]
"""The number of the option of each site, in the order of `PlanSpace.sites`."""

Measure = Callable[[Choice, int, int], Sequence[float]]
"""A choice, a first block and an end block -> nats a token that it adds on each of these, in one fixed order."""

Contributions = Callable[[Choice, int], Mapping[Hashable, float]]
"""A choice, and how often it was asked before -> what each site contributes to its cost, nats a token, each time on
other text as far as there is any; see `leankv.calibration.sensitivity`."""

LEVEL_ROUNDS = 6
"""So often levels follow from those of the sites before. A level beside moves a site's own by a third of that at
most, so what is left of a first guess is a thousandth."""

Table = np.ndarray
"""Numbers `[sites, options, levels]`; where a site has fewer options than others, its last one stands again."""


@dataclass(frozen=True)
class Option:
    """One recipe at one site.

    Attributes:
        name: the recipe, written.
        sizes: bytes of what is to be small, where what it predicts from is at each level, from fine to coarse; one
            number for an option that predicts from nothing.
        codec_bytes: of its codec in memory.
        errors: energies of its errors, likewise, in any unit that is the same for all options of a site.
        levels: at which level it leaves its own site, likewise, from 0 (fine) to the last one.
    """

    name: str
    sizes: tuple[float, ...]
    codec_bytes: float
    errors: tuple[float, ...]
    levels: tuple[float, ...] = (0.0,)

    @property
    def size(self) -> float:
        """Bytes at the middle level, where options are compared before anything is chosen."""
        return self.sizes[len(self.sizes) // 2]

    @property
    def error(self) -> float:
        """Energy of errors at the middle level."""
        return self.errors[len(self.errors) // 2]


@dataclass(frozen=True)
class PlanSpace:
    """All choices.

    Attributes:
        sites: whatever they are called, in order.
        options: of each site, the largest first; along a `ladder` errors rise as sizes fall, among those `not_beaten`
            some that are larger are only lighter in memory.
        fixed: bytes beside the sites' own: what stays exact.
        base: bytes that ratios are counted against.
        max_codec_bytes: the codecs of a choice may take so much memory.
        contexts: the sites, by number, that each one is predicted from, all before it; None for those that stay exact;
            empty where no option predicts.
    """

    sites: tuple[Hashable, ...]
    options: tuple[tuple[Option, ...], ...]
    fixed: float
    base: float
    max_codec_bytes: float = math.inf
    contexts: tuple[tuple[int | None, ...], ...] = ()

    def size(self, choice: Choice) -> float:
        """Bytes of all that counts."""
        return self.fixed + math.fsum(self.at(self.sizes, choice))

    def at(self, table: Table, choice: Choice) -> np.ndarray:
        """The numbers `[sites]` that a choice has: sizes, errors, or what is made of both."""
        numbers: np.ndarray = self._at(table, np.array([choice]))[0]
        return numbers

    def totals(self, table: Table, choices: Sequence[Choice] | np.ndarray) -> np.ndarray:
        """The sums `[choices]` of the numbers that choices have."""
        totals: np.ndarray = self._at(table, np.asarray(choices)).sum(axis=1)
        return totals

    def _at(self, table: Table, choices: np.ndarray) -> np.ndarray:
        """The numbers `[choices, sites]` of choices `[choices, sites]`."""
        n_sites, n_options, n_levels = table.shape
        rows = (np.arange(n_sites) * n_options + choices) * n_levels  # where each one's levels begin
        beside = np.zeros(choices.shape)
        if self.contexts:
            left = self._levels.take(rows + n_levels // 2)
            for _ in range(LEVEL_ROUNDS):
                beside = left @ self._shares.T
                left = _read(self._levels, rows, beside)
        return _read(table, rows, beside)

    @cached_property
    def _shares(self) -> np.ndarray:
        """`[sites, sites]`: how much the level of each one (column) counts for what another is predicted from."""
        shares = np.zeros((len(self.sites), len(self.sites)))
        for reader, sources in enumerate(self.contexts):
            for source in sources:
                if source is not None:
                    shares[reader, source] = 1 / len(sources)
        return shares

    @cached_property
    def sizes(self) -> Table:
        """Bytes."""
        return self._table(lambda option: option.sizes)

    @cached_property
    def errors(self) -> Table:
        """Energies of errors."""
        return self._table(lambda option: option.errors)

    @cached_property
    def codec_sizes(self) -> Table:
        """Bytes of codecs in memory."""
        return self._table(lambda option: (option.codec_bytes,))

    @cached_property
    def _levels(self) -> Table:
        return self._table(lambda option: option.levels)

    def _table(self, numbers: Callable[[Option], tuple[float, ...]]) -> Table:
        n_levels = max(len(option.sizes) for own in self.options for option in own)
        most = max(map(len, self.options))
        padded = ([own[min(index, len(own) - 1)] for index in range(most)] for own in self.options)
        return np.array([[np.broadcast_to(numbers(option), n_levels) for option in own] for own in padded], float)

    def ratio(self, choice: Choice) -> float:
        """`base` over `size`."""
        return self.base / self.size(choice)

    def codec_bytes(self, choice: Choice) -> float:
        """Memory that the codecs take."""
        return sum(own[index].codec_bytes for own, index in zip(self.options, choice, strict=True))

    def names(self, choice: Choice) -> dict[Hashable, str]:
        """Site -> the recipe it takes."""
        return {site: own[i].name for site, own, i in zip(self.sites, self.options, choice, strict=True)}

    def moved(self, choice: Choice, sites: Sequence[int], by: int) -> Choice:
        """The choice with some sites (by number) so many options coarser, or finer, as far as their options go."""
        numbers = list(choice)
        for site in sites:
            numbers[site] = min(max(numbers[site] + by, 0), len(self.options[site]) - 1)
        return tuple(numbers)


def _read(table: Table, rows: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Numbers `[choices, sites]` of options whose levels begin at `rows`, at levels between whole ones."""
    n_levels = table.shape[2]
    if n_levels == 1:
        return table.take(rows)
    whole = np.minimum(levels.astype(np.intp), n_levels - 2)
    below = table.take(rows + whole)
    numbers: np.ndarray = below + (levels - whole) * (table.take(rows + whole + 1) - below)
    return numbers


def ladder(options: Sequence[Option]) -> tuple[Option, ...]:
    """The options that are worth choosing: those on the lower convex hull of error over size, the largest first.

    Only these can be the best at some price a byte (Shoham and Gersho, IEEE Trans. ASSP 36, 1988).
    """
    hull: list[Option] = []
    for option in sorted(options, key=lambda each: (each.size, each.error)):
        if hull and option.error >= hull[-1].error:
            continue  # larger, and no better
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return tuple(reversed(hull))


def not_beaten(options: Sequence[Option]) -> tuple[Option, ...]:
    """The options that no other beats in size, error and memory of codecs at once, the largest first.

    Where that memory is a limit, options off the hull of size and error may be the ones that fit.
    """
    kept: list[Option] = []
    for option in sorted(options, key=lambda each: (each.size, each.error, each.codec_bytes)):
        if not any(own.error <= option.error and own.codec_bytes <= option.codec_bytes for own in kept):
            kept.append(option)
    return tuple(reversed(kept))


def _slope(smaller: Option, larger: Option) -> float:
    """Error that a byte more takes away is minus this; it falls in size along a convex hull."""
    width = larger.size - smaller.size
    return (larger.error - smaller.error) / width if width > 0 else -math.inf

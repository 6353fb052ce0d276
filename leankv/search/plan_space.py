"""What a search chooses from: for each site some options, each with its size and what its error is predicted to cost.

Knows numbers only. A *choice* says which option each site takes; `measure`, which is handed in, says what it costs.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

Choice = tuple[int, ...]
"""The number of the option of each site, in the order of `PlanSpace.sites`."""

Measure = Callable[[Choice, int, int], Sequence[float]]
"""A choice, a first block and an end block -> nats a token that it adds on each of these, in one fixed order."""

Contributions = Callable[[Choice], Mapping[Hashable, float]]
"""A choice -> what each site contributes to its cost, nats a token; see `leankv.calibration.sensitivity`."""


@dataclass(frozen=True)
class Option:
    """One recipe at one site.

    Attributes:
        name: the recipe, written.
        size: bytes of what is to be small, at the context that counts.
        codec_bytes: of its codec in memory.
        error: energy of its errors, in any unit that is the same for all options of a site.
    """

    name: str
    size: float
    codec_bytes: float
    error: float


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
    """

    sites: tuple[Hashable, ...]
    options: tuple[tuple[Option, ...], ...]
    fixed: float
    base: float
    max_codec_bytes: float = math.inf

    def size(self, choice: Choice) -> float:
        """Bytes of all that counts."""
        return self.fixed + sum(own[index].size for own, index in zip(self.options, choice, strict=True))

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

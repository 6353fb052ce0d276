"""What people write in one word: a budget (`2.5`, `7%`), layers (`0,4,40-63`), a shard (`2/8`)."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from leankv.errors import UserError


@dataclass(frozen=True)
class Budget:
    """The joint cost allowed: `amount` perplexity points, or percent of the base perplexity."""

    amount: float
    percent: bool

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `2.5` (points) or `7%`.

        Raises:
            UserError: not a finite number above zero.
        """
        number = text.strip().removesuffix("%")
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        if not (math.isfinite(amount) and amount > 0):
            raise UserError(f"the budget {text!r} is neither points above 0 such as 2.5 nor percent such as 7%")
        return cls(amount, percent=text.strip().endswith("%"))

    def points(self, base_ppl: float) -> float:
        """The budget in perplexity points over `base_ppl`."""
        return base_ppl * self.amount / 100 if self.percent else self.amount

    def percent_of(self, base_ppl: float) -> float:
        """The budget as a rise of perplexity in percent; points are those over `base_ppl`."""
        return self.amount if self.percent else 100 * self.amount / base_ppl

    def __str__(self) -> str:
        return f"{self.amount:g}%" if self.percent else f"{self.amount:g}"


def parse_budgets(text: str) -> list[Budget]:
    """Read one budget or several, `1%,2.5%,7%`.

    Raises:
        UserError: one is not understood.
    """
    return [Budget.parse(piece) for piece in text.split(",")]


UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: str) -> int:
    """Read `16MB` (10^6 bytes a megabyte) or a number of bytes.

    Raises:
        UserError: it is neither.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?b)?\s*", text, re.IGNORECASE)
    if found is None:
        raise UserError(f"{text!r} is no amount of memory; write one such as 16MB")
    return round(float(found[1]) * UNITS[(found[2] or "b").lower()])


def parse_windows(text: str) -> tuple[int, ...]:
    """Read lengths of exact windows, `0,32,128`, each once.

    Raises:
        UserError: one is no whole number.
    """
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(piece.isdecimal() for piece in pieces):
        raise UserError(f"windows {text!r} are not understood; write numbers of tokens such as 32,128")
    return tuple(dict.fromkeys(map(int, pieces)))


def parse_sites(text: str, n_layers: int, parts: Sequence[str]) -> set[tuple[int, str]]:
    """Read `all`, or parts with their layers, `k:0-29,5,v:10-29`, into (layer, part) pairs.

    Raises:
        UserError: it does not parse, or a layer does not exist.
    """
    if text == "all":
        return {(layer, part) for layer in range(n_layers) for part in parts}
    sites: set[tuple[int, str]] = set()
    part = ""
    for piece in text.split(","):
        name, colon, layers = piece.rpartition(":")
        part = name.strip() if colon else part
        if part not in parts:
            raise UserError(
                f"sites {text!r} are not understood; write all, or parts with layers such as k:0-29,v:10-29"
            )
        sites |= {(layer, part) for layer in parse_layers(layers.strip(), n_layers, "--sites")}
    return sites


MOST_LAYERS = 99_999  # assumption: above any model; a range up to it is still a short list


def parse_layers(text: str, n_layers: int | None = None, option: str = "--layers") -> tuple[int, ...]:
    """Read `all`, or numbers and ranges such as `0,4,40-63`, into sorted layer numbers.

    Args:
        text: what was given.
        n_layers: of the model; without it only the form is checked.
        option: where it was given, for the sentence.

    Raises:
        UserError: it does not parse, a range runs backwards, or (where `n_layers` is given) a layer does not exist.
    """
    if text == "all":
        assert n_layers is not None, "`all` needs the model's number of layers"
        return tuple(range(n_layers))
    layers: set[int] = set()
    for piece in text.split(","):
        first, dash, last = (end.strip() for end in piece.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"{option} {text!r} is not a list of layers; write all, 12, 40-63 or 0,4,40-63")
        if int(last or first) > MOST_LAYERS:
            raise UserError(f"{option} {text!r} names layers beyond {MOST_LAYERS}, and no model has so many")
        if dash and int(last) < int(first):
            raise UserError(f"{option} {text!r} runs backwards at {piece.strip()!r}; write {last}-{first}")
        layers.update(range(int(first), int(last or first) + 1))
    if n_layers is not None and max(layers) >= n_layers:
        raise UserError(f"{option} {text!r} goes past the model's last layer, which is {n_layers - 1}")
    return tuple(sorted(layers))


def format_layers(layers: Sequence[int]) -> str:
    """Sorted layer numbers as `parse_layers` reads them: `0-3,7`; `none` where there are none."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "none" if not runs else ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 1) of `count`: every `count`-th layer, so that all parts get early and late layers."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `2/8`.

        Raises:
            UserError: it is not two numbers, or not between `1/8` and `8/8`.
        """
        index, _, count = (piece.strip() for piece in text.partition("/"))
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise UserError(
                f"--shard {text!r} is no part of the layers; of 8 workers, the first is 1/8 and the last 8/8"
            )
        return cls(int(index), int(count))

    @classmethod
    def all_of(cls, count: int) -> tuple["Shard", ...]:
        """The shards that make up the whole."""
        return tuple(cls(index, count) for index in range(1, count + 1))

    def part(self, layers: Sequence[int]) -> tuple[int, ...]:
        """The layers of this shard."""
        return tuple(layers[self.index - 1 :: self.count])

    @property
    def file_name(self) -> str:
        """As part of a file's name: `2of8`."""
        return f"{self.index}of{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

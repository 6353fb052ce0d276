"""What people write in one word: a budget (`2.5`, `7%`), a set of layers (`0,4,40-63`)."""

import math
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

    def __str__(self) -> str:
        return f"{self.amount:g}%" if self.percent else f"{self.amount:g}"


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
        if dash and int(last) < int(first):
            raise UserError(f"{option} {text!r} runs backwards at {piece.strip()!r}; write {last}-{first}")
        layers.update(range(int(first), int(last or first) + 1))
    if n_layers is not None and max(layers) >= n_layers:
        raise UserError(f"{option} {text!r} goes past the model's last layer, which is {n_layers - 1}")
    return tuple(sorted(layers))

"""`int:B`, `int:BgG`, `int:Bc`: integers of B bits, with ranges of each token's own or fixed for each channel."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float

from leankv import compiled
from leankv.codecs.base import Codec, Context, FitData, Recipe, Vectors, as_float16
from leankv.codecs.code import Code
from leankv.codecs.coding.packing import pack, packed_bytes, unpack
from leankv.codecs.registry import register
from leankv.codecs.statistics import ROWS, sampled
from leankv.compiled.packed_rows import AffineRows, PackedRows

GROUP = 32  # KIVI's, where it divides the width

SHRINK, TRIALS = 0.85, 16  # assumption: ranges down to a tenth of what was seen, in steps finer than the result feels
SMALLEST_STEP = 1e-30  # what nothing is divided by


@register
@dataclass(frozen=True)
class IntegersRecipe(Recipe):
    """Integers of `bits` bits.

    Attributes:
        bits: 1 to 8.
        group: channels that share a token's range; None for the default.
        per_channel: whether ranges are fixed for each channel; then there are no groups.
    """

    bits: int
    group: int | None = None
    per_channel: bool = False

    family = "int"
    revision = 1
    grammar = "int:B, int:BgG or int:Bc (B from 1 to 8, G dividing the width)"

    @classmethod
    def parse(cls, arguments: str) -> "IntegersRecipe":
        match = re.fullmatch(r"([1-8])(?:(c)|g([1-9][0-9]*))?", arguments)
        if match is None:
            raise ValueError
        bits, channels, group = match.groups()
        return cls(int(bits), int(group) if group else None, bool(channels))

    @property
    def arguments(self) -> str:
        return f"{self.bits}" + ("c" if self.per_channel else "" if self.group is None else f"g{self.group}")

    @property
    def needs_text(self) -> bool:
        return self.per_channel

    def check_width(self, width: int) -> None:
        if self.group is not None and width % self.group:
            raise ValueError(f"groups of {self.group} do not divide the width {width}")

    def fit(self, data: FitData) -> list[Codec]:
        width, seed = data.train.shape[2], data.training.seed
        return [Integers(self, width, _ranges(x, self.bits, seed) if self.per_channel else None) for x in data.train]

    def unfitted(self, width: int) -> Codec:
        return Integers(self, width, torch.zeros(2, width) if self.per_channel else None)


class Integers(Codec):
    """Rounds each number to one of 2^B evenly spaced levels: `q = round((x - low) / step)`, `x_hat = low + step q`.

    `int:B`, `int:BgG`: asymmetric, in groups of G neighbouring channels of one token: `low` is the least number of the
    group, `low + (2^B - 1) step` the greatest. G is 32 unless given, or the next divisor of the width. This is what
    KIVI (Liu et al., 2024, arXiv 2402.02750) does to values. It groups keys along tokens, each channel's over G tokens,
    which a code that is to belong to one token cannot do; for keys there is

    `int:Bc`: a fixed range for each channel, found on calibration text (as KVQuant does; Hooper et al., 2024, arXiv
    2401.18079), so that a token carries no side information. Numbers outside the range are clipped to its ends. The
    range is the one seen, shrunk towards the mean to whatever fraction leaves the least squared error. An error metric
    would change nothing much: it weighs channels, and each channel has a range of its own.

    Storage: B bits a number, a row padded to whole bytes; in groups, also two float16 (`low`, `step`) for each group.
    What it does not do: centre the vectors (`resid(mean,int:B)` does), space its levels unevenly (see `nuq`), or keep
    outliers apart.
    """

    def __init__(self, recipe: IntegersRecipe, width: int, ranges: Float[torch.Tensor, "2 width"] | None):
        """
        Args:
            recipe: what it was fitted as.
            width: W.
            ranges: `low` and `step` of each channel, where they are fixed.
        """
        super().__init__(recipe, width)
        self.bits = recipe.bits
        self.group = _default_group(width) if recipe.group is None else recipe.group
        self.ranges: torch.Tensor | None
        self.register_buffer("ranges", ranges)

    @property
    def bits_per_token(self) -> int:
        side = 2 * 16 * (self.width // self.group) if self.ranges is None else 0
        return 8 * packed_bytes(self.width, self.bits) + side

    def encode(self, x: Vectors, context: Context = None) -> Code:
        x = x.float()
        levels = 2**self.bits - 1
        side: dict[str, torch.Tensor] = {}
        if self.ranges is None:
            groups = x.unflatten(1, (-1, self.group))
            low = as_float16(groups.amin(dim=2))
            side = {"low": low, "step": as_float16((groups.amax(dim=2) - low.float()) / levels)}
        low, step = self._grid(side)
        q = ((x - low) / step.clamp_min(SMALLEST_STEP)).round_().clamp_(0, levels)
        return Code({"q": pack(q, self.bits), **side})

    def packed_rows(self, code: Code, matrix: torch.Tensor | None = None) -> PackedRows:
        return AffineRows(code["q"], self.bits, *self._sides(code), self.width)

    def decode(self, code: Code, context: Context = None) -> Vectors:
        packed = code["q"]
        low, step, group = self._sides(code)
        if compiled.serves(packed):
            return compiled.affine_levels(packed, self.bits, low, step, group, self.width)
        q = unpack(packed, self.bits, self.width).float()
        if group == 1:
            return torch.addcmul(low, step, q)
        groups = q.unflatten(1, (-1, group))
        return torch.addcmul(low.float()[:, :, None], step.float()[:, :, None], groups, out=groups).flatten(1)

    def _sides(self, code: Code) -> tuple[torch.Tensor, torch.Tensor, int]:
        """`low` and `step` of each group of numbers, `[N or 1, groups]`, and how many numbers it has."""
        if self.ranges is None:
            return code["low"], code["step"], self.group
        return self.ranges[0][None], self.ranges[1][None], 1

    def _grid(self, side: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """`low` and `step` of every number, float32, `[N, W]` or `[W]`; never from more than was stored."""
        if self.ranges is not None:
            return self.ranges[0], self.ranges[1]
        low, step = (side[name].float().repeat_interleave(self.group, dim=1) for name in ("low", "step"))
        return low, step


def _default_group(width: int) -> int:
    return next(group for group in range(min(GROUP, width), width + 1) if width % group == 0)


def _ranges(x: torch.Tensor, bits: int, seed: int) -> torch.Tensor:
    """`low` and `step` `[2, W]` of each channel of `x` `[N, W]`, by least squared error on a sample of its rows."""
    levels = 2**bits - 1
    least, greatest = (torch.stack([end(rows, dim=0) for rows in x.split(ROWS)]) for end in (torch.amin, torch.amax))
    bottom, top = least.amin(dim=0).float(), greatest.amax(dim=0).float()
    sample = sampled(x, ROWS, seed).float()
    mean = sample.mean(dim=0)
    lowest = torch.full_like(mean, math.inf)
    ranges = torch.stack([bottom, (top - bottom) / levels])
    for trial in range(TRIALS):
        low, high = (mean + SHRINK**trial * (end - mean) for end in (bottom, top))
        step = (high - low) / levels
        q = ((sample - low) / step.clamp_min(SMALLEST_STEP)).round_().clamp_(0, levels)
        error = (low + step * q - sample).square_().sum(dim=0)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        ranges = torch.where(better, torch.stack([low, step]), ranges)
    return ranges

"""`int:B`, `int:BgG`, `int:Bc`: integers of B bits, with ranges of each token's own or fixed for each channel."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from leankv.codecs.base import ROWS, Code, Codec, TrainingSettings, as_float16, sampled
from leankv.codecs.packing import pack, packed_bytes, unpack

GROUP = 32  # KIVI's, where it divides the width
CHANNELS = "channels"  # stands where the group size stands when the ranges are the channels'

SHRINK, TRIALS = 0.85, 16  # assumption: ranges down to a tenth of what was seen, in steps finer than the result feels
SMALLEST_STEP = 1e-30  # what nothing is divided by


class Integers(Codec):
    """Rounds each number to one of 2^B evenly spaced levels: `q = round((x - low) / step)`, `x_hat = low + step q`.

    `int:B`, `int:BgG`: asymmetric, in groups of G neighbouring channels of one token: `low` is the least number of the
    group, `low + (2^B - 1) step` the greatest. G is 32 unless given, or the next divisor of the width. This is what
    KIVI (Liu et al., 2024) does to values. It groups keys along tokens, each channel's over G tokens, which a code
    that is to belong to one token cannot do; for keys there is

    `int:Bc`: a fixed range for each channel, found on calibration text (as KVQuant does; Hooper et al., 2024), so that
    a token carries no side information. Numbers outside the range are clipped to its ends. The range is the one seen,
    shrunk towards the mean to whatever fraction leaves the least squared error. A metric would change nothing much:
    it weighs channels, and each channel has a range of its own.

    Storage: B bits a number, a row padded to whole bytes; in groups, also two float16 (`low`, `step`) for each group.
    What it does not do: centre the vectors (`resid(mean,int:B)` does), space its levels unevenly (see `nuq`), or keep
    outliers apart.
    """

    family = "int"
    revision = 1
    grammar = "int:B, int:BgG or int:Bc (B from 1 to 8, G dividing the width)"

    def __init__(self, width: int, bits: int, group: int | str | None, ranges: torch.Tensor | None):
        """
        Args:
            group: channels in a group; None for the default; `CHANNELS` for fixed ranges.
            ranges: `[2, W]`, `low` and `step` of each channel, where they are fixed.
        """
        super().__init__(width)
        self.bits = bits
        self.asked = group
        self.group = group if isinstance(group, int) else _default_group(width)
        self.ranges: torch.Tensor | None
        self.register_buffer("ranges", ranges)

    @property
    def spec(self) -> str:
        kind = "" if self.asked is None else "c" if self.asked == CHANNELS else f"g{self.asked}"
        return f"int:{self.bits}{kind}"

    @property
    def bits_per_token(self) -> int:
        side = 2 * 16 * (self.width // self.group) if self.ranges is None else 0
        return 8 * packed_bytes(self.width, self.bits) + side

    def encode(self, x: torch.Tensor) -> Code:
        x = x.float()
        levels = 2**self.bits - 1
        side: Code = {}
        if self.ranges is None:
            groups = x.unflatten(1, (-1, self.group))
            low = as_float16(groups.amin(dim=2))
            side = {"low": low, "step": as_float16((groups.amax(dim=2) - low.float()) / levels)}
        low, step = self._grid(side)
        q = ((x - low) / step.clamp_min(SMALLEST_STEP)).round_().clamp_(0, levels)
        return {"q": pack(q, self.bits), **side}

    def decode(self, code: Code) -> torch.Tensor:
        low, step = self._grid(code)
        return low + step * unpack(code["q"], self.bits, self.width)

    def _grid(self, code: Code) -> tuple[torch.Tensor, torch.Tensor]:
        """`low` and `step` of every number, float32, `[N, W]` or `[W]`; never from more than was stored."""
        if self.ranges is not None:
            return self.ranges[0], self.ranges[1]
        low, step = (code[name].float().repeat_interleave(self.group, dim=1) for name in ("low", "step"))
        return low, step

    @classmethod
    def fit(
        cls,
        arguments: Sequence[Any],
        train: torch.Tensor,
        heldout: torch.Tensor,
        metric: torch.Tensor | None,
        settings: TrainingSettings,
        on_epoch: Callable[[int, torch.Tensor], None],
    ) -> list[Self]:
        bits, group = arguments
        width = train.shape[2]
        return [cls(width, bits, group, _ranges(x, bits, settings.seed) if group == CHANNELS else None) for x in train]

    @classmethod
    def empty(cls, arguments: Sequence[Any], width: int) -> Self:
        bits, group = arguments
        return cls(width, bits, group, torch.zeros(2, width) if group == CHANNELS else None)

    @classmethod
    def parse_arguments(cls, text: str) -> tuple[Any, ...]:
        match = re.fullmatch(r"([1-8])(?:(c)|g([1-9][0-9]*))?", text)
        if match is None:
            raise ValueError
        bits, channels, group = match.groups()
        return int(bits), CHANNELS if channels else int(group) if group else None

    @classmethod
    def check_width(cls, arguments: Sequence[Any], width: int) -> None:
        group = arguments[1]
        if isinstance(group, int) and width % group:
            raise ValueError(f"groups of {group} do not divide the width {width}")


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

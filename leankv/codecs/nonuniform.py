"""`nuq:B`, `nuq:B+P`: unevenly spaced levels, and P percent of each token's numbers kept as they are."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from leankv.codecs.base import ROWS, Code, Codec, TrainingSettings, as_float16, mean_of, sampled
from leankv.codecs.levels import lloyd_levels, nearest_level
from leankv.codecs.packing import pack, packed_bytes, unpack

SMALLEST_DEVIATION = 1e-30  # what nothing is divided by


class NonUniform(Codec):
    """Rounds each number, normalised by its channel, to the nearest of 2^B levels that all channels share (KVQuant).

        u = (x - mean) / deviation,        x_hat = mean + deviation * levels[q],        q = nearest level to u

    After Hooper et al., 2024: `mean` and `deviation` of each channel come from calibration text, so a token carries no
    scales; the levels are those of least squared error (weighted k-means), each number weighted by what its error
    counts: the square of its channel's deviation times the channel's entry on the metric's diagonal.

    `+P` is the dense-and-sparse split: the `round(P / 100 W)` numbers of each token (at least one) with the largest `u`
    are stored beside the levels, and neither `deviation` nor the levels are fitted to what is stored so. The number of
    slots is fixed, where KVQuant's varies with a threshold, so that each token takes the same bytes.

    Storage: B bits a number, a row padded to whole bytes; for each slot a float16 value and an index, one byte up to a
    width of 256, else two. What it does not do: scales of a token's own (see `int`), which KVQuant uses for values, or
    more slots for tokens that have more outliers.
    """

    family = "nuq"
    revision = 1
    grammar = "nuq:B or nuq:B+P (B from 1 to 8; P percent of outliers, over 0 and up to 100, e.g. nuq:3+0.5)"

    def __init__(self, levels: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor, percent: float | None):
        """
        Args:
            levels: `[2^B]`, rising.
            mean: `[W]`.
            deviation: `[W]`.
            percent: of outliers; None for none.
        """
        super().__init__(len(mean))
        self.bits = len(levels).bit_length() - 1
        self.percent = percent
        self.slots = _slots(percent, self.width)
        self.levels: torch.Tensor
        self.register_buffer("levels", levels)
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)
        self.deviation: torch.Tensor
        self.register_buffer("deviation", deviation)

    @property
    def spec(self) -> str:
        return f"nuq:{self.bits}" + (f"+{self.percent:g}" if self.percent else "")

    @property
    def bits_per_token(self) -> int:
        return 8 * packed_bytes(self.width, self.bits) + self.slots * (16 + (8 if self.width <= 256 else 16))

    def encode(self, x: torch.Tensor) -> Code:
        centred = x.float() - self.mean
        u = centred / self.deviation.clamp_min(SMALLEST_DEVIATION)
        code = {"q": pack(nearest_level(u, self.levels), self.bits)}
        if self.slots:
            index = u.abs().topk(self.slots, dim=1, sorted=False).indices
            code["value"] = as_float16(centred.gather(1, index))
            code["index"] = index.to(torch.uint8 if self.width <= 256 else torch.int16)  # the latter wraps
        return code

    def decode(self, code: Code) -> torch.Tensor:
        centred = self.levels[unpack(code["q"], self.bits, self.width).int()] * self.deviation
        if self.slots:
            centred.scatter_(1, code["index"].long() & 0xFFFF, code["value"].float())
        return self.mean + centred

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
        bits, percent = arguments
        slots = _slots(percent, train.shape[2])
        codecs = []
        for index, x in enumerate(train):
            mean = mean_of(x)
            mean, deviation = _statistics(x, mean, torch.ones_like(mean), 0)
            if slots:
                mean, deviation = _statistics(x, mean, deviation, slots)
            sample = sampled(x, ROWS, settings.seed).float()
            u = (sample - mean) / deviation.clamp_min(SMALLEST_DEVIATION)
            importance = deviation.square()
            if metric is not None:
                importance = importance * metric[index].diagonal().float()
            weights = importance * _dense(u, slots)
            codecs.append(cls(lloyd_levels(u.flatten(), weights.flatten(), 2**bits), mean, deviation, percent))
        return codecs

    @classmethod
    def empty(cls, arguments: Sequence[Any], width: int) -> Self:
        bits, percent = arguments
        return cls(torch.zeros(2**bits), torch.zeros(width), torch.ones(width), percent)

    @classmethod
    def parse_arguments(cls, text: str) -> tuple[Any, ...]:
        match = re.fullmatch(r"([1-8])(?:\+([0-9]{1,3}(?:\.[0-9]{1,3})?))?", text)
        if match is None or not 0 < float(match[2] or 1) <= 100:
            raise ValueError
        return int(match[1]), float(match[2]) if match[2] else None

    @classmethod
    def check_width(cls, arguments: Sequence[Any], width: int) -> None:
        if width > 65536:
            raise ValueError(f"its two-byte indices reach to 65536, not to the width {width}")


def _slots(percent: float | None, width: int) -> int:
    return max(1, round(percent / 100 * width)) if percent else 0


def _dense(u: torch.Tensor, slots: int) -> torch.Tensor:
    """Which of the normalised numbers `[N, W]` are left when each token's outliers are taken out; bool."""
    kept = torch.ones_like(u, dtype=torch.bool)
    return kept.scatter_(1, u.abs().topk(slots, dim=1).indices, False) if slots else kept


def _statistics(
    x: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor, slots: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and root mean square deviation `[W]` of what `x` `[N, W]` has left without its tokens' outliers.

    Args:
        mean: `[W]`, first estimates, by which outliers are told.
        deviation: likewise; also what a channel keeps that holds nothing but outliers.
    """
    sums = torch.zeros(3, len(mean), dtype=torch.float64, device=x.device)
    for rows in x.split(ROWS):
        centred = rows.float() - mean
        kept = _dense(centred / deviation.clamp_min(SMALLEST_DEVIATION), slots)
        left = centred * kept
        sums += torch.stack([term.sum(dim=0, dtype=torch.float64) for term in (kept, left, left.square())])
    counts, first, second = sums
    shift = first / counts.clamp_min(1)
    spread = (second / counts.clamp_min(1) - shift.square()).clamp_min(0).sqrt()
    return mean + shift.float(), torch.where(counts > 0, spread.float(), deviation)

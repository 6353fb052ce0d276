"""`nuq:B`, `nuq:B+P`: unevenly spaced levels, and P percent of each token's numbers kept as they are."""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float

from leankv.codecs.base import Codec, Context, FitData, Recipe, Vectors, as_float16
from leankv.codecs.code import Code
from leankv.codecs.coding.lloyd_max import lloyd_levels, nearest_level
from leankv.codecs.coding.packing import looked_up, pack, packed_bytes
from leankv.codecs.registry import register
from leankv.codecs.statistics import ROWS, mean_of, sampled
from leankv.compiled.packed_rows import PackedRows, TableRows

SMALLEST_DEVIATION = 1e-30  # what nothing is divided by


@register
@dataclass(frozen=True)
class NonUniformRecipe(Recipe):
    """`2^bits` levels, and `percent` of each token's numbers as they are; None for none of them."""

    bits: int
    percent: float | None

    family = "nuq"
    revision = 1
    grammar = "nuq:B or nuq:B+P (B from 1 to 8; P percent of outliers, over 0 and up to 100, e.g. nuq:3+0.5)"

    @classmethod
    def parse(cls, arguments: str) -> "NonUniformRecipe":
        match = re.fullmatch(r"([1-8])(?:\+([0-9]{1,3}(?:\.[0-9]{1,3})?))?", arguments)
        if match is None or not 0 < float(match[2] or 1) <= 100:
            raise ValueError
        return cls(int(match[1]), float(match[2]) if match[2] else None)

    @property
    def arguments(self) -> str:
        return f"{self.bits}" + (f"+{self.percent:g}" if self.percent else "")

    def check_width(self, width: int) -> None:
        if width > 65536:
            raise ValueError(f"its two-byte indices reach to 65536, not to the width {width}")

    def slots(self, width: int) -> int:
        """Numbers of each token that are kept as they are."""
        return max(1, round(self.percent / 100 * width)) if self.percent else 0

    def fit(self, data: FitData) -> list[Codec]:
        slots = self.slots(data.train.shape[2])
        codecs: list[Codec] = []
        for index, x in enumerate(data.train):
            mean = mean_of(x)
            mean, deviation = _statistics(x, mean, torch.ones_like(mean), 0)
            if slots:
                mean, deviation = _statistics(x, mean, deviation, slots)
            sample = sampled(x, ROWS, data.training.seed).float()
            u = (sample - mean) / deviation.clamp_min(SMALLEST_DEVIATION)
            importance = deviation.square()
            if data.error_metric is not None:
                importance = importance * data.error_metric[index].diagonal().float()
            weights = importance * _dense(u, slots)
            levels = lloyd_levels(u.flatten(), weights.flatten(), 2**self.bits)
            codecs.append(NonUniform(self, levels, mean, deviation))
        return codecs

    def unfitted(self, width: int) -> Codec:
        return NonUniform(self, torch.zeros(2**self.bits), torch.zeros(width), torch.ones(width))


class NonUniform(Codec):
    """Rounds each number, normalised by its channel, to the nearest of 2^B levels that all channels share (KVQuant).

        u = (x - mean) / deviation,        x_hat = mean + deviation * levels[q],        q = nearest level to u

    After Hooper et al., 2024 (arXiv 2401.18079): `mean` and `deviation` of each channel come from calibration text, so
    a token carries no scales; the levels are those of least squared error (weighted k-means), each number weighted by
    what its error counts: the square of its channel's deviation times the channel's entry on the error metric's
    diagonal.

    `+P` is the dense-and-sparse split: the `round(P / 100 W)` numbers of each token (at least one) with the largest `u`
    are stored beside the levels, and neither `deviation` nor the levels are fitted to what is stored so. The number of
    slots is fixed, where KVQuant's varies with a threshold, so that each token takes the same bytes.

    Storage: B bits a number, a row padded to whole bytes; for each slot a float16 value and an index, one byte up to a
    width of 256, else two. What it does not do: scales of a token's own (see `int`), which KVQuant uses for values, or
    more slots for tokens that have more outliers.
    """

    def __init__(
        self,
        recipe: NonUniformRecipe,
        levels: Float[torch.Tensor, " levels"],
        mean: Float[torch.Tensor, " width"],
        deviation: Float[torch.Tensor, " width"],
    ):
        """
        Args:
            recipe: what it was fitted as.
            levels: `2^B`, rising.
            mean: of the vectors.
            deviation: of each channel.
        """
        super().__init__(recipe, len(mean))
        self.bits = recipe.bits
        self.slots = recipe.slots(self.width)
        self.levels: torch.Tensor
        self.register_buffer("levels", levels)
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)
        self.deviation: torch.Tensor
        self.register_buffer("deviation", deviation)

    @property
    def bits_per_token(self) -> int:
        return 8 * packed_bytes(self.width, self.bits) + self.slots * (16 + (8 if self.width <= 256 else 16))

    def encode(self, x: Vectors, context: Context = None) -> Code:
        centred = x.float() - self.mean
        u = centred / self.deviation.clamp_min(SMALLEST_DEVIATION)
        columns = {"q": pack(nearest_level(u, self.levels), self.bits)}
        if self.slots:
            index = u.abs().topk(self.slots, dim=1, sorted=False).indices
            columns["value"] = as_float16(centred.gather(1, index))
            columns["index"] = index.to(torch.uint8 if self.width <= 256 else torch.int16)  # the latter wraps
        return Code(columns)

    def packed_rows(self, code: Code, matrix: torch.Tensor | None = None) -> PackedRows:
        if self.slots:
            values, index = code["value"], self._index(code).int()
        else:
            values, index = torch.empty(code.shape[0], 0), torch.empty(code.shape[0], 0, dtype=torch.int32)
        return TableRows(code["q"], self.bits, self.levels, self.deviation, self.mean, values, index)

    def decode(self, code: Code, context: Context = None) -> Vectors:
        centred = looked_up(self.levels, code["q"], self.bits, self.width).mul_(self.deviation)
        if self.slots:
            centred.scatter_(1, self._index(code), code["value"].float())
        return self.mean + centred

    def deserialize(self, data: bytes, tokens: int) -> Code:
        code = super().deserialize(data, tokens)
        if self.slots and bool((self._index(code) >= self.width).any()):  # loops write there without looking
            raise ValueError(f"a slot is of a number beyond the {self.width} of a vector")
        return code

    def _index(self, code: Code) -> torch.Tensor:
        """Which numbers stand in slots, int64 `[N, slots]`."""
        return code["index"].long() & 0xFFFF


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

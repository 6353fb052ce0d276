"""`sparse:P`: the largest P percent of each token's numbers, and a bitmap of where they stand."""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float

from leankv.codecs.base import Codec, Context, FitData, Recipe, Vectors, as_float16
from leankv.codecs.code import Code
from leankv.codecs.coding.packing import pack, packed_bytes, unpack
from leankv.codecs.registry import register
from leankv.codecs.statistics import mean_of


@register
@dataclass(frozen=True)
class SparseRecipe(Recipe):
    """The largest `percent` of each token's numbers."""

    percent: int

    family = "sparse"
    revision = 1
    grammar = "sparse:P (P percent kept, a whole number from 1 to 100)"

    @classmethod
    def parse(cls, arguments: str) -> "SparseRecipe":
        if re.fullmatch(r"[1-9][0-9]?|100", arguments) is None:
            raise ValueError
        return cls(int(arguments))

    @property
    def arguments(self) -> str:
        return str(self.percent)

    def fit(self, data: FitData) -> list[Codec]:
        codecs: list[Codec] = []
        for index, x in enumerate(data.train):
            mean = mean_of(x)
            importance = torch.ones_like(mean)
            if data.error_metric is not None:
                importance = data.error_metric[index].diagonal().float().sqrt()
            codecs.append(Sparse(self, mean, importance))
        return codecs

    def unfitted(self, width: int) -> Codec:
        return Sparse(self, torch.zeros(width), torch.ones(width))


class Sparse(Codec):
    """Keeps the `round(P / 100 W)` numbers of each token (at least one) that deviate most; the others become the mean.

    After Mustafar (arXiv 2505.22913): unstructured pruning of each token by magnitude, stored as a bitmap and the
    values kept, in channel order. Mustafar prunes the numbers themselves; here it is their deviation from the channel's
    mean on calibration text, which costs nothing a token, and loses less wherever channels have means (keys' do). Under
    an error metric, a deviation's magnitude counts times the square root of its channel's entry on its diagonal: what
    dropping it costs where the errors of two channels are not correlated.

    Storage: a bitmap of W bits, padded to whole bytes, and a float16 for each number kept. What it does not do:
    quantize what it keeps, or exploit that channels vary together (see `pca`).
    """

    def __init__(
        self,
        recipe: SparseRecipe,
        mean: Float[torch.Tensor, " width"],
        importance: Float[torch.Tensor, " width"],
    ):
        """
        Args:
            recipe: what it was fitted as.
            mean: of the vectors.
            importance: what the magnitude of a channel's deviation is multiplied by.
        """
        super().__init__(recipe, len(mean))
        self.kept = max(1, round(recipe.percent / 100 * self.width))
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)
        self.importance: torch.Tensor
        self.register_buffer("importance", importance)

    @property
    def bits_per_token(self) -> int:
        return 8 * packed_bytes(self.width, 1) + 16 * self.kept

    def encode(self, x: Vectors, context: Context = None) -> Code:
        centred = x.float() - self.mean
        channels = (centred.abs() * self.importance).topk(self.kept, dim=1).indices.sort(dim=1).values
        bitmap = torch.zeros_like(centred, dtype=torch.bool).scatter_(1, channels, True)
        return Code({"bitmap": pack(bitmap, 1), "value": as_float16(centred.gather(1, channels))})

    def deserialize(self, data: bytes, tokens: int) -> Code:
        code = super().deserialize(data, tokens)
        if bool((self._bitmap(code).sum(dim=1) != self.kept).any()):
            raise ValueError(f"a bitmap does not mark {self.kept} numbers")
        return code

    def decode(self, code: Code, context: Context = None) -> Vectors:
        bitmap = self._bitmap(code)
        centred = torch.zeros(bitmap.shape, device=bitmap.device).masked_scatter_(bitmap, code["value"].float())
        return self.mean + centred

    def _bitmap(self, code: Code) -> torch.Tensor:
        """Which numbers are kept, bool `[N, W]`."""
        return unpack(code["bitmap"], 1, self.width).bool()

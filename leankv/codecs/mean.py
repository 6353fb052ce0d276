"""`mean`: stores nothing."""

import torch
from jaxtyping import Float

from leankv.codecs.base import Codec, Context, FitData, Recipe, Vectors
from leankv.codecs.code import Code
from leankv.codecs.registry import register
from leankv.codecs.statistics import mean_of


@register
class MeanRecipe(Recipe):
    """The mean of the calibration vectors."""

    family = "mean"
    revision = 1
    grammar = "mean"

    def fit(self, data: FitData) -> list[Codec]:
        return [Mean(mean_of(x)) for x in data.train]

    def unfitted(self, width: int) -> Codec:
        return Mean(torch.zeros(width))


class Mean(Codec):
    """Replaces every vector by the mean of the calibration vectors: the floor that any codec must beat (FVU = 1).

    Storage: nothing a token.
    """

    def __init__(self, mean: Float[torch.Tensor, " width"]):
        super().__init__(MeanRecipe(), len(mean))
        self.mean: torch.Tensor
        self.register_buffer("mean", mean.float())

    @property
    def bits_per_token(self) -> int:
        return 0

    def encode(self, x: Vectors, context: Context = None) -> Code:
        return Code({"nothing": x.new_empty(len(x), 0)})

    def decode(self, code: Code, context: Context = None) -> Vectors:
        return self.mean.expand(len(code["nothing"]), -1)

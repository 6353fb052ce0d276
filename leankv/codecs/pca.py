"""`pca:D`: the first D principal components."""

from dataclasses import dataclass

import torch
from jaxtyping import Float

from leankv.codecs.base import Codec, Context, Factored, FitData, Recipe, Vectors, as_float16
from leankv.codecs.code import Code
from leankv.codecs.coding.principal_components import principal_components
from leankv.codecs.registry import register


@register
@dataclass(frozen=True)
class PCARecipe(Recipe):
    """The first `dimensions` principal components."""

    dimensions: int

    family = "pca"
    revision = 1
    grammar = "pca:D (D from 1 to the width)"

    @classmethod
    def parse(cls, arguments: str) -> "PCARecipe":
        dimensions = int(arguments)
        if dimensions < 1:
            raise ValueError
        return cls(dimensions)

    @property
    def arguments(self) -> str:
        return str(self.dimensions)

    def check_width(self, width: int) -> None:
        if self.dimensions > width:
            raise ValueError(f"D = {self.dimensions} is more than the width {width}")

    def fit(self, data: FitData) -> list[Codec]:
        codecs: list[Codec] = []
        for index, x in enumerate(data.train):
            found = principal_components(x, None if data.error_metric is None else data.error_metric[index])
            variances = found.variances[: self.dimensions]
            # A direction without variance would be divided by zero; its coefficient is zero anyway.
            scale = variances.clamp_min(variances[0].clamp_min(1e-30) * 1e-12).sqrt().float()
            analysis, synthesis = found.analysis[:, : self.dimensions], found.synthesis[: self.dimensions]
            codecs.append(PCA(self, analysis.contiguous(), synthesis.contiguous(), found.mean, scale))
        return codecs

    def unfitted(self, width: int) -> Codec:
        shape = width, self.dimensions
        return PCA(self, torch.zeros(shape), torch.zeros(shape[::-1]), torch.zeros(width), torch.ones(self.dimensions))


class PCA(Codec):
    """Projects on the first D principal components of the calibration vectors: `z = (x - mean) A`, `x = mean + z B`.

    The least error, under the error metric it is fitted with, that any linear code of D numbers can have, in closed
    form; see `leankv.codecs.coding.principal_components`. The coordinates are scaled to unit variance, so that they
    suit float16.

    Storage: D float16 numbers a token. What it does not do: spend bits where they matter, or bend (see `ae`).
    """

    def __init__(
        self,
        recipe: PCARecipe,
        analysis: Float[torch.Tensor, "width dimensions"],
        synthesis: Float[torch.Tensor, "dimensions width"],
        mean: Float[torch.Tensor, " width"],
        scale: Float[torch.Tensor, " dimensions"],
    ):
        """
        Args:
            recipe: what it was fitted as.
            analysis: from centred vectors to coordinates.
            synthesis: back; the transpose of `analysis` unless errors are weighted.
            mean: of the vectors.
            scale: standard deviation of each coordinate.
        """
        super().__init__(recipe, len(mean))
        self.analysis = torch.nn.Parameter(analysis, requires_grad=False)
        self.synthesis = torch.nn.Parameter(synthesis, requires_grad=False)
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)
        self.scale: torch.Tensor
        self.register_buffer("scale", scale)

    @property
    def bits_per_token(self) -> int:
        return len(self.scale) * 16

    def encode(self, x: Vectors, context: Context = None) -> Code:
        return projected(x, self.mean, self.analysis, self.scale)

    def factored(self, code: Code) -> Factored:
        return Factored(code["z"].float() * self.scale, self.synthesis.float(), self.mean.float())

    def decode(self, code: Code, context: Context = None) -> Vectors:
        return reconstructed(code, self.mean, self.synthesis, self.scale)


def projected(
    x: Vectors,
    mean: Float[torch.Tensor, " width"],
    analysis: Float[torch.Tensor, "width dimensions"],
    scale: Float[torch.Tensor, " dimensions"],
) -> Code:
    """`z = (x - mean) A / scale`, in float16."""
    z = (x.float() - mean).to(analysis.dtype) @ analysis
    return Code({"z": as_float16(z.float() / scale)})


def reconstructed(
    code: Code,
    mean: Float[torch.Tensor, " width"],
    synthesis: Float[torch.Tensor, "dimensions width"],
    scale: Float[torch.Tensor, " dimensions"],
) -> Vectors:
    """`mean + (z scale) B` of such a code."""
    z = (code["z"].float() * scale).to(synthesis.dtype)
    return (z @ synthesis).float() + mean

"""`pca:D`: the first D principal components."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from leankv.codecs.base import Code, Codec, TrainingSettings, as_float16
from leankv.codecs.components import principal_components


class PCA(Codec):
    """Projects on the first D principal components of the calibration vectors: `z = (x - mean) A`, `x = mean + z B`.

    The least error, under the metric it is fitted with, that any linear code of D numbers can have, in closed form; see
    `leankv.codecs.components`. The coordinates are scaled to unit variance, so that they suit float16.

    Storage: D float16 numbers a token. What it does not do: spend bits where they matter, or bend (see `ae`).
    """

    family = "pca"
    revision = 1
    grammar = "pca:D (D from 1 to the width)"

    def __init__(self, analysis: torch.Tensor, synthesis: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor):
        """
        Args:
            analysis: `[W, D]`, from centred vectors to coordinates.
            synthesis: `[D, W]`, back; the transpose of `analysis` unless errors are weighted.
            mean: `[W]`.
            scale: `[D]`, standard deviation of each coordinate.
        """
        super().__init__(analysis.shape[0])
        self.analysis = torch.nn.Parameter(analysis, requires_grad=False)
        self.synthesis = torch.nn.Parameter(synthesis, requires_grad=False)
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)
        self.scale: torch.Tensor
        self.register_buffer("scale", scale)

    @property
    def spec(self) -> str:
        return f"pca:{self.analysis.shape[1]}"

    @property
    def bits_per_token(self) -> int:
        return self.analysis.shape[1] * 16

    def encode(self, x: torch.Tensor) -> Code:
        z = (x.float() - self.mean).to(self.analysis.dtype) @ self.analysis
        return {"z": as_float16(z.float() / self.scale)}

    def decode(self, code: Code) -> torch.Tensor:
        z = (code["z"].float() * self.scale).to(self.synthesis.dtype)
        return (z @ self.synthesis).float() + self.mean

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
        (dimensions,) = arguments
        codecs = []
        for index, x in enumerate(train):
            found = principal_components(x, None if metric is None else metric[index])
            variances = found.variances[:dimensions]
            # A direction without variance would be divided by zero; its coefficient is zero anyway.
            scale = variances.clamp_min(variances[0].clamp_min(1e-30) * 1e-12).sqrt().float()
            analysis, synthesis = found.analysis[:, :dimensions], found.synthesis[:dimensions]
            codecs.append(cls(analysis.contiguous(), synthesis.contiguous(), found.mean, scale))
        return codecs

    @classmethod
    def empty(cls, arguments: Sequence[Any], width: int) -> Self:
        (dimensions,) = arguments
        shape = width, dimensions
        return cls(torch.zeros(shape), torch.zeros(shape[::-1]), torch.zeros(width), torch.ones(dimensions))

    @classmethod
    def parse_arguments(cls, text: str) -> tuple[Any, ...]:
        dimensions = int(text)
        if dimensions < 1:
            raise ValueError
        return (dimensions,)

    @classmethod
    def check_width(cls, arguments: Sequence[Any], width: int) -> None:
        if arguments[0] > width:
            raise ValueError(f"D = {arguments[0]} is more than the width {width}")

"""`pca:D`: the first D principal components."""

from collections.abc import Callable, Sequence
from typing import Self

import torch

from leankv.codecs.base import ROWS, Code, Codec, TrainingSettings, as_float16, mean_of


class PCA(Codec):
    """Projects on the first D principal components of the calibration vectors: `z = (x - mean) C`, `x = mean + z C^T`.

    The least squared error that any linear code of D numbers can have (Eckart and Young, 1936), in closed form. The
    components are scaled by the root of their variance, so that the D numbers have unit variance and suit float16.

    Storage: D float16 numbers a token. What it does not do: spend bits where they matter, or bend (see `ae`).
    """

    family = "pca"
    grammar = "pca:D"

    def __init__(self, components: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor):
        """
        Args:
            components: `[W, D]`, orthonormal columns.
            mean: `[W]`.
            scale: `[D]`, standard deviation along each component.
        """
        super().__init__(components.shape[0])
        self.components = torch.nn.Parameter(components, requires_grad=False)
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)
        self.scale: torch.Tensor
        self.register_buffer("scale", scale)

    @property
    def spec(self) -> str:
        return f"pca:{self.components.shape[1]}"

    @property
    def bits_per_token(self) -> int:
        return self.components.shape[1] * 16

    def encode(self, x: torch.Tensor) -> Code:
        z = (x.float() - self.mean).to(self.components.dtype) @ self.components
        return {"z": as_float16(z.float() / self.scale)}

    def decode(self, code: Code) -> torch.Tensor:
        z = (code["z"].float() * self.scale).to(self.components.dtype)
        return (z @ self.components.T).float() + self.mean

    @classmethod
    def fit(
        cls,
        arguments: Sequence[int],
        train: torch.Tensor,
        heldout: torch.Tensor,
        settings: TrainingSettings,
        on_epoch: Callable[[int, torch.Tensor], None],
    ) -> list[Self]:
        (dimensions,) = arguments
        codecs = []
        for x in train:
            mean = mean_of(x)
            covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
            for rows in x.split(ROWS):
                centred = rows.float() - mean
                covariance += centred.T @ centred / len(x)
            variances, vectors = torch.linalg.eigh(covariance)  # ascending order
            variances, vectors = variances[-dimensions:].flip(0), vectors[:, -dimensions:].flip(1)
            # A direction without variance would be divided by zero; its coefficient is zero anyway.
            scale = variances.clamp_min(variances[0].clamp_min(1e-30) * 1e-12).sqrt()
            codecs.append(cls(vectors.float().contiguous(), mean, scale.float()))
        return codecs

    @classmethod
    def empty(cls, arguments: Sequence[int], width: int) -> Self:
        (dimensions,) = arguments
        return cls(torch.zeros(width, dimensions), torch.zeros(width), torch.ones(dimensions))

    @classmethod
    def parse_arguments(cls, text: str) -> tuple[int, ...]:
        dimensions = int(text)
        if dimensions < 1:
            raise ValueError
        return (dimensions,)

    @classmethod
    def check_width(cls, arguments: Sequence[int], width: int) -> None:
        if arguments[0] > width:
            raise ValueError(f"D = {arguments[0]} is more than the width {width}")

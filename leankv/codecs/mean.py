"""`mean`: stores nothing."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from leankv.codecs.base import Code, Codec, TrainingSettings, mean_of


class Mean(Codec):
    """Replaces every vector by the mean of the calibration vectors: the floor that any codec must beat (FVU = 1).

    Storage: nothing a token.
    """

    family = "mean"
    revision = 1
    grammar = "mean"

    def __init__(self, mean: torch.Tensor):
        super().__init__(len(mean))
        self.mean: torch.Tensor
        self.register_buffer("mean", mean.float())

    @property
    def spec(self) -> str:
        return "mean"

    @property
    def bits_per_token(self) -> int:
        return 0

    def encode(self, x: torch.Tensor) -> Code:
        return {"nothing": x.new_empty(len(x), 0)}

    def decode(self, code: Code) -> torch.Tensor:
        return self.mean.expand(len(code["nothing"]), -1)

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
        return [cls(mean_of(x)) for x in train]

    @classmethod
    def empty(cls, arguments: Sequence[Any], width: int) -> Self:
        return cls(torch.zeros(width))

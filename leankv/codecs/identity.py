"""`identity`: stores every vector as it is."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from leankv.codecs.base import Code, Codec, TrainingSettings


class Identity(Codec):
    """Stores the vector itself, in the dtype it came in: the control that must cost exactly nothing.

    Storage: W numbers of the model's dtype, keys as the cache has them in every key space. It compresses nothing.
    """

    family = "identity"
    revision = 1
    lossless = True
    grammar = "identity"

    def __init__(self, width: int, dtype: torch.dtype = torch.bfloat16):
        super().__init__(width)
        # An empty tensor, so that the dtype is saved and loaded with the codec.
        self.like: torch.Tensor
        self.register_buffer("like", torch.empty(0, dtype=dtype))

    @property
    def spec(self) -> str:
        return "identity"

    @property
    def bits_per_token(self) -> int:
        return self.width * self.like.element_size() * 8

    def encode(self, x: torch.Tensor) -> Code:
        return {"x": x.to(self.like.dtype, copy=True)}  # never a view that keeps more alive

    def decode(self, code: Code) -> torch.Tensor:
        return code["x"]

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
        return [cls(train.shape[-1], train.dtype) for _ in train]

    @classmethod
    def empty(cls, arguments: Sequence[Any], width: int) -> Self:
        return cls(width)

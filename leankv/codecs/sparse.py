"""`sparse:P`: the largest P percent of each token's numbers, and a bitmap of where they stand."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from leankv.codecs.base import Code, Codec, TrainingSettings, as_float16, mean_of
from leankv.codecs.packing import pack, packed_bytes, unpack


class Sparse(Codec):
    """Keeps the `round(P / 100 W)` numbers of each token (at least one) that deviate most; the others become the mean.

    After Mustafar (Joo et al., 2025): unstructured pruning of each token by magnitude, stored as a bitmap and the
    values kept, in channel order. Mustafar prunes the numbers themselves; here it is their deviation from the channel's
    mean on calibration text, which costs nothing a token, and loses less wherever channels have means (keys' do). Under
    a metric, a deviation's magnitude counts times the square root of its channel's entry on the metric's diagonal: what
    dropping it costs where the errors of two channels are not correlated.

    Storage: a bitmap of W bits, padded to whole bytes, and a float16 for each number kept. What it does not do:
    quantize what it keeps, or exploit that channels vary together (see `pca`).
    """

    family = "sparse"
    revision = 1
    grammar = "sparse:P (P percent kept, a whole number from 1 to 100)"

    def __init__(self, percent: int, mean: torch.Tensor, importance: torch.Tensor):
        """
        Args:
            percent: kept.
            mean: `[W]`.
            importance: `[W]`, what the magnitude of a channel's deviation is multiplied by.
        """
        super().__init__(len(mean))
        self.percent = percent
        self.kept = max(1, round(percent / 100 * self.width))
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)
        self.importance: torch.Tensor
        self.register_buffer("importance", importance)

    @property
    def spec(self) -> str:
        return f"sparse:{self.percent}"

    @property
    def bits_per_token(self) -> int:
        return 8 * packed_bytes(self.width, 1) + 16 * self.kept

    def encode(self, x: torch.Tensor) -> Code:
        centred = x.float() - self.mean
        channels = (centred.abs() * self.importance).topk(self.kept, dim=1).indices.sort(dim=1).values
        bitmap = torch.zeros_like(centred, dtype=torch.bool).scatter_(1, channels, True)
        return {"bitmap": pack(bitmap, 1), "value": as_float16(centred.gather(1, channels))}

    def decode(self, code: Code) -> torch.Tensor:
        bitmap = unpack(code["bitmap"], 1, self.width).bool()
        centred = torch.zeros(bitmap.shape, device=bitmap.device).masked_scatter_(bitmap, code["value"].float())
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
        (percent,) = arguments
        codecs = []
        for index, x in enumerate(train):
            mean = mean_of(x)
            importance = torch.ones_like(mean) if metric is None else metric[index].diagonal().float().sqrt()
            codecs.append(cls(percent, mean, importance))
        return codecs

    @classmethod
    def empty(cls, arguments: Sequence[Any], width: int) -> Self:
        (percent,) = arguments
        return cls(percent, torch.zeros(width), torch.ones(width))

    @classmethod
    def parse_arguments(cls, text: str) -> tuple[Any, ...]:
        if re.fullmatch(r"[1-9][0-9]?|100", text) is None:
            raise ValueError
        return (int(text),)

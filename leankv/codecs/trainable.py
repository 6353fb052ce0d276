"""Codecs that gradients pass, so that all codecs of a plan can be trained for what the model says."""

import copy
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import singledispatch

import torch
from jaxtyping import Float

from leankv.codecs.base import Codec, FitData, Recipe, errors_of
from leankv.codecs.coding.integer_matrix import IntegerMatrix, rounded
from leankv.codecs.residual import Residual, ResidualRecipe
from leankv.codecs.share import Share, ShareRecipe
from leankv.codecs.transform import LARGEST_TABLE, Transform, TransformRecipe
from leankv.errors import UserError

Vectors = Float[torch.Tensor, "N W"]
Context = Float[torch.Tensor, "N R"]


class Trainable(torch.nn.Module, ABC):
    """What a codec makes of vectors, as a function of its numbers that gradients pass.

    Trained is how codes are read, not how they are made. Gradients pass rounding straight through (Bengio et al., 2013,
    arXiv 1308.3432), to what the vectors come from. Steps could be learned that way too (LSQ: Esser et al., 2019,
    arXiv 1902.08153) where values are many steps large; but most coordinates here are zero most of the time, and of
    those the gradient tells the error that a finer step would mend, and none of the bits that it would take. That was
    tried and diverged (log of 2026-11-27).
    """

    @abstractmethod
    def forward(self, x: Vectors, context: Context) -> tuple[Vectors, Float[torch.Tensor, ""]]:
        """What is decoded, and what all these vectors take, stored, in bits."""

    @abstractmethod
    def scale_steps(self, factor: float) -> None:
        """Code with steps so many times as large as the codec's, from now on."""

    @abstractmethod
    def settled(self, data: FitData) -> Codec:
        """The codec with its numbers as they are now, its ranges and probabilities fitted to vectors of one site."""


def require_trainable(recipe: Recipe) -> None:
    """Refuse a recipe whose codecs are not trained.

    Raises:
        UserError: it is of another family than `transform`, `share` and `resid` of these.
    """
    if isinstance(recipe, ResidualRecipe):
        require_trainable(recipe.first)
        require_trainable(recipe.second)
    elif not isinstance(recipe, TransformRecipe | ShareRecipe):
        raise UserError(f"{recipe.text} is not trained; --refit distill takes transform, share and resid of these")


@singledispatch
def trainable(codec: Codec) -> Trainable:
    """A codec that gradients pass, beginning as the codec is.

    Raises:
        UserError: its family is not trained.
    """
    require_trainable(codec.recipe)
    raise AssertionError("a family that is trained has a class here")


def through(whole: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The first as a value, and the second for gradients."""
    return x + (whole - x).detach()


SLOWLY = 0.05
"""Of a matrix's numbers, and of gains: parts of their size that one unit of a parameter changes. Assumption: a value of
20 steps moves by one step where it is read 5 % larger."""


class _TrainableTransform(Trainable):
    """The matrix that coordinates are decoded with, the gain of each, and what they are decoded around."""

    def __init__(self, codec: Transform):
        super().__init__()
        self.codec = codec
        kept = codec.synthesis.widened()
        self.change = torch.nn.Parameter(torch.zeros_like(kept))
        self.gains, self.shift = (torch.nn.Parameter(kept.new_zeros(kept.shape[1])) for _ in range(2))
        self.size: torch.Tensor
        self.register_buffer("size", SLOWLY * kept.square().mean(dim=0).sqrt())
        self.factor = 1.0
        self.bits: torch.Tensor  # of 0 to the largest size, and of all beyond
        sizes = -codec.probabilities()[:, LARGEST_TABLE:].log2().float()
        self.register_buffer("bits", sizes.to(codec.mean.device))

    def _read_with(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The transpose of `B`, and what is decoded around."""
        synthesis = self.codec.synthesis.widened() + self.change * self.size
        return synthesis * (SLOWLY * self.gains).exp(), self.codec.centre + synthesis @ (SLOWLY * self.shift)

    def forward(self, x: Vectors, context: Context) -> tuple[Vectors, Float[torch.Tensor, ""]]:
        y = (x - self.codec.mean) @ self.codec.analysis.widened() / self.factor
        q = through(y.detach().round(), y)
        synthesis, centre = self._read_with()
        return centre + self.factor * q @ synthesis.T, self._bits_of(q)

    def _bits_of(self, q: torch.Tensor) -> torch.Tensor:
        """By the probabilities that the codec was fitted with; between whole numbers, a straight line."""
        size = q.abs()
        lower = size.detach().floor().clamp_max(LARGEST_TABLE).long().T
        below, above = (self.bits.gather(1, (lower + more).clamp_max(LARGEST_TABLE + 1)) for more in (0, 1))
        # What a size takes; its gradient is the slope of the line through it, towards zero and away from it alike.
        slope = torch.where(lower == 0, above - below, (above - self.bits.gather(1, (lower - 1).clamp_min(0))) / 2)
        return (below + slope * (size.T - size.detach().T)).sum()

    def scale_steps(self, factor: float) -> None:
        self.factor = factor

    def settled(self, data: FitData) -> Codec:
        codec = copy.deepcopy(self.codec)
        synthesis, centre = (own.detach() for own in self._read_with())
        weight = torch.eye(len(centre), device=centre.device) if data.error_metric is None else data.error_metric[0]
        codec.synthesis = rounded(synthesis, weight, codec.synthesis.bits)
        codec.read_around(centre)
        codec.fit_ranges(data.train[0])
        codec.count_bits(data.heldout[0])
        return codec


class _TrainableShare(Trainable):
    """How far each number's prediction goes from the mean."""

    def __init__(self, codec: Share):
        super().__init__()
        self.codec = codec
        self.gains = torch.nn.Parameter(torch.zeros_like(codec.mean))

    def forward(self, x: Vectors, context: Context) -> tuple[Vectors, Float[torch.Tensor, ""]]:
        predicted = self.codec.predicted(context).float()
        gains = (SLOWLY * self.gains).exp()
        return self.codec.mean + (predicted - self.codec.mean) * gains, predicted.new_zeros(())

    def scale_steps(self, factor: float) -> None:
        """It has none."""

    def settled(self, data: FitData) -> Codec:
        codec, gains = copy.deepcopy(self.codec), (SLOWLY * self.gains.detach()).exp()
        last = codec.matrices[-1]
        if isinstance(last, IntegerMatrix):
            last.scale.mul_(gains)
        else:
            last.data.mul_(gains)
        codec.bias.copy_(codec.mean + (codec.bias - codec.mean) * gains)
        return codec


class _TrainableResidual(Trainable):
    def __init__(self, codec: Residual):
        super().__init__()
        assert isinstance(codec.recipe, ResidualRecipe)
        self.recipe = codec.recipe
        self.first, self.second = trainable(codec.first), trainable(codec.second)

    def forward(self, x: Vectors, context: Context) -> tuple[Vectors, Float[torch.Tensor, ""]]:
        predicted, bits = self.first(x, context)
        left, others = self.second(x - predicted, context)
        return predicted + left, bits + others

    def scale_steps(self, factor: float) -> None:
        self.first.scale_steps(factor)
        self.second.scale_steps(factor)

    def settled(self, data: FitData) -> Codec:
        first = self.first.settled(data)
        left = errors_of([first], data.train, data.context), errors_of([first], data.heldout, data.heldout_context)
        second = self.second.settled(replace(data, train=left[0], heldout=left[1]))
        return Residual(self.recipe, first, second)


trainable.register(Transform, _TrainableTransform)
trainable.register(Share, _TrainableShare)
trainable.register(Residual, _TrainableResidual)

"""`resid(A,B)`: codec A, and codec B for what A leaves."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from leankv.codecs.base import (
    Codec,
    Context,
    FitData,
    Recipe,
    Shapes,
    TrainingSettings,
    Vectors,
    errors_of,
    fit_together,
)
from leankv.codecs.code import Code
from leankv.codecs.registry import known_recipe, register, split_recipes
from leankv.codecs.statistics import mean_of, sum_of_squares


@register
@dataclass(frozen=True)
class ResidualRecipe(Recipe):
    """`second` for what `first` leaves."""

    first: Recipe
    second: Recipe

    family = "resid"
    revision = 2  # B fitted to cross-fitted errors of A
    grammar = "resid(A,B) (A, B any two codecs; of two that predict, both from as many layers)"
    nested = True

    @classmethod
    def parse(cls, arguments: str) -> "ResidualRecipe":
        texts = split_recipes(arguments)
        if len(texts) != 2 or not all(texts):
            raise ValueError
        first, second = (known_recipe(text) for text in texts)
        if first.n_context_layers and second.n_context_layers not in (0, first.n_context_layers):
            raise ValueError  # both are handed one context
        return cls(first, second)

    @property
    def arguments(self) -> str:
        return f"{self.first.text},{self.second.text}"

    @property
    def n_context_layers(self) -> int:
        return max(self.first.n_context_layers, self.second.n_context_layers)

    def check_width(self, width: int) -> None:
        self.first.check_width(width)
        self.second.check_width(width)

    def fit(self, data: FitData) -> list[Codec]:
        """Fit A, then B to what A leaves. Where both are trained there are twice as many epochs, A's first."""
        return self.fit_together([self], data)[0]

    @classmethod
    def fit_together(cls, recipes: Sequence[Recipe], data: FitData) -> list[list[Codec]]:
        """What recipes have for A in common is fitted once."""
        own = [recipe for recipe in recipes if isinstance(recipe, cls)]
        fitted: dict[Recipe, list[Codec]] = {}
        for first in dict.fromkeys(recipe.first for recipe in own):
            fitted |= cls._fit_behind(first, [recipe for recipe in own if recipe.first == first], data)
        return [fitted[recipe] for recipe in own]

    @staticmethod
    def _fit_behind(first: Recipe, recipes: Sequence["ResidualRecipe"], data: FitData) -> dict[Recipe, list[Codec]]:
        firsts, left = first.fit_and_leave(data)
        heldout_left = errors_of(firsts, data.heldout, data.heldout_context)
        # B's error is known as a fraction of what A left; this makes it one of the vectors themselves.
        share = sum_of_squares(heldout_left, mean_of(heldout_left)[:, None]) / sum_of_squares(
            data.heldout, mean_of(data.heldout)[:, None]
        )
        behind = replace(
            data,
            train=left,
            heldout=heldout_left,
            on_epoch=lambda epoch, error: data.on_epoch(epoch, error * share.to(error.device)),
        )
        fitted = fit_together([recipe.second for recipe in recipes], behind)
        return {
            recipe: [Residual(recipe, own, other) for own, other in zip(firsts, seconds, strict=True)]
            for recipe, seconds in zip(recipes, fitted, strict=True)
        }

    def unfitted(self, width: int) -> Codec:
        return Residual(self, self.first.unfitted(width), self.second.unfitted(width))

    def shaped(self, width: int, shapes: Shapes) -> Codec:
        first, second = (
            recipe.shaped(width, {n.removeprefix(own): shape for n, shape in shapes.items() if n.startswith(own)})
            for own, recipe in (("first.", self.first), ("second.", self.second))
        )
        return Residual(self, first, second)

    def working_bytes(self, width: int, training: TrainingSettings) -> int:
        return max(recipe.working_bytes(width, training) for recipe in (self.first, self.second))

    @property
    def data_copies(self) -> int:
        return max(self.first.data_copies, 1 + self.second.data_copies)

    def revisions(self) -> dict[str, int | str]:
        return super().revisions() | self.first.revisions() | self.second.revisions()


class Residual(Codec):
    """Two codecs of any family, one behind the other: `x_hat = A(x) + B(x - A(x))`.

    After GEAR (Kang et al., 2024, arXiv 2403.05527), which adds a low rank and a few outliers to coarse integers. There
    the low rank is found anew for each sequence, and both work on what the integers left; here both codecs are fitted
    on calibration text, and their order is as written: `resid(pca:16,int:2)` quantizes what 16 components leave. With
    outliers kept apart: `resid(pca:16,nuq:2+1)`; centred: `resid(mean,int:4)`.

    Storage: both codes. What it does not do: fit A again once B is known, or B to A's parameters as they are rounded
    afterwards (encoding does see them: B then codes what the rounded A leaves).
    """

    def __init__(self, recipe: ResidualRecipe, first: Codec, second: Codec):
        super().__init__(recipe, first.width)
        self.first = first
        self.second = second

    @property
    def bits_per_token(self) -> int | float:
        return self.first.bits_per_token + self.second.bits_per_token

    @property
    def stored_bits_per_token(self) -> int | float:
        return self.first.stored_bits_per_token + self.second.stored_bits_per_token

    def encode(self, x: Vectors, context: Context = None) -> Code:
        first = self.first.encode(x, context)
        left = x.float() - self.first.decode(first, context).float()
        return _together(first, self.second.encode(left, context))

    def decode(self, code: Code, context: Context = None) -> Vectors:
        first, second = _apart(code)
        return self.first.decode(first, context).float() + self.second.decode(second, context).float()

    def serialize(self, code: Code) -> bytes:
        first, second = (
            codec.serialize(own) for codec, own in zip((self.first, self.second), _apart(code), strict=True)
        )
        return struct.pack("<I", len(first)) + first + second

    def deserialize(self, data: bytes, tokens: int) -> Code:
        return self.deserialize_all([data], [tokens])

    def deserialize_all(self, streams: Sequence[bytes], tokens: Sequence[int]) -> Code:
        lengths = [struct.unpack_from("<I", data)[0] if len(data) >= 4 else -1 for data in streams]
        if any(not 0 <= length <= len(data) - 4 for data, length in zip(streams, lengths, strict=True)):
            raise ValueError("a stream is cut off")
        firsts = [data[4 : 4 + length] for data, length in zip(streams, lengths, strict=True)]
        seconds = [data[4 + length :] for data, length in zip(streams, lengths, strict=True)]
        return _together(self.first.deserialize_all(firsts, tokens), self.second.deserialize_all(seconds, tokens))


def _together(first: Code, second: Code) -> Code:
    """One code with the columns of both."""
    columns = {
        f"{own}.{name}": column for own, code in (("a", first), ("b", second)) for name, column in code.columns.items()
    }
    return Code(columns)


def _apart(code: Code) -> tuple[Code, Code]:
    """The way back."""
    first, second = (
        Code({name.removeprefix(own): column for name, column in code.columns.items() if name.startswith(own)})
        for own in ("a.", "b.")
    )
    return first, second

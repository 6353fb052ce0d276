"""`share:-K`, `share:-KrR`, `share:-KqB`: vectors predicted from those of the layers before."""

import functools
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16

from leankv.codecs.base import Codec, Context, FitData, Recipe, Shapes, TrainingSettings, Vectors, as_float16, length_in
from leankv.codecs.code import Code
from leankv.codecs.coding.integer_matrix import IntegerMatrix, rounded
from leankv.codecs.coding.principal_components import root_of
from leankv.codecs.registry import register
from leankv.codecs.statistics import ROWS, mean_of

FOLDS = 4  # assumption: each regression then sees three quarters of the text, and errs little more than on all of it
RIDGE = 1e-4  # assumption: of the mean squared number in the context; keeps what is nearly alike from cancelling
ROUNDED_RIDGE = 3e-3
"""Of each number's own mean square, where weights take 4 bits: small weights lose less by rounding. Measured on layers
14 and 15 of SmolLM2: stored bits 10 % above those of float32 weights without it, 4 % with it, 6 % with three times it.
"""


def as_context(vectors: Float[torch.Tensor, "*leading width"]) -> Float16[torch.Tensor, "*leading width"]:
    """Decoded vectors as those see them that predict from them, when fitting, encoding and decoding: in 16 bits.

    A cache keeps them for as long as later layers of a step need them. What rounding changes in a prediction, the codec
    behind it sees and corrects: codes are no longer than in float32 (bfloat16 makes them 0.06 % longer). And a decoder
    works them out again among other rows, whose last bits may fall on the other side of a rounding: one unit of it (up
    to 2^-10 of a number; in bfloat16 2^-7) must be small beside the steps of that codec. What is beyond 65504 stays
    there, for encoder and decoder alike.
    """
    return as_float16(vectors)


@register
@dataclass(frozen=True)
class ShareRecipe(Recipe):
    """A prediction from the layers before.

    Attributes:
        layers: so many.
        rank: of the regression; None for any.
        bits: of a weight, 4 or 8; None for floating point.
    """

    layers: int
    rank: int | None = None
    bits: int | None = None

    family = "share"
    revision = 3  # no weights for what a layer does not see; means within the bias
    grammar = (
        "share:-K, share:-KrR, share:-KqB, share:-KrRqB (K layers before, 1 to 4; rank R; weights of B bits, 4 or 8)"
    )

    @classmethod
    def parse(cls, arguments: str) -> "ShareRecipe":
        found = re.fullmatch(r"-([1-4])(?:r([1-9][0-9]{0,5}))?(?:q([48]))?", arguments)
        if found is None:
            raise ValueError
        layers, rank, bits = (None if number is None else int(number) for number in found.groups())
        assert layers is not None
        return cls(layers, rank, bits)

    @property
    def arguments(self) -> str:
        rank = "" if self.rank is None else f"r{self.rank}"
        return f"-{self.layers}{rank}" + ("" if self.bits is None else f"q{self.bits}")

    @property
    def n_context_layers(self) -> int:
        return self.layers

    def check_width(self, width: int) -> None:
        if self.rank is not None and self.rank > width:
            raise ValueError(f"R = {self.rank} is more than the width {width}")

    def known(self, width: int) -> int:
        """R: numbers of a context that lacks nothing."""
        return (2 * self.layers + 1) * width

    def fit(self, data: FitData) -> list[Codec]:
        """A regression; the error metric matters to it only where its rank is limited."""
        return self.fit_and_leave(data)[0]

    def fit_and_leave(self, data: FitData) -> tuple[list[Codec], Float[torch.Tensor, "sites tokens width"]]:
        """Errors are those of regressions on the other folds: with a thousand weights an output, its own flatter it."""
        codecs: list[Codec] = []
        errors = torch.empty_like(data.train)
        metrics = [None] * len(errors) if data.error_metric is None else data.error_metric
        for x, context, metric, left in zip(data.train, data.context, metrics, errors, strict=True):
            mean, context_mean = mean_of(x), mean_of(context)
            length = max(1, math.ceil(len(x) / FOLDS))  # whole runs of text, so that a fold holds other articles
            folds = list(zip(x.split(length), context.split(length), left.split(length), strict=True))
            sums = [_sums(own, known, mean, context_mean) for own, known, _ in folds]
            gram, cross = (functools.reduce(torch.add, parts) for parts in zip(*sums, strict=True))
            for (own, known, place), (its_gram, its_cross) in zip(folds, sums, strict=True):
                weights = self._weights(gram - its_gram, cross - its_cross, metric)
                for rows, r, into in zip(own.split(ROWS), known.split(ROWS), place.split(ROWS), strict=True):
                    into.copy_(rows.float() - mean - _product(r.float() - context_mean, weights))
            weights = self._weights(gram, cross, metric)
            codecs.append(Share(self, weights, mean, mean - _product(context_mean[None], weights)[0]))
        return codecs, errors

    def _weights(self, gram: torch.Tensor, cross: torch.Tensor, metric: torch.Tensor | None) -> list["Weight"]:
        """The regression from its sums (see `_sums`): one matrix `[R, W]`, or two whose product it is."""
        ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-30) if len(gram) else 0.0
        kept = ROUNDED_RIDGE * gram.diagonal() if self.bits == 4 else torch.zeros_like(gram.diagonal())
        gram = gram + torch.diag(kept + ridge)
        whole = torch.linalg.solve(gram, cross)
        if self.rank is None:
            return [whole.float() if self.bits is None else rounded(whole, gram, self.bits)]
        # The fitted values' principal components under the metric, in order of what they explain.
        root, inverse = root_of(torch.eye(len(cross.T), device=cross.device) if metric is None else metric)
        _, vectors = torch.linalg.eigh(root @ cross.T @ whole @ root)
        vectors = vectors.flip(1)[:, : self.rank]
        inner, outer = whole @ root @ vectors, vectors.T @ inverse
        if self.bits is None:
            return [inner.float(), outer.float()]
        # What follows the first matrix is fitted to it as it is rounded.
        first = rounded(inner, gram, self.bits)
        seen = first.widened().double()
        moments = seen.T @ gram @ seen
        moments += 1e-9 * moments.diagonal().mean().clamp_min(1e-30) * torch.eye(len(moments), device=gram.device)
        return [first, rounded(torch.linalg.solve(moments, seen.T @ cross), moments)]

    def unfitted(self, width: int) -> Codec:
        return self._empty(width, self.known(width))

    def shaped(self, width: int, shapes: Shapes) -> Codec:
        known = self.known(width)
        if self.bits != 4:
            return self._empty(width, length_in(shapes, ["weights.0", "weights.0.integers"], known))
        # Two rows a byte: all that is known comes in whole vectors.
        bytes_a_column = length_in(shapes, ["weights.0.integers"], -(-known // 2))
        return self._empty(width, min(2 * bytes_a_column, known) // width * width)

    def _empty(self, width: int, known: int) -> Codec:
        sizes = [known, width] if self.rank is None else [known, self.rank, width]
        weights: list[Weight] = []
        for rows, columns in itertools.pairwise(sizes):
            bits = self.bits if self.bits is not None and not weights else 8
            weights.append(torch.zeros(rows, columns) if self.bits is None else IntegerMatrix(rows, columns, bits))
        return Share(self, weights, torch.zeros(width), torch.zeros(width))

    def working_bytes(self, width: int, training: TrainingSettings) -> int:
        known = self.known(width)
        # The sums of each fold, of all, and of all but one while they are solved; a piece of vectors, centred.
        fitting = (FOLDS + 5) * known * (known + width) * 8 + 2 * ROWS * known * 4
        # Rounding: what is to be rounded, rounded and carried on, and two inverses.
        return fitting + (0 if self.bits is None else 4 * known * (known + width) * 8)

    @property
    def data_copies(self) -> int:
        return 1  # the errors of the folds


Weight = torch.Tensor | IntegerMatrix


class Share(Codec):
    """Predicts a layer's vectors from the keys and values of the K layers before it: `x_hat = b + r L`.

    `r`, the context, is the same token's keys and values, as attention reads them, in the K layers before that see as
    much of the text (and, for values, the layer's own keys). `L` is their ridge regression, `b` gives the mean of the
    vectors at the mean of the contexts. The first layers see fewer of them, and the keys of the first none: there the
    prediction is the mean. Layers share what the residual stream carries from one to the next (LCKV: Wu and Tu, 2024,
    arXiv 2405.10637; xKV: Chang et al., 2025, arXiv 2503.18893). Mostly of use as the first stage of `resid`.

    `qB`: `L` in B bits, rounded as language models' weights are, against the second moments of the contexts
    (`leankv.codecs.coding.integer_matrix`). The encoder predicts with the rounded one too, so a codec behind it repairs
    what rounding leaves, and later layers are fitted to what that gives. `rR`: `L` of rank R, the one that leaves the
    least error under the error metric (reduced-rank regression: Izenman, 1975; his `Gamma` is the metric), in two
    matrices; with `qB`, the second one of 8 bits and fitted to the first as it is rounded.

    Storage: nothing, while what it looks at is stored.

    What it does not do: look at later layers, whose vectors do not exist when the layer's attention reads; or repair
    itself when the layers before are replaced by other codecs than those whose vectors it was fitted to.
    """

    def __init__(
        self,
        recipe: ShareRecipe,
        weights: Sequence[Weight],
        mean: Float[torch.Tensor, " width"],
        bias: Float[torch.Tensor, " width"],
    ):
        """
        Args:
            recipe: what it was fitted as.
            weights: `L` `[R, W]`, or two matrices whose product it is.
            mean: of the vectors.
            bias: `b`.
        """
        super().__init__(recipe, len(mean))
        self.weights = torch.nn.Module()
        for number, weight in enumerate(weights):
            if isinstance(weight, IntegerMatrix):
                self.weights.add_module(str(number), weight)
            else:
                self.weights.register_parameter(str(number), torch.nn.Parameter(weight, requires_grad=False))
        self._count = len(weights)
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)
        self.bias: torch.Tensor
        self.register_buffer("bias", bias)

    @property
    def matrices(self) -> list["Weight"]:
        """`L`, or the two matrices whose product it is."""
        return [getattr(self.weights, str(number)) for number in range(self._count)]

    @property
    def bits_per_token(self) -> int:
        return 0

    def encode(self, x: Vectors, context: Context = None) -> Code:
        return Code({"z": x.new_empty(len(x), 0, dtype=torch.uint8)})

    def decode(self, code: Code, context: Context = None) -> Vectors:
        """The prediction; where nothing is known of the token but what is usual, the mean."""
        if context is None:
            return self.mean.expand(len(code["z"]), -1).clone()
        return self.predicted(context)

    def predicted(self, context: Float[torch.Tensor, "tokens known"]) -> Vectors:
        """The prediction from what is known."""
        weights = self.matrices
        # In `resid`, the other codec may ask for more.
        return _product(context[:, : len(weights[0])], weights) + self.bias


def _product(known: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
    """What is known, `[N, R]`, times all weights, `[N, W]`, float32."""
    for weight in weights:
        matrix = weight.widened() if isinstance(weight, IntegerMatrix) else weight
        known = known.to(matrix.dtype) @ matrix
    return known.float()


def _sums(
    x: torch.Tensor, context: torch.Tensor, mean: torch.Tensor, context_mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sum r r^T` `[R, R]` and `sum r x^T` `[R, W]`, float64, of vectors `[N, W]` and contexts `[N, R]`, centred."""
    width = context.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=x.device)
    cross = torch.zeros(width, x.shape[1], dtype=torch.float64, device=x.device)
    for rows, known in zip(x.split(ROWS), context.split(ROWS), strict=True):
        centred = known.float() - context_mean
        gram += centred.T @ centred
        cross += centred.T @ (rows.float() - mean)
    return gram, cross

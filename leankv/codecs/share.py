"""`share:-K`: vectors predicted from those of the layers before."""

import functools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16
from torch.nn.functional import pad

from leankv.codecs.base import Codec, Context, FitData, Recipe, TrainingSettings, Vectors, as_float16
from leankv.codecs.code import Code
from leankv.codecs.registry import register
from leankv.codecs.statistics import ROWS, mean_of

FOLDS = 4  # assumption: each regression then sees three quarters of the text, and errs little more than on all of it
RIDGE = 1e-4  # assumption: of the mean squared number in the context; keeps what is nearly alike from cancelling


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
    """A prediction from the so many `layers` before."""

    layers: int

    family = "share"
    revision = 2  # contexts of 16 bits
    grammar = "share:-K (from the K layers before, K 1 to 4)"

    @classmethod
    def parse(cls, arguments: str) -> "ShareRecipe":
        if not arguments.startswith("-") or not 1 <= int(arguments[1:]) <= 4:
            raise ValueError
        return cls(int(arguments[1:]))

    @property
    def arguments(self) -> str:
        return f"-{self.layers}"

    @property
    def n_context_layers(self) -> int:
        return self.layers

    def known(self, width: int) -> int:
        """R: numbers of a context that lacks nothing."""
        return (2 * self.layers + 1) * width

    def fit(self, data: FitData) -> list[Codec]:
        """A regression; the error metric does not matter to it, since each output has all weights to itself."""
        return self.fit_and_leave(data)[0]

    def fit_and_leave(self, data: FitData) -> tuple[list[Codec], Float[torch.Tensor, "sites tokens width"]]:
        """Errors are those of regressions on the other folds: with a thousand weights an output, its own flatter it."""
        codecs: list[Codec] = []
        errors = torch.empty_like(data.train)
        for x, context, left in zip(data.train, data.context, errors, strict=True):
            mean, context_mean = mean_of(x), mean_of(context)
            length = max(1, math.ceil(len(x) / FOLDS))  # whole runs of text, so that a fold holds other articles
            folds = list(zip(x.split(length), context.split(length), left.split(length), strict=True))
            sums = [_sums(own, known, mean, context_mean) for own, known, _ in folds]
            gram, cross = (functools.reduce(torch.add, parts) for parts in zip(*sums, strict=True))
            for (own, known, place), (its_gram, its_cross) in zip(folds, sums, strict=True):
                weight = _solved(gram - its_gram, cross - its_cross)
                for rows, r, into in zip(own.split(ROWS), known.split(ROWS), place.split(ROWS), strict=True):
                    into.copy_(rows.float() - mean - (r.float() - context_mean) @ weight)
            missing = self.known(len(mean)) - len(context_mean)
            weight, context_mean = pad(_solved(gram, cross), (0, 0, 0, missing)), pad(context_mean, (0, missing))
            codecs.append(Share(self, weight, mean, context_mean))
        return codecs, errors

    def unfitted(self, width: int) -> Codec:
        known = self.known(width)
        return Share(self, torch.zeros(known, width), torch.zeros(width), torch.zeros(known))

    def working_bytes(self, width: int, training: TrainingSettings) -> int:
        known = self.known(width)
        # The sums of each fold, of all, and of all but one while they are solved; a piece of vectors, centred.
        return (FOLDS + 4) * known * (known + width) * 8 + 2 * ROWS * known * 4

    @property
    def data_copies(self) -> int:
        return 1  # the errors of the folds


class Share(Codec):
    """Predicts a layer's vectors from the keys and values of the K layers before it: `x_hat = mean + (r - mean_r) L`.

    `r`, the context, is the same token's keys and values, as attention reads them, in the K layers before that see as
    much of the text (and, for values, the layer's own keys). `L` is their ridge regression. The first layers see fewer
    of them, and the keys of the first none: there the prediction is the mean. Layers share what the residual stream
    carries from one to the next (LCKV: Wu and Tu, 2024, arXiv 2405.10637; xKV: Chang et al., 2025, arXiv 2503.18893).
    Mostly of use as the first stage of `resid`.

    Storage: nothing, while what it looks at is stored.

    What it does not do: look at later layers, whose vectors do not exist when the layer's attention reads; or repair
    itself when the layers before are replaced by other codecs than those whose vectors it was fitted to.
    """

    def __init__(
        self,
        recipe: ShareRecipe,
        weight: Float[torch.Tensor, "known width"],
        mean: Float[torch.Tensor, " width"],
        context_mean: Float[torch.Tensor, " known"],
    ):
        """
        Args:
            recipe: what it was fitted as.
            weight: zeros for what a layer or part does not see.
            mean: of the vectors.
            context_mean: of their contexts.
        """
        super().__init__(recipe, len(mean))
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)
        # The name that saved codecs have.
        self.reference_mean: torch.Tensor
        self.register_buffer("reference_mean", context_mean)

    @property
    def bits_per_token(self) -> int:
        return 0

    def encode(self, x: Vectors, context: Context = None) -> Code:
        return Code({"z": x.new_empty(len(x), 0, dtype=torch.uint8)})

    def decode(self, code: Code, context: Context = None) -> Vectors:
        """The prediction; where nothing is known of the token but what is usual, the mean."""
        if context is None:
            return self.mean.expand(len(code["z"]), -1).clone()
        # The first layers have less; in `resid`, the other codec may ask for more.
        seen = min(context.shape[1], len(self.weight))
        known = (context[:, :seen] - self.reference_mean[:seen]).to(self.weight.dtype)
        return (known @ self.weight[:seen]).float() + self.mean


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


def _solved(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """The ridge regression `[R, W]`, float32, of such sums."""
    if not len(gram):
        return cross.float()
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-30)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), device=gram.device), cross).float()

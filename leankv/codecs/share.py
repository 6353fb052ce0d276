"""`share:-K`: vectors predicted from those of the layers before."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch.nn.functional import pad

from leankv.codecs.base import ROWS, Code, Codec, TrainingSettings, as_float16, mean_of

FOLDS = 4  # assumption: each regression then sees three quarters of the text, and errs little more than on all of it
RIDGE = 1e-4  # assumption: of the mean squared number in the reference; keeps what is nearly alike from cancelling


def as_context(vectors: torch.Tensor) -> torch.Tensor:
    """Decoded vectors as those see them that predict from them, when fitting, encoding and decoding: in 16 bits.

    A cache keeps them for as long as later layers of a step need them. What rounding changes in a prediction, the codec
    behind it sees and corrects: codes are no longer than in float32 (bfloat16 makes them 0.06 % longer). And a decoder
    works them out again among other rows, whose last bits may fall on the other side of a rounding: one unit of it (up
    to 2^-10 of a number; in bfloat16 2^-7) must be small beside the steps of that codec. What is beyond 65504 stays
    there, for encoder and decoder alike.
    """
    return as_float16(vectors)


class Share(Codec):
    """Predicts a layer's vectors from the keys and values of the K layers before it: `x_hat = mean + (r - mean_r) L`.

    `r` is the same token's keys and values, as attention reads them, in the K layers before that see as much of the
    text (and, for values, the layer's own keys). `L` is their ridge regression. The first layers see fewer of them, and
    the keys of the first none: there the prediction is the mean. Layers share what the residual stream carries from one
    to the next (LCKV: Wu and Tu, 2024; xKV: Chang et al., 2025). Mostly of use as the first stage of `resid`.

    Storage: nothing, while what it looks at is stored.

    What it does not do: look at later layers, whose vectors do not exist when the layer's attention reads; or repair
    itself when the layers before are replaced by other codecs than it was fitted beside.
    """

    family = "share"
    revision = 2  # references of 16 bits
    grammar = "share:-K (from the K layers before, K 1 to 4)"

    def __init__(self, weight: torch.Tensor, mean: torch.Tensor, reference_mean: torch.Tensor, looks_back: int):
        """
        Args:
            weight: `[R, W]`; R is `(2 K + 1) W`, with zeros for what a layer or part does not see.
            mean: `[W]`.
            reference_mean: `[R]`.
            looks_back: K.
        """
        super().__init__(len(mean))
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)
        self.reference_mean: torch.Tensor
        self.register_buffer("reference_mean", reference_mean)
        self.looks_back = looks_back

    @property
    def spec(self) -> str:
        return f"share:-{self.looks_back}"

    @property
    def bits_per_token(self) -> float:
        return 0

    def encode(self, x: torch.Tensor) -> Code:
        return {"z": x.new_empty(len(x), 0, dtype=torch.uint8)}

    def decode(self, code: Code) -> torch.Tensor:
        """The prediction where nothing is known of the token but what is usual: the mean."""
        return self.mean.expand(len(code["z"]), -1).clone()

    def decode_beside(self, code: Code, reference: torch.Tensor) -> torch.Tensor:
        # The first layers have less, a codec beside this one in `resid` may ask for more.
        seen = min(reference.shape[1], len(self.weight))
        known = (reference[:, :seen] - self.reference_mean[:seen]).to(self.weight.dtype)
        return (known @ self.weight[:seen]).float() + self.mean

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
        nothing = train[..., :0]
        return cls.fit_beside(arguments, train, heldout, (nothing, heldout[..., :0]), metric, settings, on_epoch)

    @classmethod
    def fit_beside(
        cls,
        arguments: Sequence[Any],
        train: torch.Tensor,
        heldout: torch.Tensor,
        references: tuple[torch.Tensor, torch.Tensor],
        metric: torch.Tensor | None,
        settings: TrainingSettings,
        on_epoch: Callable[[int, torch.Tensor], None],
    ) -> list[Self]:
        """A regression; the metric does not matter to it, since each output has all weights to itself."""
        return cls.fit_and_leave(arguments, train, heldout, references, metric, settings, on_epoch)[0]

    @classmethod
    def fit_and_leave(
        cls,
        arguments: Sequence[Any],
        train: torch.Tensor,
        heldout: torch.Tensor,
        references: tuple[torch.Tensor, torch.Tensor],
        metric: torch.Tensor | None,
        settings: TrainingSettings,
        on_epoch: Callable[[int, torch.Tensor], None],
    ) -> tuple[list[Self], torch.Tensor]:
        """Errors are those of regressions on the other folds: with a thousand weights an output, its own flatter it."""
        (looks_back,) = arguments
        codecs, errors = [], torch.empty_like(train)
        for x, reference, left in zip(train, references[0], errors, strict=True):
            mean, reference_mean = mean_of(x), mean_of(reference)
            length = max(1, math.ceil(len(x) / FOLDS))  # whole runs of text, so that a fold holds other articles
            folds = list(zip(x.split(length), reference.split(length), left.split(length), strict=True))
            sums = [_sums(own, known, mean, reference_mean) for own, known, _ in folds]
            gram, cross = (functools.reduce(torch.add, parts) for parts in zip(*sums, strict=True))
            for (own, known, place), (its_gram, its_cross) in zip(folds, sums, strict=True):
                weight = _solved(gram - its_gram, cross - its_cross)
                for rows, r, into in zip(own.split(ROWS), known.split(ROWS), place.split(ROWS), strict=True):
                    into.copy_(rows.float() - mean - (r.float() - reference_mean) @ weight)
            missing = (2 * looks_back + 1) * len(mean) - len(reference_mean)
            weight, reference_mean = pad(_solved(gram, cross), (0, 0, 0, missing)), pad(reference_mean, (0, missing))
            codecs.append(cls(weight, mean, reference_mean, looks_back))
        return codecs, errors

    @classmethod
    def empty(cls, arguments: Sequence[Any], width: int) -> Self:
        known = (2 * arguments[0] + 1) * width
        return cls(torch.zeros(known, width), torch.zeros(width), torch.zeros(known), arguments[0])

    @classmethod
    def working_bytes(cls, arguments: Sequence[Any], width: int, settings: TrainingSettings) -> int:
        known = (2 * arguments[0] + 1) * width
        # The sums of each fold, of all, and of all but one while they are solved; a piece of vectors, centred.
        return (FOLDS + 4) * known * (known + width) * 8 + 2 * ROWS * known * 4

    @classmethod
    def data_copies(cls, arguments: Sequence[Any]) -> int:
        return 1  # the errors of the folds

    @classmethod
    def parse_arguments(cls, text: str) -> tuple[int]:
        if not text.startswith("-") or not 1 <= int(text[1:]) <= 4:
            raise ValueError
        return (int(text[1:]),)

    @classmethod
    def layers_looked_at(cls, arguments: Sequence[Any]) -> int:
        looks_back: int = arguments[0]
        return looks_back


def _sums(
    x: torch.Tensor, reference: torch.Tensor, mean: torch.Tensor, reference_mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sum r r^T` `[R, R]` and `sum r x^T` `[R, W]`, float64, of vectors `[N, W]` and references `[N, R]`, centred."""
    width = reference.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=x.device)
    cross = torch.zeros(width, x.shape[1], dtype=torch.float64, device=x.device)
    for rows, known in zip(x.split(ROWS), reference.split(ROWS), strict=True):
        centred = known.float() - reference_mean
        gram += centred.T @ centred
        cross += centred.T @ (rows.float() - mean)
    return gram, cross


def _solved(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """The ridge regression `[R, W]`, float32, of such sums."""
    if not len(gram):
        return cross.float()
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-30)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), device=gram.device), cross).float()

"""`share:-K`: vectors predicted from those of the layers before."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch.nn.functional import pad

from leankv.codecs.base import ROWS, Code, Codec, TrainingSettings, as_float16, mean_of

RIDGE = 1e-4  # assumption: of the mean squared number in the reference; keeps what is nearly alike from cancelling


def as_context(vectors: torch.Tensor) -> torch.Tensor:
    """Decoded vectors as those see them that predict from them, when fitting, encoding and decoding: in 16 bits.

    A cache keeps them for as long as later layers of a step need them. What rounding changes in a prediction, the codec
    behind it sees and corrects. float16, not bfloat16: a decoder works them out again among other rows, whose last bits
    may fall on the other side of a rounding, so one unit of it (2^-11; bfloat16 2^-8) must be small beside the steps of
    that codec. Beyond 65504 they stay at it, for encoder and decoder alike.
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
        missing = len(self.reference_mean) - reference.shape[1]
        known = (pad(reference.float(), (0, missing)) - self.reference_mean).to(self.weight.dtype)
        return (known @ self.weight).float() + self.mean

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
        (looks_back,) = arguments
        codecs = []
        for x, reference in zip(train, references[0], strict=True):
            mean, reference_mean = mean_of(x), mean_of(reference)
            width = len(reference_mean)
            gram = torch.zeros(width, width, dtype=torch.float64, device=x.device)
            cross = torch.zeros(width, len(mean), dtype=torch.float64, device=x.device)
            for rows, known in zip(x.split(ROWS), reference.split(ROWS), strict=True):
                centred = known.float() - reference_mean
                gram += centred.T @ centred
                cross += centred.T @ (rows.float() - mean)
            if width:
                ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-30)
                cross = torch.linalg.solve(gram + ridge * torch.eye(width, device=x.device), cross)
            missing = (2 * looks_back + 1) * len(mean) - width
            weight, reference_mean = pad(cross.float(), (0, 0, 0, missing)), pad(reference_mean, (0, missing))
            codecs.append(cls(weight, mean, reference_mean, looks_back))
        return codecs

    @classmethod
    def empty(cls, arguments: Sequence[Any], width: int) -> Self:
        known = (2 * arguments[0] + 1) * width
        return cls(torch.zeros(known, width), torch.zeros(width), torch.zeros(known), arguments[0])

    @classmethod
    def parse_arguments(cls, text: str) -> tuple[int]:
        if not text.startswith("-") or not 1 <= int(text[1:]) <= 4:
            raise ValueError
        return (int(text[1:]),)

    @classmethod
    def layers_looked_at(cls, arguments: Sequence[Any]) -> int:
        looks_back: int = arguments[0]
        return looks_back

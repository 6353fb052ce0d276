"""`resid(A,B)`: codec A, and codec B for what A leaves."""

import struct
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from leankv.codecs.base import Code, Codec, TrainingSettings, errors_of, mean_of, sum_of_squares


class Residual(Codec):
    """Two codecs of any family, one behind the other: `x_hat = A(x) + B(x - A(x))`.

    After GEAR (Kang et al., 2024), which adds a low rank and a few outliers to coarse integers. There the low rank is
    found anew for each sequence, and both work on what the integers left; here both codecs are fitted on calibration
    text, and their order is as written: `resid(pca:16,int:2)` quantizes what 16 components leave. With outliers kept
    apart: `resid(pca:16,nuq:2+1)`; centred: `resid(mean,int:4)`.

    Storage: both codes. What it does not do: fit A again once B is known, or B to A's parameters as they are rounded
    afterwards (encoding does see them: B then codes what the rounded A leaves).
    """

    family = "resid"
    revision = 2  # B fitted to cross-fitted errors of A
    grammar = "resid(A,B) (A, B any two codecs)"
    nested = True

    def __init__(self, first: Codec, second: Codec):
        super().__init__(first.width)
        self.first = first
        self.second = second
        self.looks_back = max(first.looks_back, second.looks_back)

    @property
    def spec(self) -> str:
        return f"resid({self.first.spec},{self.second.spec})"

    @property
    def bits_per_token(self) -> float:
        return self.first.bits_per_token + self.second.bits_per_token

    @property
    def stored_bits_per_token(self) -> float:
        return self.first.stored_bits_per_token + self.second.stored_bits_per_token

    def encode(self, x: torch.Tensor) -> Code:
        first = self.first.encode(x)
        return _together(first, self.second.encode(x.float() - self.first.decode(first).float()))

    def decode(self, code: Code) -> torch.Tensor:
        first, second = _apart(code)
        return self.first.decode(first).float() + self.second.decode(second).float()

    def encode_beside(self, x: torch.Tensor, reference: torch.Tensor) -> Code:
        first = self.first.encode_beside(x, reference)
        left = x.float() - self.first.decode_beside(first, reference).float()
        return _together(first, self.second.encode_beside(left, reference))

    def decode_beside(self, code: Code, reference: torch.Tensor) -> torch.Tensor:
        first, second = _apart(code)
        predicted = self.first.decode_beside(first, reference).float()
        return predicted + self.second.decode_beside(second, reference).float()

    def park(self, code: Code) -> bytes:
        first, second = (codec.park(own) for codec, own in zip((self.first, self.second), _apart(code), strict=True))
        return struct.pack("<I", len(first)) + first + second

    def unpark(self, data: bytes, tokens: int) -> Code:
        (length,) = struct.unpack_from("<I", data)
        first, second = data[4 : 4 + length], data[4 + length :]
        return _together(self.first.unpark(first, tokens), self.second.unpark(second, tokens))

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
        nothing = train[..., :0], heldout[..., :0]
        return cls.fit_beside(arguments, train, heldout, nothing, metric, settings, on_epoch)

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
        """Fit A, then B to what A leaves. Where both are trained there are twice as many epochs, A's first."""
        first, second = arguments
        firsts, left = first.family.fit_and_leave(
            first.arguments, train, heldout, references, metric, settings, on_epoch
        )
        heldout_left = errors_of(firsts, heldout, references[1])
        # B's error is known as a fraction of what A left; this makes it one of the vectors themselves.
        share = sum_of_squares(heldout_left, mean_of(heldout_left)[:, None]) / sum_of_squares(
            heldout, mean_of(heldout)[:, None]
        )
        seconds = second.family.fit_beside(
            second.arguments,
            left,
            heldout_left,
            references,
            metric,
            settings,
            lambda epoch, error: on_epoch(epoch, error * share.to(error.device)),
        )
        return [cls(own, other) for own, other in zip(firsts, seconds, strict=True)]

    @classmethod
    def layers_looked_at(cls, arguments: Sequence[Any]) -> int:
        return max(spec.family.layers_looked_at(spec.arguments) for spec in arguments)

    @classmethod
    def empty(cls, arguments: Sequence[Any], width: int) -> Self:
        first, second = (spec.family.empty(spec.arguments, width) for spec in arguments)
        return cls(first, second)

    @classmethod
    def working_bytes(cls, arguments: Sequence[Any], width: int, settings: TrainingSettings) -> int:
        return max(spec.family.working_bytes(spec.arguments, width, settings) for spec in arguments)

    @classmethod
    def data_copies(cls, arguments: Sequence[Any]) -> int:
        first, second = (spec.family.data_copies(spec.arguments) for spec in arguments)
        return max(first, 1 + second)

    @classmethod
    def parse_arguments(cls, text: str) -> tuple[Any, ...]:
        depth, commas = 0, []
        for place, letter in enumerate(text):
            depth += (letter == "(") - (letter == ")")
            if letter == "," and depth == 0:
                commas.append(place)
        if depth or len(commas) != 1:
            raise ValueError
        specs = text[: commas[0]].strip(), text[commas[0] + 1 :].strip()
        if not all(specs):
            raise ValueError
        return specs

    @classmethod
    def check_width(cls, arguments: Sequence[Any], width: int) -> None:
        for spec in arguments:
            spec.family.check_width(spec.arguments, width)


def _together(first: Code, second: Code) -> Code:
    return {f"a.{name}": t for name, t in first.items()} | {f"b.{name}": t for name, t in second.items()}


def _apart(code: Code) -> tuple[Code, Code]:
    first, second = (
        {name.removeprefix(own): tensor for name, tensor in code.items() if name.startswith(own)}
        for own in ("a.", "b.")
    )
    return first, second

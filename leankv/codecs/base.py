"""What every codec is: an `nn.Module` that turns vectors into codes and back, and knows what its codes weigh."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from leankv.codecs.ragged import Ragged

Code = dict[str, Any]
"""The code of N vectors: named tensors, each `[N, ...]`, packed as they are stored; or `Ragged`, if rows differ in
length."""


@dataclass(frozen=True)
class TrainingSettings:
    """What a trained family needs to know beside its data; see `leankv.experiment.FitConfig` for the meanings."""

    epochs: int
    batch_tokens: int
    learning_rate: float
    seed: int


class Codec(torch.nn.Module, ABC):
    """One fitted codec: for one layer's keys, or one layer's values.

    A codec knows vectors `[N, W]` and nothing of layers, heads, models or files. Its parameters and statistics are
    tensors of its `state_dict`, so it is saved and moved as any module is.
    """

    family: ClassVar[str]
    revision: ClassVar[int | None] = None
    """Raised when the numbers that fitting, encoding or decoding give change: part of the key of all that they made.
    Without one, the source of the family's file is in that key, so whoever tries out a codec need not think of it."""
    grammar: ClassVar[str]
    """How its spec is written, with the ranges of its numbers, for error messages."""
    nested: ClassVar[bool] = False
    """Whether its arguments are specs, written `family(A,B)`, rather than what stands behind a colon."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    @property
    @abstractmethod
    def spec(self) -> str:
        """The spec that makes this codec again."""

    @property
    @abstractmethod
    def bits_per_token(self) -> float:
        """Bits that the code of one vector takes, side information included; their mean where rows differ in length."""

    @property
    def stored_bits_per_token(self) -> float:
        """The same for codes that are parked; no less than live where there is no entropy coding."""
        return self.bits_per_token

    @abstractmethod
    def encode(self, x: torch.Tensor) -> Code:
        """Encode vectors `[N, W]` of any floating dtype."""

    @abstractmethod
    def decode(self, code: Code) -> torch.Tensor:
        """Decode to `[N, W]`; the caller casts to the dtype it wants."""

    lossless: bool = False
    """Whether decoding gives back the very bits, in the dtype they came in: then no other key space is entered for it,
    since going there and back rounds."""

    looks_back: int = 0
    """How many layers before its own a codec predicts from; most code each vector by itself."""

    def encode_beside(self, x: torch.Tensor, reference: torch.Tensor) -> Code:
        """Encode vectors `[N, W]`, given what is known of the same tokens, `[N, R]`; see `leankv.codecs.share`."""
        return self.encode(x)

    def decode_beside(self, code: Code, reference: torch.Tensor) -> torch.Tensor:
        """The way back, given the same reference."""
        return self.decode(code)

    def park(self, code: Code) -> bytes:
        """The code of some tokens as it is stored when it is not in use: losslessly, in as few bytes as may be."""
        return b"".join(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors_in(code))

    def unpark(self, data: bytes, tokens: int) -> Code:
        """The code of `tokens` tokens from what `park` made of it, on the CPU."""
        code: Code = {}
        offset = 0

        def take(count: int, dtype: torch.dtype) -> torch.Tensor:
            nonlocal offset
            piece = data[offset : offset + count * dtype.itemsize]
            offset += len(piece)
            return torch.frombuffer(bytearray(piece), dtype=dtype) if piece else torch.empty(0, dtype=dtype)

        for name, like in self.encode(torch.zeros(1, self.width)).items():
            if isinstance(like, Ragged):
                counts = take(tokens, torch.uint8)
                code[name] = Ragged(take(int(counts.long().sum()) * like.item, torch.uint8), counts, like.item)
            else:
                code[name] = take(tokens * like[0].numel(), like.dtype).reshape(tokens, *like.shape[1:])
        return code

    @classmethod
    @abstractmethod
    def fit(
        cls,
        arguments: Sequence[Any],
        train: torch.Tensor,
        heldout: torch.Tensor,
        metric: torch.Tensor | None,
        settings: TrainingSettings,
        on_epoch: Callable[[int, torch.Tensor], None],
    ) -> list[Self]:
        """Fit P codecs at once, each to its own data, each independent of which others are in the batch.

        Args:
            arguments: what stood behind the colon of the spec, as `parse_spec` read it.
            train: `[P, N, W]`, float32 or the dtype of the activations.
            heldout: `[P, M, W]`, never fitted to.
            metric: `[P, W, W]`, positive definite: an error `e` counts `e^T M e`. None: `|e|^2`.
            settings: for trained families.
            on_epoch: called after each epoch with its number and the held-out fraction of variance unexplained `[P]`.
        """

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
        """As `fit`, with references `[P, N, R]` and `[P, M, R]` of the two."""
        return cls.fit(arguments, train, heldout, metric, settings, on_epoch)

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
        """As `fit_beside`, and what another codec can be fitted to: errors `x - x_hat` of `train`, `[P, N, W]`.

        Where a codec has so many numbers that it knows its own training vectors better than others, these are the
        errors of codecs that did not see the vector (cross-fitting: Chernozhukov et al., 2018, arXiv 1608.00060).
        """
        codecs = cls.fit_beside(arguments, train, heldout, references, metric, settings, on_epoch)
        return codecs, errors_of(codecs, train, references[0])

    @classmethod
    def layers_looked_at(cls, arguments: Sequence[Any]) -> int:
        """`looks_back` of the codecs that these arguments make."""
        return 0

    @classmethod
    @abstractmethod
    def empty(cls, arguments: Sequence[Any], width: int) -> Self:
        """An unfitted codec with tensors of the right shapes, to load a state dict into."""

    @classmethod
    def parse_arguments(cls, text: str) -> tuple[Any, ...]:
        """Read what stands behind the colon of a spec, or give the texts of the specs between its parentheses.

        Raises:
            ValueError: it does not parse; here, there is anything.
        """
        if text:
            raise ValueError
        return ()

    @classmethod
    def check_width(cls, arguments: Sequence[Any], width: int) -> None:
        """`ValueError` when the arguments do not suit the width."""

    @classmethod
    def working_bytes(cls, arguments: Sequence[Any], width: int, settings: TrainingSettings) -> int:
        """Memory that one more codec in a batched fit takes beside its data; none where they are fitted in turn."""
        return 0

    @classmethod
    def data_copies(cls, arguments: Sequence[Any]) -> int:
        """Copies of all its vectors that fitting holds beside them."""
        return 0

    @property
    def n_parameters(self) -> int:
        """Trained numbers; statistics (buffers) are not counted."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def nbytes(self) -> int:
        """Bytes of parameters and statistics together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())


def errors_of(codecs: Sequence[Codec], x: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """`x - x_hat` of each codec's own vectors, `[P, N, W]` as `x` is, worked out in pieces."""
    errors = torch.empty_like(x)
    for codec, own, known, out in zip(codecs, x, references, errors, strict=True):
        for rows, reference, place in zip(own.split(ROWS), known.split(ROWS), out.split(ROWS), strict=True):
            code = codec.encode_beside(rows, reference)
            place.copy_(rows.float() - codec.decode_beside(code, reference).float())
    return errors


def tensors_in(code: Code) -> list[torch.Tensor]:
    """All tensors that a code consists of."""
    return [t for part in code.values() for t in (part.tensors() if isinstance(part, Ragged) else [part])]


def as_float16(x: torch.Tensor) -> torch.Tensor:
    """`x` as float16, what is out of its range at the ends of it: a code is never infinite."""
    return within_float16(x).to(torch.float16)


def within_float16(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, held within what float16 can represent (its largest number is 65504)."""
    return x.float().clamp(-65504.0, 65504.0)


ROWS = 2048  # vectors held in float32 at a time where statistics are summed, to bound memory


def mean_of(x: torch.Tensor) -> torch.Tensor:
    """Mean of vectors `[..., N, W]` over N, float32, summed in float64."""
    pieces = ((rows.sum(dim=0, dtype=torch.float64) for rows in own.split(ROWS)) for own in _one_by_one(x))
    totals = torch.stack([torch.stack(list(own)).sum(dim=0) for own in pieces])
    return (totals / x.shape[-2]).float().reshape(*x.shape[:-2], x.shape[-1])


def sampled(x: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` rows of vectors `[N, W]`, or all where there are no more; drawn from anywhere in them."""
    if len(x) <= count:
        return x
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count].to(x.device)]


def sum_of_squares(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`sum |x - reference|^2` over the last two dimensions of `[..., N, W]`, float64."""
    totals = []
    for own, its_reference in zip(_one_by_one(x), _one_by_one(reference.expand(x.shape)), strict=True):
        pieces = zip(own.split(ROWS), its_reference.split(ROWS), strict=True)
        squares = [(rows.float() - other.float()).square().sum(dtype=torch.float64) for rows, other in pieces]
        totals.append(torch.stack(squares).sum())
    return torch.stack(totals).reshape(x.shape[:-2])


def _one_by_one(x: torch.Tensor) -> list[torch.Tensor]:
    """Views `[N, W]` of `[..., N, W]`: sums over one at a time take no memory for all, and none depends on others."""
    return [x[index] for index in itertools.product(*map(range, x.shape[:-2]))]


def fraction_of_variance_unexplained(x: torch.Tensor, reconstructed: torch.Tensor) -> torch.Tensor:
    """FVU of each problem: `sum |x - x_hat|^2 / sum |x - mean(x)|^2`, one number for each leading index.

    0 is lossless; 1 is what storing nothing but the mean gives.

    Args:
        x: `[..., N, W]`.
        reconstructed: the same shape.

    Returns:
        `[...]`, float64. NaN where `x` does not vary at all.
    """
    return sum_of_squares(x, reconstructed) / sum_of_squares(x, mean_of(x).unsqueeze(-2))

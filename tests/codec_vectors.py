"""What tests of codecs share: made-up vectors, fitting to them, looking at codes."""

from typing import Any

import torch

from leankv.codecs import (
    Codec,
    TrainingSettings,
    fraction_of_variance_unexplained,
    parse_spec,
)
from leankv.codecs.base import tensors_in
from leankv.codecs.ragged import Ragged

WIDTH = 24
SETTINGS = TrainingSettings(epochs=3, batch_tokens=64, learning_rate=1e-2, seed=0)
PARAMETER_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def vectors(problems: int = 3, tokens: int = 256, width: int = WIDTH, rank: int = 3, seed: int = 0) -> torch.Tensor:
    """Vectors `[problems, tokens, width]` near a subspace of few dimensions, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(problems, tokens, rank, generator=generator)
    mixing = torch.randn(problems, rank, width, generator=generator)
    noise = 0.1 * torch.randn(problems, tokens, width, generator=generator)
    return latent @ mixing + noise + torch.randn(problems, 1, width, generator=generator)


def fit(spec: str, train: torch.Tensor, heldout: torch.Tensor | None = None) -> list[Codec]:
    """Codecs fitted to `train` `[P, N, W]`."""
    parsed = parse_spec(spec)
    heldout = train[:, :32] if heldout is None else heldout
    return list(parsed.family.fit(parsed.arguments, train, heldout, None, SETTINGS, lambda epoch, error: None))


def through(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    """What is left of `x` `[N, W]` after encoding and decoding."""
    return codec.decode(codec.encode(x))


def stored_bits(codec: Codec, x: torch.Tensor) -> int:
    """Bits of the code of `x` `[N, W]`, as it is held."""
    return 8 * sum(tensor.nbytes for tensor in tensors_in(codec.encode(x)))


def rows_of(part: torch.Tensor | Ragged) -> list[Any]:
    """What a part of a code holds, row by row, to be compared."""
    if isinstance(part, Ragged):
        rows: list[list[Any]] = [[] for _ in part.counts]
        for row, item in zip(part.row_numbers().tolist(), part.items().tolist(), strict=True):
            rows[row].append(item)
        return rows
    return part.tolist()


def followed(first: torch.Tensor | Ragged, second: torch.Tensor | Ragged) -> torch.Tensor | Ragged:
    """Rows of a code behind each other, as a cache of one sequence puts them."""
    if isinstance(first, Ragged) and isinstance(second, Ragged):
        return first.unflatten((1, -1)).followed_by(second.unflatten((1, -1))).flatten()
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    return torch.cat([first, second])


def fvu(codec: Codec, x: torch.Tensor) -> float:
    return fraction_of_variance_unexplained(x, through(codec, x)).item()


def cast_parameters(codec: Codec, dtype: torch.dtype) -> Codec:
    """As fitting leaves codecs: parameters in the dtype asked for, statistics in full precision."""
    for parameter in codec.parameters():
        parameter.data = parameter.data.to(dtype)
    return codec

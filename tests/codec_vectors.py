"""What tests of codecs share: made-up vectors, fitting to them, looking at codes."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from leankv.codecs import Codec, FitData, TrainingSettings, fraction_of_variance_unexplained, parse_recipe
from leankv.codecs.coding.column import Column
from leankv.codecs.coding.ragged import Ragged

WIDTH = 24
SETTINGS = TrainingSettings(epochs=3, batch_tokens=64, learning_rate=1e-2, seed=0)
PARAMETER_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def vectors(sites: int = 3, tokens: int = 256, width: int = WIDTH, rank: int = 3, seed: int = 0) -> torch.Tensor:
    """Vectors `[sites, tokens, width]` near a subspace of few dimensions, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(sites, tokens, rank, generator=generator)
    mixing = torch.randn(sites, rank, width, generator=generator)
    noise = 0.1 * torch.randn(sites, tokens, width, generator=generator)
    return latent @ mixing + noise + torch.randn(sites, 1, width, generator=generator)


def fit(
    text: str,
    train: torch.Tensor,
    heldout: torch.Tensor | None = None,
    error_metric: torch.Tensor | None = None,
    training: TrainingSettings = SETTINGS,
    on_epoch: Callable[[int, torch.Tensor], None] = lambda epoch, error: None,
) -> list[Codec]:
    """Codecs of a recipe, fitted to `train` `[P, N, W]`."""
    heldout = train[:, :32] if heldout is None else heldout
    data = FitData(train, heldout, error_metric=error_metric, training=training, on_epoch=on_epoch)
    return parse_recipe(text).fit(data)


def fitted(text: str) -> list[Codec]:
    """Codecs of a recipe, fitted to `vectors()`: once, and given as copies."""
    return copy.deepcopy(_fitted(text))


@functools.cache
def _fitted(text: str) -> list[Codec]:
    return fit(text, vectors())


def through(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    """What is left of `x` `[N, W]` after encoding and decoding."""
    return codec.decode(codec.encode(x))


def stored_bits(codec: Codec, x: torch.Tensor) -> int:
    """Bits of the code of `x` `[N, W]`, as it is held."""
    return 8 * codec.encode(x).nbytes


def rows_of(column: Column) -> list[Any]:
    """What a column of a code holds, row by row, to be compared."""
    if isinstance(column, Ragged):
        rows: list[list[Any]] = [[] for _ in column.counts]
        for row, item in zip(column.row_numbers().tolist(), column.items().tolist(), strict=True):
            rows[row].append(item)
        return rows
    (data,) = column.tensors()
    return list(data.tolist())


def fvu(codec: Codec, x: torch.Tensor) -> float:
    return fraction_of_variance_unexplained(x, through(codec, x)).item()


def cast_parameters(codec: Codec, dtype: torch.dtype) -> Codec:
    """As fitting leaves codecs: parameters in the dtype asked for, statistics in full precision."""
    for parameter in codec.parameters():
        parameter.data = parameter.data.to(dtype)
    return codec

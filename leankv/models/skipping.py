"""Running a model from one of its layers on: placeholder layers take the place of those before it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Read = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states that enter a placeholder layer (their numbers say nothing) -> those that leave it, of one shape."""


@contextmanager
def skipping(layers: torch.nn.ModuleList, first: int, read: Read) -> Iterator[None]:
    """While this lasts, the decoder layers before `first` are not run; what enters layer `first` is what `read` gives.

    Masks, positions, the final norm and the head remain the model's own. With `first` 0 all layers are run, and `read`
    is not called.

    Args:
        layers: the model's decoder layers; put back in any case.
        first: the first layer to run.
        read: called once in each forward pass.
    """
    originals = list(layers)
    try:
        for layer in range(first):
            layers[layer] = PlaceholderLayer(originals[layer], read if layer == first - 1 else None)
        yield
    finally:
        for layer, original in enumerate(originals):
            layers[layer] = original


class PlaceholderLayer(torch.nn.Module):
    """Takes a decoder layer's place: gives its input, or what `read` says; looks like the layer to the model's loop."""

    def __init__(self, original: torch.nn.Module, read: Read | None = None):
        super().__init__()
        self.__dict__["original"] = original  # not registered: it is no part of this module
        self.__dict__["read"] = read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states if self.read is None else self.read(hidden_states)

"""Shapes in signatures, without jaxtyping: `Float[torch.Tensor, "B T"]` is `torch.Tensor`."""

from typing import Any


class _Shaped:
    def __class_getitem__(cls, item: Any) -> Any:
        return item[0]


def __getattr__(name: str) -> Any:
    """`Float`, `Int64` and so on: all the same."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _Shaped

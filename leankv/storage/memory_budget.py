"""A limit on what is kept in memory to save work, shared by all that keep something."""

import weakref

import torch


class MemoryBudget:
    """So many bytes for all tensors that are charged to it, for as long as they live.

    Args:
        total: bytes.
    """

    def __init__(self, total: int):
        self.total = total
        self._charged = 0

    @property
    def left(self) -> int:
        """Bytes that are not taken; 0 where there are none."""
        return max(0, self.total - self._charged)

    def charge(self, *tensors: torch.Tensor) -> None:
        """Count tensors until nobody holds them any more."""
        for tensor in tensors:
            self._charged += tensor.nbytes
            weakref.finalize(tensor, self._free, tensor.nbytes)

    def _free(self, nbytes: int) -> None:
        self._charged -= nbytes

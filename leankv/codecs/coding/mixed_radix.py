"""Mixed-radix packing: integers of small ranges, several to a byte; read back by arithmetic, with no tables."""

import torch
from jaxtyping import Float, UInt8

from leankv import compiled

BYTE = 256


class MixedRadix:
    """How J integers of ranges `low <= q < low + levels` are laid out in bytes, the same for all rows.

    A byte holds integers whose levels multiply to at most 256, chosen first-fit decreasing: three levels take 1.6 bits,
    not 2. An integer with a single level takes no room.

    Attributes:
        n_bytes: bytes a row.
    """

    def __init__(self, low: Float[torch.Tensor, " integers"], levels: Float[torch.Tensor, " integers"]):
        """
        Args:
            low: `[J]`, whole numbers.
            levels: `[J]`, the radix of each: 1 to 256.
        """
        counts = [round(number) for number in levels.tolist()]
        room: list[int] = []  # product of the levels in each byte
        places: dict[int, tuple[int, int]] = {}  # of each integer: its byte, and by what it is multiplied there
        for j in sorted((j for j, n in enumerate(counts) if n > 1), key=lambda j: (-counts[j], j)):
            byte = next((b for b, used in enumerate(room) if used * counts[j] <= BYTE), len(room))
            if byte == len(room):
                room.append(1)
            places[j] = byte, room[byte]
            room[byte] *= counts[j]
        self.n_bytes = len(room)
        self.low, self.levels = low, levels
        packed = sorted(places)
        self._packed = torch.tensor(packed, dtype=torch.int32, device=low.device)
        self._byte = torch.tensor([places[j][0] for j in packed], dtype=torch.int32, device=low.device)
        self._factor = torch.tensor([places[j][1] for j in packed], dtype=torch.float32, device=low.device)

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Byte, number and factor of each packed integer `[P]`, levels and low of all `[J]`: what loops take."""
        return self._byte, self._packed, self._factor, self.levels, self.low

    def pack(self, q: Float[torch.Tensor, "tokens integers"]) -> UInt8[torch.Tensor, "tokens n_bytes"]:
        """The bytes of such integers; what is out of its range goes to the nearer end of it."""
        if compiled.serves(q) and q.dtype == torch.float32:
            return compiled.radix_packed(q, *self.tables, self.n_bytes)
        above = (q - self.low).clamp_min(0).minimum(self.levels - 1)[:, self._packed]
        packed = q.new_zeros(len(q), self.n_bytes)
        return packed.index_add_(1, self._byte, above * self._factor).to(torch.uint8)

    def values(self, packed: UInt8[torch.Tensor, "tokens n_bytes"]) -> Float[torch.Tensor, "tokens integers"]:
        """The way back."""
        if compiled.serves(packed):
            return compiled.radix_values(packed, *self.tables)
        # Quotients by a reciprocal, rounded down: half a unit keeps them from where an inexact one would matter.
        left = packed.float().index_select(1, self._byte).add_(0.5).div_(self._factor).floor_()
        levels = self.levels[self._packed]
        left -= (left + 0.5).div_(levels).floor_().mul_(levels)
        q = self.low.repeat(len(packed), 1)
        q[:, self._packed] = left.add_(self.low[self._packed])
        return q

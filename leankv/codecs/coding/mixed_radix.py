"""Mixed-radix packing: integers of small ranges, several to a byte; read back through tables, a lookup a byte."""

import torch
from jaxtyping import Float, Int64, UInt8

BYTE = 256


class MixedRadix:
    """How J integers of ranges `low <= q < low + levels` are laid out in bytes, the same for all rows.

    A byte holds integers whose levels multiply to at most 256, chosen first-fit decreasing: three levels take 1.6 bits,
    not 2. An integer with a single level takes no room.

    Attributes:
        n_bytes: bytes a row.
        place: `[J]`, the column of each integer in what `values` gives.
    """

    def __init__(self, low: Float[torch.Tensor, " integers"], levels: Float[torch.Tensor, " integers"]):
        """
        Args:
            low: `[J]`, whole numbers.
            levels: `[J]`, the radix of each: 1 to 256.
        """
        device = low.device
        lows, counts = ([round(number) for number in t.tolist()] for t in (low, levels))
        members: list[list[int]] = []  # of each byte
        room: list[int] = []
        for j in sorted((j for j, n in enumerate(counts) if n > 1), key=lambda j: (-counts[j], j)):
            byte = next((b for b, used in enumerate(room) if used * counts[j] <= BYTE), len(room))
            if byte == len(room):
                room.append(1)
                members.append([])
            members[byte].append(j)
            room[byte] *= counts[j]
        members.sort(key=len)
        self.n_bytes = len(members)
        self.low, self.levels = low, levels
        self._factors = torch.zeros(len(counts), len(members), device=device)
        self._tables: list[tuple[int, int, torch.Tensor]] = []  # bytes from, to, and their tables one under another
        order = []
        for size in sorted({len(own) for own in members}):
            alike = [byte for byte, own in enumerate(members) if len(own) == size]
            table = torch.empty(len(alike), BYTE, size, dtype=torch.int16)
            for index, byte in enumerate(alike):
                left = torch.arange(BYTE)
                factor = 1
                for column, j in enumerate(members[byte]):
                    self._factors[j, byte] = factor
                    table[index, :, column] = left % counts[j] + lows[j]
                    left, factor = left // counts[j], factor * counts[j]
                    order.append(j)
            self._tables.append((alike[0], alike[-1] + 1, table.flatten(0, 1).to(device)))
        self._single = [j for j, n in enumerate(counts) if n <= 1]
        self._lone = low[self._single]
        self.place: Int64[torch.Tensor, " integers"] = torch.empty(len(counts), dtype=torch.long)
        self.place[torch.tensor(order + self._single, dtype=torch.long)] = torch.arange(len(counts))
        self.place = self.place.to(device)

    def pack(self, q: Float[torch.Tensor, "tokens integers"]) -> UInt8[torch.Tensor, "tokens n_bytes"]:
        """The bytes of such integers; what is out of its range goes to the nearer end of it."""
        above = (q - self.low).clamp_min(0).minimum(self.levels - 1)
        return (above @ self._factors).to(torch.uint8)

    def values(
        self, packed: UInt8[torch.Tensor, "tokens n_bytes"], dtype: torch.dtype
    ) -> Float[torch.Tensor, "tokens integers"]:
        """The way back: `[N, J]`, integer j in column `place[j]`; bfloat16 holds all of them exactly."""
        pieces = []
        for first, last, table in self._tables:
            index = packed[:, first:last].int() + torch.arange(0, (last - first) * BYTE, BYTE, device=packed.device)
            pieces.append(torch.nn.functional.embedding(index.int(), table).flatten(1))
        lone = self._lone.short().expand(len(packed), -1)
        return torch.cat([*pieces, lone], dim=1).to(dtype)

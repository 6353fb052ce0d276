"""Hidden states that entered the layers of a model, recorded block by block: what replays begin from."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float

from leankv.cache.plan import Plan
from leankv.storage.files import usable_bytes
from leankv.storage.mapped import mapped
from leankv.storage.memory_budget import MemoryBudget


@dataclass
class Chunk:
    """What a forward pass under way reads.

    Attributes:
        blocks: numbers of the blocks, one for each row of the batch.
        start: the first token of each block that this pass reads.
        end: the first that it no longer reads.
    """

    blocks: tuple[int, ...] = ()
    start: int = 0
    end: int = 0

    def begin(self, blocks: tuple[int, ...]) -> None:
        """Go to a batch of blocks, before their first token."""
        self.blocks, self.start, self.end = blocks, 0, 0

    def advance(self, tokens: int) -> None:
        """Go to the next `tokens` tokens of the same blocks."""
        self.start, self.end = self.end, self.end + tokens


@dataclass
class Recording:
    """Hidden states entering layers, under one plan.

    Attributes:
        plan: what was compressed when they were recorded.
        states: (layer, block) -> `[T, hidden]`.
    """

    plan: Plan
    states: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def read(self, layer: int, chunk: Chunk) -> Float[torch.Tensor, "B n hidden"]:
        """What entered a layer when the tokens of this chunk were recorded, on the CPU."""
        return torch.stack([self.states[layer, block][chunk.start : chunk.end] for block in chunk.blocks])

    def up_to(self, layer: int, plan: Plan) -> "Recording":
        """The beginning of a recording of another plan, which changes nothing before `layer`.

        What enters the layers up to that one is shared.
        """
        return Recording(plan, {key: states for key, states in self.states.items() if key[0] <= layer})


class HiddenStates:
    """Recordings: in memory up to a limit, in files beyond it.

    Args:
        block_length: T, tokens in each block.
        memory: what goes beyond this lies in memory-mapped files, which vanish with what they hold.
        folder: for those.

    Attributes:
        recordings: those that are finished; whoever makes one adds it, and drops what serves no more.
    """

    def __init__(self, block_length: int, memory: MemoryBudget, folder: Path):
        self.block_length = block_length
        self.memory = memory
        self.folder = folder
        self.recordings: list[Recording] = []

    def recorded_every(self, layer_bytes: int, layers: int) -> int:
        """Which layers' inputs can be kept: 1 where memory and disk hold those of all, k where those of every k-th.

        Args:
            layer_bytes: of what enters one layer, all blocks together.
            layers: how many there are.
        """
        return max(1, math.ceil(layers * layer_bytes / (self.memory.left + usable_bytes(self.folder))))

    def record(self, into: Recording, layer: int, chunk: Chunk, hidden: Float[torch.Tensor, "B n hidden"]) -> None:
        """Keep what enters a layer in one forward pass, a row for each block of the chunk.

        Raises:
            UserError: the disk has no space for it.
        """
        for block, rows in zip(chunk.blocks, hidden, strict=True):
            if (layer, block) not in into.states:
                shape = (self.block_length, hidden.shape[2])
                into.states[layer, block] = self._allocate(shape, hidden.dtype)
            into.states[layer, block][chunk.start : chunk.end] = rows

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor: in memory while that is within the budget, else in a mapped file."""
        if math.prod(shape) * dtype.itemsize <= self.memory.left:
            states = torch.empty(shape, dtype=dtype)
            self.memory.charge(states)
            return states
        return mapped(shape, dtype, self.folder)

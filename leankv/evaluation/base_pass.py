"""The base model's pass over blocks that many plans are compared on: run once, its hidden states kept.

What is kept is what the body gives, `[T, hidden]` a block; logits are made of it anew each time, by the model's own
head. So a comparison of ten caches runs the base model's layers once for each block, and gives the same bits.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Int

from leankv.evaluation.perplexity import Feeding, LogitsRun, run_through
from leankv.models.logits import body_output, has_body, logits_of
from leankv.storage.memory_budget import MemoryBudget


class BasePass:
    """Passes of the uncompressed model, repeated from what was kept of the first.

    Args:
        model: a causal LM.
        make_cache: the stock cache for a batch of blocks.
        memory: hidden states beyond this are not kept; their blocks are run again.
    """

    def __init__(self, model: Any, make_cache: Callable[[], Any], memory: MemoryBudget):
        self.model = model
        self.make_cache = make_cache
        self.memory = memory
        self._kept: dict[tuple[str, Feeding], list[Any]] = {}

    def run(self, tokens: Int[torch.Tensor, "B T"], feeding: Feeding) -> LogitsRun:
        """A pass over `tokens`, fed piece by piece."""
        digest = hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()
        key = f"{digest} {tuple(tokens.shape)}", feeding
        if not has_body(self.model):
            return run_through(self.model, self.make_cache())
        return self._repeated(self._kept[key]) if key in self._kept else self._first(key)

    def _repeated(self, outputs: list[Any]) -> LogitsRun:
        left = iter(outputs)
        return lambda inputs, count: logits_of(self.model, inputs, next(left), count)

    def _first(self, key: tuple[str, Feeding]) -> LogitsRun:
        cache, outputs, feeding = self.make_cache(), [], key[1]

        def logits(inputs: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
            output = body_output(self.model, inputs, cache)
            outputs.append(output)
            if len(outputs) == len(feeding):
                self._keep(key, outputs)
            return logits_of(self.model, inputs, output, count)

        return logits

    def _keep(self, key: tuple[str, Feeding], outputs: list[Any]) -> None:
        states = [each.last_hidden_state for each in outputs]
        if sum(each.nbytes for each in states) <= self.memory.left:
            self.memory.charge(*states)
            self._kept[key] = outputs

"""Prefixes that many plans are measured behind: computed exactly once, their keys and values kept.

Under the protocol `prefix` no codec takes part in the pass over the prefix, so it is the same for every plan. A cache
is filled with what that pass gave its layers, as the pass itself would fill it: the same bits.
"""

import hashlib
from typing import Any

import torch
from jaxtyping import Int

from leankv.cache.lean_cache import LeanCache
from leankv.models.logits import body_output
from leankv.models.observers import Keys, RecordingCache, Values
from leankv.storage.memory_budget import MemoryBudget

States = dict[int, tuple[Keys, Values]]
"""Layer -> keys and values as its cache is given them."""


class ExactPrefixes:
    """Keys and values of prefixes.

    Args:
        model: a causal LM.
        memory: keys and values beyond this are not kept, and computed again.
    """

    def __init__(self, model: Any, memory: MemoryBudget):
        self.model = model
        self.memory = memory
        self._kept: dict[str, States] = {}

    def fill(self, cache: LeanCache, tokens: Int[torch.Tensor, "B P"]) -> None:
        """Have a fresh cache take in a batch of prefixes."""
        for layer, (keys, values) in self._states(tokens).items():
            cache.update(keys, values, layer)

    def _states(self, tokens: Int[torch.Tensor, "B P"]) -> States:
        digest = hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()
        key = f"{digest} {tuple(tokens.shape)}"
        if key in self._kept:
            return self._kept[key]
        states: States = {}

        def record(layer: int, keys: Keys, values: Values) -> None:
            states[layer] = keys, values

        body_output(self.model, tokens, RecordingCache(self.model.config, record))
        if sum(tensor.nbytes for both in states.values() for tensor in both) <= self.memory.left:
            # Copies of their own: a part of a fused projection would keep all of it alive.
            kept = {layer: (keys.clone(), values.clone()) for layer, (keys, values) in states.items()}
            self.memory.charge(*(tensor for both in kept.values() for tensor in both))
            self._kept[key] = kept
        return states

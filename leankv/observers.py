"""Caches that watch a forward pass: they show keys and values, or what the loss asks of them, and compress nothing."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from leankv.cache import attention_windows


class _LeafLayer(DynamicLayer):
    """Holds nothing: adds a zero to keys and values that gradients can be asked of."""

    def __init__(self, sliding_window: int | None):
        super().__init__()
        self.is_sliding = sliding_window is not None
        self.leaves: dict[str, torch.Tensor] = {}
        self.states: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.states = {"k": key_states.detach(), "v": value_states.detach()}
        self.leaves = {part: torch.zeros_like(states).requires_grad_() for part, states in self.states.items()}
        return key_states + self.leaves["k"], value_states + self.leaves["v"]


class GradientCache(Cache):
    """For one forward and backward pass: the loss's gradient with respect to every key and value of that pass."""

    def __init__(self, config: Any):
        self.leaf_layers = [_LeafLayer(window) for window in attention_windows(config) or []]
        super().__init__(layers=list(self.leaf_layers))

    def states_and_gradients(self, layer: int, part: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys or values of a layer and their gradient, both `[B, heads, T, head_dim]`; None where none came back."""
        own = self.leaf_layers[layer]
        return own.states[part], own.leaves[part].grad


class _RecordingLayer(DynamicLayer):
    """Holds nothing: hands the keys and values of one forward pass on, and returns them."""

    def __init__(self, sliding_window: int | None, record: Callable[[torch.Tensor, torch.Tensor], None]):
        super().__init__()
        self.is_sliding = sliding_window is not None
        self.record = record

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.record(key_states, value_states)
        return key_states, value_states


class RecordingCache(Cache):
    """Shows every layer's keys and values of one forward pass to `record(layer, k, v)`, and keeps none of them.

    Args:
        config: the model's configuration.
        record: gets the layer number and two tensors `[B, heads, T, head_dim]`, as attention reads them.
    """

    def __init__(self, config: Any, record: Callable[[int, torch.Tensor, torch.Tensor], None]):
        windows = attention_windows(config) or []

        def for_layer(layer: int) -> Callable[[torch.Tensor, torch.Tensor], None]:
            return lambda k, v: record(layer, k, v)

        super().__init__(layers=[_RecordingLayer(window, for_layer(layer)) for layer, window in enumerate(windows)])

"""Watching a forward pass: keys and values, their gradients, and what enters the layers. Nothing is compressed here.

This module and the package `leankv.cache` are the only ones that build on transformers' cache classes;
`leankv.evaluation.baselines` makes one of them as anyone would.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

Keys = Float[torch.Tensor, "B heads T head_dim"]
Values = Float[torch.Tensor, "B v_heads T v_head_dim"]
"""Keys and values of one layer, as attention reads them. The two differ in width in models with latent attention."""

Record = Callable[[int, torch.Tensor, torch.Tensor], Any]
"""Layer number, keys and values, both `[B, heads, T, head_dim]` -> nothing that is looked at."""


def attention_windows(config: Any) -> list[int | None] | None:
    """Each layer's sliding window in tokens (None: it sees all), or None if some layer has no plain attention cache.

    Read off the cache that transformers makes for this configuration.
    """
    windows: list[int | None] = []
    try:
        layers = DynamicCache(config=config).layers
    except (KeyError, AttributeError, NotImplementedError):
        return None
    for layer in layers:
        # Exact types: subclasses add states of their own (Mamba, sparse attention indexers).
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        elif type(layer) is DynamicLayer:
            windows.append(None)
        else:
            return None
    return windows or None


@contextmanager
def layer_inputs(
    layers: torch.nn.ModuleList, watched: Collection[int], record: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """While this lasts, `record` is shown what enters some decoder layers.

    Args:
        layers: the model's decoder layers.
        watched: numbers of those to watch.
        record: gets the layer number and the hidden states `[B, T, hidden]`.
    """

    def hook_of(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            record(layer, args[0] if args else kwargs["hidden_states"])

        return hook

    hooks = [layers[layer].register_forward_pre_hook(hook_of(layer), with_kwargs=True) for layer in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _LeafLayer(DynamicLayer):
    """Holds nothing: adds a zero to keys and values that gradients can be asked of."""

    def __init__(self, sliding_window: int | None):
        super().__init__()
        self.is_sliding = sliding_window is not None
        self.leaves: dict[str, torch.Tensor] = {}
        self.states: dict[str, torch.Tensor] = {}

    def update(self, key_states: Keys, value_states: Values, *args: Any, **kwargs: Any) -> tuple[Keys, Values]:
        self.states = {"k": key_states.detach(), "v": value_states.detach()}
        self.leaves = {part: torch.zeros_like(states).requires_grad_() for part, states in self.states.items()}
        return key_states + self.leaves["k"], value_states + self.leaves["v"]


class GradientCache(Cache):
    """For one forward and backward pass: the loss's gradient with respect to every key and value of that pass."""

    def __init__(self, config: Any):
        self.leaf_layers = [_LeafLayer(window) for window in attention_windows(config) or []]
        super().__init__(layers=list(self.leaf_layers))

    def states_and_gradients(self, layer: int, part: str) -> tuple[Keys, Keys | None]:
        """Keys or values of a layer and their gradient; None where none came back through the weights."""
        own = self.leaf_layers[layer]
        return own.states[part], own.leaves[part].grad


class _RecordingLayer(DynamicLayer):
    """Holds nothing: hands the keys and values of one forward pass on, and returns them."""

    def __init__(self, sliding_window: int | None, record: Callable[[torch.Tensor, torch.Tensor], Any]):
        super().__init__()
        self.is_sliding = sliding_window is not None
        self.record = record

    def update(self, key_states: Keys, value_states: Values, *args: Any, **kwargs: Any) -> tuple[Keys, Values]:
        self.record(key_states, value_states)
        return key_states, value_states


class RecordingCache(Cache):
    """Shows every layer's keys and values of one forward pass to `record(layer, k, v)`, and keeps none of them.

    Args:
        config: the model's configuration.
        record: gets the layer number and two tensors `[B, heads, T, head_dim]`, as attention reads them.
    """

    def __init__(self, config: Any, record: Record):
        windows = attention_windows(config) or []

        def for_layer(layer: int) -> Callable[[torch.Tensor, torch.Tensor], Any]:
            return lambda k, v: record(layer, k, v)

        super().__init__(layers=[_RecordingLayer(window, for_layer(layer)) for layer, window in enumerate(windows)])

"""Watching a forward pass: keys and values, their gradients, and what enters the layers. Nothing is compressed here.

This module and the package `leankv.cache` are the only ones that build on transformers' cache classes;
`leankv.evaluation.baselines` makes one of them as anyone would.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from leankv.config.plan_table import PARTS

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


class PassingLayer(DynamicLayer):
    """Holds nothing: attention reads what a function makes of the keys and values of one forward pass.

    Args:
        sliding_window: the model's own, of this layer.
        passed: keys and values, both `[B, heads, T, head_dim]` -> those that attention reads.
    """

    def __init__(
        self,
        sliding_window: int | None,
        passed: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ):
        super().__init__()
        self.is_sliding = sliding_window is not None
        self.passed = passed

    def update(self, key_states: Keys, value_states: Values, *args: Any, **kwargs: Any) -> tuple[Keys, Values]:
        return self.passed(key_states, value_states)


class GradientCache(Cache):
    """For one forward and backward pass: the loss's gradient with respect to every key and value of that pass.

    A zero is added to all of them that gradients can be asked of.
    """

    def __init__(self, config: Any):
        windows = attention_windows(config) or []
        states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        zeros: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # Not a method: the layers would hold the cache that holds them, and all its gradients would outlive their use.
        self._states, self._zeros = states, zeros

        def with_zeros(layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            states[layer] = keys.detach(), values.detach()
            zeros[layer] = torch.zeros_like(keys).requires_grad_(), torch.zeros_like(values).requires_grad_()
            return keys + zeros[layer][0], values + zeros[layer][1]

        super().__init__(
            layers=[PassingLayer(window, partial(with_zeros, layer)) for layer, window in enumerate(windows)]
        )

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The zeros that were added, after a forward pass: what gradients are to be asked of."""
        return [zeros for both in self._zeros.values() for zeros in both]

    def states_and_gradients(self, layer: int, part: str) -> tuple[Keys, Keys | None]:
        """Keys or values of a layer and their gradient; None where none came back through the weights."""
        place = PARTS.index(part)
        return self._states[layer][place], self._zeros[layer][place].grad


class RecordingCache(Cache):
    """Shows every layer's keys and values of one forward pass to `record(layer, k, v)`, and keeps none of them.

    Args:
        config: the model's configuration.
        record: gets the layer number and two tensors `[B, heads, T, head_dim]`, as attention reads them.
    """

    def __init__(self, config: Any, record: Record):
        windows = attention_windows(config) or []

        def shown(layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            record(layer, k, v)
            return k, v

        super().__init__(layers=[PassingLayer(window, partial(shown, layer)) for layer, window in enumerate(windows)])

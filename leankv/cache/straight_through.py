"""A compressed cache that gradients pass, as if the codecs were not there, and that says what its errors cost.

What attention reads is `x + (x_hat - x)`, the bracket taken as a constant (straight-through, Bengio et al., 2013, arXiv
1308.3432). So one backward pass gives the gradient of a loss with respect to the very vectors that were read, at the
point where all the plan's codecs are at work: how errors compound is in it.
"""

from typing import Any

import torch
from jaxtyping import Float
from transformers.cache_utils import Cache, DynamicLayer

from leankv.cache.layers import LeanLayer
from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import Site
from leankv.config.plan_table import PARTS

Rows = Float[torch.Tensor, "batch heads tokens head_dim"]


class _StraightThroughLayer(DynamicLayer):
    """One compressed layer beside the exact vectors that gradients go to."""

    def __init__(self, lean: LeanLayer):
        super().__init__()
        self.lean = lean
        self.is_sliding = lean.is_sliding
        self.exact: dict[str, torch.Tensor] = {}
        self.inner: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def __getattr__(self, name: str) -> Any:
        # Lengths and masks are those of the layer inside.
        return getattr(self.__dict__["lean"], name)

    def update(
        self, key_states: Rows, value_states: Rows, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.lean.update(key_states.detach(), value_states.detach())
        return self._through("k", key_states, keys), self._through("v", value_states, values)

    def _through(self, part: str, new: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        held = self.exact.get(part)
        exact = (new if held is None else torch.cat([held, new], dim=2))[:, :, -read.shape[2] :]
        self.exact[part] = exact
        error = read - exact.detach()
        through = exact + error
        if through.requires_grad:
            through.register_hook(lambda gradient: self._add(part, gradient, error))
        return through

    def _add(self, part: str, gradient: torch.Tensor, error: torch.Tensor) -> None:
        self.inner[part] += float((gradient.double() * error.double()).sum())

    def get_seq_length(self) -> int:
        return self.lean.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        sizes: tuple[int, int] = self.lean.get_mask_sizes(query_length)
        return sizes


class StraightThroughCache(Cache):
    """For forward passes over one batch of blocks and one backward pass.

    Args:
        lean: an empty compressed cache; it does the encoding and decoding.
    """

    def __init__(self, lean: LeanCache):
        self._through = {
            number: _StraightThroughLayer(layer)
            for number, layer in enumerate(lean.layers)
            if isinstance(layer, LeanLayer)
        }
        self._sites = set(lean.plan)
        super().__init__(layers=[self._through.get(number, layer) for number, layer in enumerate(lean.layers)])

    def gradient_along_errors(self) -> dict[Site, float]:
        """Site -> `sum <g, x_hat - x>` over all that was read, `g` the loss's gradient; after the backward pass."""
        return {
            Site(number, part): layer.inner[part]
            for number, layer in self._through.items()
            for part in PARTS
            if Site(number, part) in self._sites
        }

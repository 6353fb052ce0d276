"""A cache for one pass over whole blocks in which attention reads what codecs make, and gradients reach their numbers.

As under the protocol `strict`: every vector behind the sinks goes through its codec.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from transformers.cache_utils import Cache

from leankv.cache.plan import Site
from leankv.codecs.share import as_context
from leankv.codecs.trainable import Trainable
from leankv.models.observers import PassingLayer, attention_windows
from leankv.models.rope import KeyRotation

Rows = Float[torch.Tensor, "batch heads tokens head_dim"]


class TrainableCache(Cache):
    """For one forward pass over one batch of blocks, all of their tokens at once.

    Args:
        config: the model's configuration.
        codecs: of the plan's sites.
        context: of each site the ones that its codec predicts from, in the order in which it takes them.
        sinks: first tokens of each block that stay exact.
        rotation: given, keys are coded pre-RoPE.

    Attributes:
        bits: what all that was coded takes, stored; after the pass.
    """

    def __init__(
        self,
        config: Any,
        codecs: Mapping[Site, Trainable],
        context: Mapping[Site, Sequence[Site]],
        sinks: int,
        rotation: KeyRotation | None,
    ):
        windows = attention_windows(config) or []
        super().__init__(layers=[PassingLayer(own, partial(self._read, n)) for n, own in enumerate(windows)])
        self._codecs, self._context, self._sinks, self._rotation = codecs, context, sinks, rotation
        self._sources = {source for sources in context.values() for source in sources}
        self._shown: dict[Site, torch.Tensor] = {}
        self.bits = torch.zeros(())

    def _read(self, layer: int, keys: Rows, values: Rows) -> tuple[Rows, Rows]:
        return self._coded(layer, "k", keys), self._coded(layer, "v", values)

    def _coded(self, layer: int, part: str, rows: Rows) -> Rows:
        """Keys or values of a layer as attention reads them."""
        site, sinks = Site(layer, part), rows[:, :, : self._sinks]
        codec = self._codecs.get(site)
        if codec is None and site not in self._sources:
            return rows
        own = rows[:, :, self._sinks :]
        positions = torch.arange(self._sinks, rows.shape[2])[None]
        turned = self._rotation if part == "k" else None
        vectors = (own if turned is None else turned.remove(layer, own, positions)).float().transpose(1, 2).flatten(2)
        x = vectors.flatten(0, 1)
        if codec is None:
            self._shown[site] = as_context(x)
            return rows
        known = [self._shown[source] for source in self._context[site]]
        x_hat, bits = codec(x, torch.cat(known, dim=1) if known else x[:, :0])
        self.bits = self.bits.to(bits.device) + bits
        if site in self._sources:
            self._shown[site] = as_context(x_hat)
        read = x_hat.view_as(vectors).unflatten(2, (own.shape[1], own.shape[3])).transpose(1, 2)
        read = read if turned is None else turned.restore(layer, read, positions)
        return torch.cat([sinks, read.to(rows.dtype)], dim=2)

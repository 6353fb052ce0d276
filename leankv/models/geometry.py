"""The geometry of a model's cache: layers, heads and widths, as a forward pass shows them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from leankv.config.plan_table import PARTS
from leankv.errors import UserError
from leankv.models.observers import RecordingCache, attention_windows
from leankv.models.structure import has_latent_attention

BYTES_16_BIT = 2

Width = int | tuple[int, int]
"""W of a layer: one number where its keys and values agree, else that of keys and that of values."""


def part_of_width(width: int | Sequence[int], part: str) -> int:
    """W of a part, from a layer's `Width`, which JSON holds as a number or a list of two."""
    return width if isinstance(width, int) else width[PARTS.index(part)]


@dataclass(frozen=True)
class LayerGeometry:
    """One layer's cache.

    Attributes:
        kv_heads: heads of K and V.
        head_dim: numbers a head of K; of V too, unless `v_head_dim` says otherwise.
        sliding_window: tokens that a token of a sliding-window layer sees, itself included; None where it sees all.
        v_head_dim: numbers a head of V where they are not as many as of K.
    """

    kv_heads: int
    head_dim: int
    sliding_window: int | None
    v_head_dim: int | None = None

    def width_of(self, part: str) -> int:
        """W of a part: the length of one token's K (`k`) or V (`v`) vector."""
        head_dim = self.head_dim if part == "k" or self.v_head_dim is None else self.v_head_dim
        return self.kv_heads * head_dim

    @property
    def width(self) -> Width:
        """W of both parts where they agree, else of K and of V."""
        k, v = self.width_of("k"), self.width_of("v")
        return k if k == v else (k, v)

    def tokens_held(self, tokens: int) -> int:
        """How many of `tokens` tokens the stock cache still holds in this layer."""
        return tokens if self.sliding_window is None else min(tokens, self.sliding_window - 1)


@dataclass(frozen=True)
class Geometry:
    """The cache of a whole model, layer by layer."""

    layers: tuple[LayerGeometry, ...]

    @property
    def width(self) -> int | list[Width]:
        """W if all layers and both parts agree, else one a layer, in which those of K and of V may be two."""
        widths = [layer.width for layer in self.layers]
        first = widths[0]
        return first if isinstance(first, int) and len(set(widths)) == 1 else widths

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all layers, in a 16-bit cache."""
        return sum(layer.width_of(part) * BYTES_16_BIT for layer in self.layers for part in PARTS)


@torch.no_grad()
def find_geometry(model: Any) -> Geometry:
    """Read the geometry off a forward pass of two tokens.

    Raises:
        UserError: the model has no attention cache, caches latents, has other numbers of heads for K than for V, or
            shares or mixes its cache layers with others.
    """
    kind = model.config.model_type
    refused = f"{model.config.name_or_path or 'this model'} ({kind})"
    windows = attention_windows(model.config)
    if windows is None:
        raise UserError(f"{refused} has layers without an attention cache of their own, which LeanKV cannot compress")
    shapes: dict[int, tuple[torch.Size, torch.Size]] = {}
    cache = RecordingCache(model.config, lambda layer, k, v: shapes.__setitem__(layer, (k.shape, v.shape)))
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), past_key_values=cache)
    except (TypeError, AttributeError) as error:
        raise UserError(f"{refused} does not take a transformers cache, so LeanKV cannot compress it") from error
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{refused} fails on two tokens ({reason}); try it without --load-in-4bit or on cpu") from error
    if sorted(shapes) != list(range(len(windows))):
        raise UserError(f"{refused} has layers without an attention cache of their own, which LeanKV cannot compress")
    layers = []
    for layer, window in enumerate(windows):
        k, v = shapes[layer]
        differ = f"{refused} caches keys of {k[1]} x {k[3]} and values of {v[1]} x {v[3]} numbers"
        if k != v and has_latent_attention(model.config):
            raise UserError(
                f"{differ}, as models with latent attention do; its cache is compressed already, and LeanKV does not "
                "compress it again"
            )
        if k[1] != v[1]:
            raise UserError(f"{differ}, and LeanKV compresses caches with as many heads of keys as of values")
        layers.append(LayerGeometry(k[1], k[3], window, None if k == v else v[3]))
    return Geometry(tuple(layers))

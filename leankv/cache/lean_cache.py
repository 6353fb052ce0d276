"""The compressed transformers cache, made of a plan for one batch of sequences."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from leankv.cache.code_attention import reads_codes
from leankv.cache.contents import hash_of_tokens, held_by, tensors_of
from leankv.cache.decoded_once import DecodedOnceStore
from leankv.cache.key_space import KeySpace
from leankv.cache.layers import LeanLayer, LeanSlidingLayer, SkippedLayer
from leankv.cache.memory import held_bytes
from leankv.cache.part_store import PartStore
from leankv.cache.plan import Plan, Site, codecs_by_layer
from leankv.cache.tensor_file import write_tensors
from leankv.errors import UserError
from leankv.models.rope import KeyRotation
from leankv.models.structure import earlier_layers

SAVED_FORMAT = 1
"""Of the files that `LeanCache.save` writes; `leankv.cache.saved_cache` says what stands in them."""


ENCODE_EVERY = 16
"""While text is generated. Assumption: a step that encodes is then one of many, and so many exact tokens are few."""


@dataclass(frozen=True)
class Origin:
    """What a saved cache has to be read with.

    Attributes:
        fingerprint: of the model.
        checksum: gives that of the codecs and their key space; all their numbers are hashed for it.
    """

    fingerprint: str
    checksum: Callable[[], str]


class LeanCache(Cache):
    """A transformers cache in which the layers of a plan hold codes.

    Use one for each sequence batch, as any `past_key_values`: `model.generate(**inputs, past_key_values=cache)`.

    With left-padded batches pass `attention_mask`: the sinks of a row begin where its padding ends, so the longest
    padding is kept exact with them.

    For inference: a forward pass outside `no_grad` gives the same numbers, but no gradients pass compressed layers.
    Rollback (prompt lookup, assisted decoding) may change what is generated; `LeanLayer` says when it cannot.

    Args:
        config: the model's configuration.
        plan: site -> fitted codec.
        sinks: first tokens of each sequence held exact in compressed layers.
        window: latest tokens held exact in compressed layers; `leankv.cache.part_store.UNBOUNDED` for all, until
            `encode_all`.
        encode_every: tokens that left the window are encoded once there are so many, and are exact until then; so a
            step that generates a token seldom encodes. 1 where there is no window. Costs are measured with 1.
        attention_mask: `[B, T]` of the prompt, 0 at padding; only its left padding matters.
        padding: left padding of each row, in place of the mask.
        first_layer: layers before it are not run and hold nothing (see `leankv.evaluation.replay`).
        rotation: given, keys are encoded pre-RoPE.
        origin: for saving; `leankv.Bundle.new_cache` knows it.
        decode_once: keep what was decoded beside its code: faster where a text is fed in many chunks, but no memory is
            saved. For measuring.
    """

    def __init__(
        self,
        config: Any,
        plan: Plan,
        *,
        sinks: int,
        window: int,
        encode_every: int = 1,
        attention_mask: torch.Tensor | None = None,
        padding: Int[torch.Tensor, " batch"] | None = None,
        first_layer: int = 0,
        rotation: KeyRotation | None = None,
        origin: Origin | None = None,
        decode_once: bool = False,
    ):
        if attention_mask is not None:
            padding = (attention_mask.long().cumsum(dim=1) == 0).sum(dim=1)
        self.sinks, self.padding = sinks, padding
        if sinks and padding is not None:
            sinks += int(padding.max())
        self.sinks_with_padding = sinks
        layers = DynamicCache(config=config).layers
        store_type = DecodedOnceStore if decode_once else PartStore
        windows = [getattr(layer, "sliding_window", None) for layer in layers]
        by_layer = codecs_by_layer(plan)
        earlier = {
            layer: earlier_layers(windows, layer, max(codec.n_context_layers for codec in codecs.values()))
            for layer, codecs in by_layer.items()
        }
        ours = sorted({*by_layer, *(source for own in earlier.values() for source in own)})
        if rotation is not None:
            shared = rotation.for_passes()
        for layer in ours:
            stock, space, codecs = layers[layer], None, by_layer.get(layer, {})
            sources = [layers[source] for source in earlier.get(layer, [])]
            if rotation is not None:
                space = KeySpace(shared, layer, padding, ends_pass=layer == ours[-1])
            if type(stock) is DynamicSlidingWindowLayer:
                layers[layer] = LeanSlidingLayer(
                    stock.sliding_window, codecs, sinks, window, space, sources, store_type, encode_every
                )
            else:
                assert type(stock) is DynamicLayer, "find_geometry lets no other layers pass"
                layers[layer] = LeanLayer(codecs, sinks, window, space, sources, store_type, encode_every)
        for layer in range(first_layer):
            layers[layer] = SkippedLayer(getattr(layers[layer], "sliding_window", None), layers[first_layer])
        super().__init__(layers=layers)
        self.config, self.plan, self.rotation = config, plan, rotation
        self.window, self.encode_every = window, encode_every
        self.origin = origin
        self.first_layer, self.decode_once = first_layer, decode_once

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Take in new keys and values; see `LeanLayer.update`. Under attention over codes, the codes are handed out.

        Not on a GPU, where a step takes as long as starting its operations does: to rebuild a layer takes two thirds as
        many as to read its codes, which torch's operations do there. Nor where they were decoded before.
        """
        layer = self.layers[layer_idx]
        if isinstance(layer, LeanLayer):
            is_read = reads_codes(self.config) and key_states.device.type == "cpu"
            layer.hands_out_codes = is_read and not self.decode_once
        elif layer.is_initialized and _kind(layer.keys) != _kind(key_states):
            # Read from a file, by who did not know where the layer's keys would be, and what numbers: a cache that was
            # saved by a model in another dtype suits this one.
            layer.keys, layer.values = layer.keys.to(key_states), layer.values.to(value_states)
            layer.device, layer.dtype = key_states.device, key_states.dtype
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def encode_all(self) -> None:
        """Encode every token behind the sinks that is held exact: what was computed exactly is coded whole.

        Of a cache with an `UNBOUNDED` window that is everything it took in since the last time, so a prompt that was
        read exactly becomes what would be saved of it, and the tokens that follow are exact beside it. Of a cache with
        a shorter window it is that window. The codes are those that `window` 0 would have made of the same vectors:
        each layer's codecs predict from what the layers before decode.
        """
        for layer in self.layers:
            if isinstance(layer, LeanLayer):
                layer.encode_all()

    def fresh(self) -> "LeanCache":
        """An empty cache, made as this one was: the same plan, sharing its codecs, and the same padding."""
        return LeanCache(
            self.config,
            self.plan,
            sinks=self.sinks,
            window=self.window,
            encode_every=self.encode_every,
            padding=self.padding,
            first_layer=self.first_layer,
            rotation=self.rotation,
            origin=self.origin,
            decode_once=self.decode_once,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "LeanCache":
        """A copy of all that is held, to branch off a sequence; codecs, configuration and rotary modules are shared."""
        shared_by_all = (self.config, self.plan, *self.plan.values(), *self.codecs.values())
        memo.update({id(shared): shared for shared in shared_by_all})
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def save(self, path: str | Path, tokens: Int[torch.Tensor, "B T"] | None = None) -> None:
        """Write all that is held to a file: codes serialized, all else as it is. `leankv.load_cache` reads it back.

        Args:
            path: of the file; a saved cache that is there is replaced once the new one is whole.
            tokens: the token ids that it was filled with, so that whoever loads it can be sure of them; more may follow
                behind.

        Raises:
            UserError: it was not made of a bundle, the tokens are not all that it was filled with, or the file cannot
                be written.
        """
        if self.origin is None:
            raise UserError(
                "this cache was not made of a bundle, so nothing could read it back; make one with leankv.fit, and the "
                "cache with bundle.new_cache()"
            )
        if self.decode_once or self.first_layer:
            raise UserError("a cache that measures is not saved; make one with bundle.new_cache()")
        seen, held = self.get_seq_length(), held_by(self.layers)
        batch = max((own.batch for own in held.values()), default=0)
        hashed = None if tokens is None else hash_of_tokens(tokens, batch, seen)
        codecs = {f"{site.layer}.{site.part}": codec for site, codec in self.codecs.items()}
        tensors, streams = tensors_of(held, codecs)
        for name, padding in (("padding", self.padding), ("rows", self._padding_of_rows())):
            if padding is not None:
                tensors[name] = padding.cpu()
        about = {
            "format": SAVED_FORMAT,
            "codecs": self.origin.checksum(),
            "model": self.origin.fingerprint,
            "tokens": hashed,
            "seen": seen,
            "batch": batch,
            "sinks": self.sinks,
            "window": self.window,
            "encode_every": self.encode_every,
            "streams": streams,
        }
        write_tensors(Path(path), tensors, about)

    def _padding_of_rows(self) -> torch.Tensor | None:
        stores = [store for layer in self.layers if isinstance(layer, LeanLayer) for store in layer.parts.values()]
        found = [store.space.padding for store in stores if store.space is not None]
        return found[0] if found else None

    @property
    def codecs(self) -> Plan:
        """The plan as it is in use: its codecs, or their copies on the device of each layer that holds tokens."""
        return {
            Site(number, part): store.codec
            for number, layer in enumerate(self.layers)
            if isinstance(layer, LeanLayer)
            for part, store in layer.parts.items()
            if store.codec is not None
        }

    def nbytes(self) -> int:
        """Bytes of memory that the cache really holds, counted as any cache's are (`leankv.cache.memory`).

        Codecs are not counted. What is made anew at each step and dropped before it ends is not held between steps.
        """
        return held_bytes(self)

    def serialized_nbytes(self, layers: Iterable[int] | None = None) -> int:
        """Bytes that the cache would take serialized: codes entropy-coded where their codec can, all else as held.

        Args:
            layers: the numbers of those to count; all unless given.
        """
        asked = self.layers if layers is None else [self.layers[number] for number in layers]
        sizes = [
            len(stream)
            for layer in asked
            if isinstance(layer, LeanLayer)
            for part in layer.parts.values()
            for stream in part.serialized()
        ]
        stock = [layer for layer in asked if not isinstance(layer, LeanLayer) and layer.is_initialized]
        return sum(sizes) + sum(tensor.nbytes for layer in stock for tensor in (layer.keys, layer.values))


def _kind(tensor: torch.Tensor) -> tuple[torch.device, torch.dtype]:
    return tensor.device, tensor.dtype

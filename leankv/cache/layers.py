"""The cache's compressed layers: each holds codes and hands out what decoding them gives.

A compressed layer holds codes (see `leankv.cache.part_store`), and what `update` returns is what decoding them gives:
there is no second copy. So one forward pass through such a cache measures the loss.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from leankv.cache.key_space import KeySpace
from leankv.cache.on_device import codec_on
from leankv.cache.part_store import PartStore
from leankv.cache.reading import LayerReading
from leankv.codecs import Codec


class LeanLayer(DynamicLayer):
    """One compressed layer, for inference: no gradient passes through what it returns.

    Cropping takes tokens off the end, of window, codes and sinks alike, and encodes nothing anew: tokens that left the
    window in the meantime are codes for good. So with an exact window a rollback leaves a trace, although
    `is_croppable` is true, as decoding that rolls back asks of it: candidates push as many tokens out of the window
    before they are accepted, and those that are rejected do not bring them back. Prompt lookup and assisted decoding
    may then say something else than plain greedy decoding. They do not, but for the last bits of products, with no
    exact window at all, or while the text is no longer than sinks and window.

    Args:
        codecs: part -> codec; a part that is not named is held exact.
        sinks: first tokens held exact.
        window: latest tokens held exact; `leankv.cache.part_store.UNBOUNDED` for all, until `encode_all`.
        key_space: where the key codec takes its vectors; as cached unless given.
        earlier: layers before this one, the nearest first, that its codecs predict from.
        store_type: holds the keys, and the values.
        encode_every: see `leankv.cache.part_store.PartStore`.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False
    hands_out_codes = False
    """Whether `update` hands out a `LayerReading` in place of tensors: for `leankv.cache.code_attention` only."""

    def __init__(
        self,
        codecs: Mapping[str, Codec],
        sinks: int,
        window: int,
        key_space: KeySpace | None = None,
        earlier: Sequence["LeanLayer"] = (),
        store_type: type[PartStore] = PartStore,
        encode_every: int = 1,
    ):
        super().__init__()
        self.codecs = dict(codecs)
        self.parts: dict[str, PartStore] = {}
        for part, space in (("k", key_space), ("v", None)):
            codec = codecs.get(part)
            back = codec.n_context_layers if codec else 0
            sources = [layer.parts[each] for layer in earlier[:back] for each in ("k", "v")]
            # Values may be predicted from the layer's own keys too.
            own = list(self.parts.values()) if back else []
            self.parts[part] = store_type(codec, sinks, window, space, sources + own, encode_every)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note dtype and device, and take codecs and what was restored to the device where this layer's keys are."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for part, store in self.parts.items():
            store.to(self.device)
            if part in self.codecs:
                store.codec = codec_on(self.codecs[part], self.device)
        self.is_initialized = True

    @torch.no_grad()
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Take in new keys and values `[B, heads, T, head_dim]`; return all that is held, as decoding gives it.

        Under attention over codes: the codes, as a `LayerReading` in place of either.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # Keys first: values may be predicted from what is read of them.
        coded = self.parts["k"].n_codes
        self.parts["k"].append(key_states)
        if self.hands_out_codes:
            self.parts["k"].begin_reading(key_states, self.parts["k"].n_codes - coded)
            self.parts["v"].append(value_states)
            self.parts["v"].begin_reading(value_states)
            reading = self._reading(key_states, value_states)
            return reading, reading
        keys = self.parts["k"].read(key_states)
        self.parts["v"].append(value_states)
        return keys, self.parts["v"].read(value_states)

    def _reading(self, key_states: torch.Tensor, value_states: torch.Tensor) -> LayerReading:
        return LayerReading(self.parts["k"], self.parts["v"], key_states, value_states)

    @torch.no_grad()
    def encode_all(self) -> None:
        """Encode every token behind the sinks; the layers before this one have done so."""
        for part in self.parts.values():
            part.encode_all()

    def get_seq_length(self) -> int:
        return len(self.parts["k"])

    def reset(self) -> None:
        for part in self.parts.values():
            part.clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, or all there are.

        The window is shorter afterwards until new tokens fill it; see the class.
        """
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number of tokens to remove")
        removed = min(-tokens_to_remove, self.get_seq_length())
        for part in self.parts.values():
            part.keep(0, len(part) - removed)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.parts["k"].batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for part in self.parts.values():
            part.index(indices)

    def offload(self) -> None:
        for part in self.parts.values():
            part.to(torch.device("cpu"))

    def prefetch(self) -> None:
        if self.is_initialized:
            for part in self.parts.values():
                part.to(self.device)


class LeanSlidingLayer(LeanLayer):
    """A compressed layer whose attention sees `sliding_window` tokens: older ones, sinks included, are dropped.

    Lengths and masks follow transformers' `DynamicSlidingWindowLayer`: between two updates it holds the last
    `sliding_window - 1` tokens, or more while past recording is on (assisted decoding), until `crop`.
    """

    is_sliding = True

    def __init__(
        self,
        sliding_window: int,
        codecs: Mapping[str, Codec],
        sinks: int,
        window: int,
        key_space: KeySpace | None = None,
        earlier: Sequence[LeanLayer] = (),
        store_type: type[PartStore] = PartStore,
        encode_every: int = 1,
    ):
        super().__init__(codecs, sinks, window, key_space, earlier, store_type, encode_every)
        self.sliding_window = sliding_window
        self.record_past = False

    @property
    def cumulative_length(self) -> int:
        """Tokens of the sequence so far, those that were dropped included."""
        return self.parts["k"].seen

    get_mask_sizes = DynamicSlidingWindowLayer.get_mask_sizes
    get_max_length = DynamicSlidingWindowLayer.get_max_length

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        keys, values = super().update(key_states, value_states)
        if self.hands_out_codes:
            return keys, values
        if not self.record_past:
            self.drop_unseen()
        visible = self._visible(key_states)
        return keys[:, :, -visible:], values[:, :, -visible:]

    def _visible(self, key_states: torch.Tensor) -> int:
        """Tokens that any of the new ones attends to, these included."""
        return self.sliding_window - 1 + key_states.shape[2]

    def _reading(self, key_states: torch.Tensor, value_states: torch.Tensor) -> LayerReading:
        start = max(0, len(self.parts["k"]) - self._visible(key_states))
        on_end = None if self.record_past else self.drop_unseen
        return LayerReading(self.parts["k"], self.parts["v"], key_states, value_states, start, on_end)

    def drop_unseen(self) -> None:
        """Forget what no later token attends to."""
        for part in self.parts.values():
            part.keep(len(part) - self.sliding_window + 1, len(part))

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError(
                "a sliding-window layer that dropped tokens can only be cropped while recording its past"
            )
        super().crop(tokens_to_remove)
        self.drop_unseen()


class SkippedLayer(DynamicLayer):
    """Stands for a layer that is not run: always as long as `reference`, the first one that is, so that masks agree."""

    def __init__(self, sliding_window: int | None, reference: DynamicLayer):
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.reference = reference

    @property
    def cumulative_length(self) -> int:
        return self.get_seq_length()

    def get_seq_length(self) -> int:
        return int(self.reference.get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        stock = DynamicSlidingWindowLayer if self.is_sliding else DynamicLayer
        kv_length, kv_offset = stock.get_mask_sizes(self, query_length)
        return kv_length, kv_offset

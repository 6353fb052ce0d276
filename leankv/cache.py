"""The compressed transformers cache. Beside `leankv.observers` the only file that knows transformers' cache classes.

A compressed layer holds codes (see `leankv.part_store`), and what `update` returns is what decoding them gives: there
is no second copy. So one forward pass through such a cache measures the loss.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from leankv.codecs import Codec
from leankv.held_bytes import held_bytes
from leankv.part_store import KeySpace, PartStore

if TYPE_CHECKING:
    from leankv.rope import KeyRotation

Plan = Mapping[int, Mapping[str, Codec]]
"""Which codec each layer's parts get: layer -> part (`k` or `v`) -> codec. What is not named stays exact."""


def attention_windows(config: Any) -> list[int | None] | None:
    """Each layer's sliding window (None: it sees all), or None if some layer has no plain attention cache."""
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


def earlier_layers(windows: Sequence[int | None], layer: int, count: int) -> list[int]:
    """The layers that a codec of `layer` may predict from: the nearest `count` before it that hold the same tokens."""
    alike = [other for other in range(layer) if windows[other] == windows[layer]]
    return alike[::-1][:count]


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
        window: latest tokens held exact.
        key_space: where the key codec takes its vectors; as cached unless given.
        earlier: layers before this one, the nearest first, that its codecs predict from.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        codecs: Mapping[str, Codec],
        sinks: int,
        window: int,
        key_space: KeySpace | None = None,
        earlier: Sequence["LeanLayer"] = (),
    ):
        super().__init__()
        self.codecs = dict(codecs)

        def store(part: str, space: KeySpace | None, own: list[PartStore]) -> PartStore:
            codec = codecs.get(part)
            looks_back = codec.looks_back if codec else 0
            known = [layer.parts[each] for layer in earlier[:looks_back] for each in ("k", "v")]
            return PartStore(codec, sinks, window, space, known + own if looks_back else [])

        keys = store("k", key_space, [])
        self.parts = {"k": keys, "v": store("v", None, [keys])}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note dtype and device, and bring the codecs to the device where this layer's keys are."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for codec in self.codecs.values():
            codec.to(self.device)
        self.is_initialized = True

    @torch.no_grad()
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new keys and values `[B, heads, T, head_dim]`; return all that is held, as decoding gives it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # Keys first: values may be predicted from what is read of them.
        self.parts["k"].append(key_states)
        keys = self.parts["k"].read(key_states)
        self.parts["v"].append(value_states)
        return keys, self.parts["v"].read(value_states)

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

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._apply(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        self._apply(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._apply(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for part in self.parts.values():
            part.apply(function)


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
    ):
        super().__init__(codecs, sinks, window, key_space, earlier)
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states)
        if not self.record_past:
            self._drop_unseen()
        visible = self.sliding_window - 1 + key_states.shape[2]
        return keys[:, :, -visible:], values[:, :, -visible:]

    def _drop_unseen(self) -> None:
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
        self._drop_unseen()


class LeanCache(Cache):
    """A transformers cache in which the layers of a plan hold codes.

    Use one for each sequence batch, as any `past_key_values`: `model.generate(**inputs, past_key_values=cache)`.

    With left-padded batches pass `attention_mask`: the sinks of a row begin where its padding ends, so the longest
    padding is kept exact with them.

    For inference: a forward pass outside `no_grad` gives the same numbers, but no gradients pass compressed layers.
    Rollback (prompt lookup, assisted decoding) may change what is generated; `LeanLayer` says when it cannot.

    Args:
        config: the model's configuration.
        plan: layer -> part -> fitted codec.
        sinks: first tokens of each sequence held exact in compressed layers.
        window: latest tokens held exact in compressed layers.
        attention_mask: `[B, T]` of the prompt, 0 at padding; only its left padding matters.
        first_layer: layers before it are not run and hold nothing (see `leankv.replay`).
        rotation: given, keys are encoded un-rotated (key space pre-rope).
    """

    def __init__(
        self,
        config: Any,
        plan: Plan,
        sinks: int = 0,
        window: int = 0,
        attention_mask: torch.Tensor | None = None,
        first_layer: int = 0,
        rotation: "KeyRotation | None" = None,
    ):
        padding = None
        if attention_mask is not None:
            padding = (attention_mask.long().cumsum(dim=1) == 0).sum(dim=1)
        self.sinks, self.padding = sinks, padding
        if sinks and padding is not None:
            sinks += int(padding.max())
        layers = DynamicCache(config=config).layers
        windows = [getattr(layer, "sliding_window", None) for layer in layers]
        looks_back = {layer: max((c.looks_back for c in codecs.values()), default=0) for layer, codecs in plan.items()}
        earlier = {layer: earlier_layers(windows, layer, back) for layer, back in looks_back.items()}
        for layer in sorted({*plan, *(source for own in earlier.values() for source in own)}):
            stock, space, codecs = layers[layer], None, plan.get(layer, {})
            sources = [layers[source] for source in earlier.get(layer, [])]
            if rotation is not None:
                space = KeySpace(partial(rotation.remove, layer), partial(rotation.restore, layer), padding)
            if type(stock) is DynamicSlidingWindowLayer:
                layers[layer] = LeanSlidingLayer(stock.sliding_window, codecs, sinks, window, space, sources)
            else:
                assert type(stock) is DynamicLayer, "find_geometry lets no other layers pass"
                layers[layer] = LeanLayer(codecs, sinks, window, space, sources)
        for layer in range(first_layer):
            layers[layer] = _SkippedLayer(getattr(layers[layer], "sliding_window", None), layers[first_layer])
        super().__init__(layers=layers)
        self.config, self.plan, self.window, self.rotation = config, plan, window, rotation
        self.first_layer = first_layer

    def fresh(self) -> "LeanCache":
        """An empty cache, made as this one was: the same plan, sharing its codecs, and the same padding."""
        mask = None
        if self.padding is not None:
            longest = int(self.padding.max())
            mask = torch.arange(longest + 1, device=self.padding.device) >= self.padding[:, None]
        return LeanCache(self.config, self.plan, self.sinks, self.window, mask, self.first_layer, self.rotation)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of all that is held, to branch off a sequence; codecs, rotation and configuration are shared."""
        codecs = [codec for parts in self.plan.values() for codec in parts.values()]
        memo.update({id(shared): shared for shared in (self.config, self.plan, self.rotation, *codecs)})
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @classmethod
    def from_pretrained(cls, directory: str | Path, model: Any, **overrides: Any) -> Self:
        """A cache as a bundle describes it, for `model`.

        Args:
            directory: the bundle.
            model: the transformers model that it was made for.
            **overrides: `sinks`, `window` or `attention_mask`, in place of the bundle's; see the class.

        Raises:
            UserError: the bundle is incomplete or changed, or was made for another model; the sentence says which.
        """
        from leankv.bundle import load_bundle

        bundle = load_bundle(Path(directory), model)
        settings = {"sinks": bundle.sinks, "window": bundle.window, "rotation": bundle.rotation, **overrides}
        return cls(model.config, bundle.plan, **settings)

    def nbytes(self) -> int:
        """Bytes of memory that the cache really holds, counted as any cache's are (`leankv.held_bytes`).

        Codecs are not counted. What is made anew at each step and dropped before it ends is not held between steps.
        """
        return held_bytes(self)

    def parked_nbytes(self) -> int:
        """Bytes that the cache would take parked: codes entropy-coded where their codec can, all else as it is held."""
        sizes = [
            len(stream)
            for layer in self.layers
            if isinstance(layer, LeanLayer)
            for part in layer.parts.values()
            for stream in part.parked()
        ]
        stock = [layer for layer in self.layers if not isinstance(layer, LeanLayer) and layer.is_initialized]
        return sum(sizes) + sum(tensor.nbytes for layer in stock for tensor in (layer.keys, layer.values))


class _SkippedLayer(DynamicLayer):
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

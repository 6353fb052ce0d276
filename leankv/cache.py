"""The compressed transformers cache, and the recording one. The only file that knows transformers' cache classes.

A compressed layer holds codes, and what `update` returns is what decoding them gives: there is no second copy. Three
runs of tokens lie behind each other in it: the *sinks* (the first S tokens, exact), the codes, and the *window* (the
latest R tokens, exact). Tokens enter at the end of the window and are encoded when they leave it; with S = R = 0 every
vector that attention reads, the current token's included, went through the codec.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from leankv.codecs import Code, Codec

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


class _PartStore:
    """The keys or the values of one layer, `[B, heads, tokens, head_dim]`, as sinks, codes and window."""

    def __init__(self, codec: Codec | None, sinks: int, window: int):
        self.codec = codec
        self.sinks = sinks
        self.window = window
        self.seen = 0  # tokens of the sequence so far, those that a sliding window dropped included
        self.sink_rows: torch.Tensor | None = None
        self.code: Code | None = None  # each tensor [B, tokens, ...]
        self.window_rows: torch.Tensor | None = None

    def append(self, rows: torch.Tensor) -> None:
        """Take in new tokens, and encode what leaves the window."""
        missing = max(self.sinks - self.seen, 0)
        self.seen += rows.shape[2]
        if self.codec is None:
            self.window_rows = _cat(self.window_rows, rows)
            return
        if missing:
            self.sink_rows = _cat(self.sink_rows, rows[:, :, :missing])
            rows = rows[:, :, missing:]
        rows = _cat(self.window_rows, rows)
        leaving = max(rows.shape[2] - self.window, 0)
        if leaving:
            self._encode(rows[:, :, :leaving])
            rows = rows[:, :, leaving:].clone()
        self.window_rows = rows if rows.shape[2] else None

    def _encode(self, rows: torch.Tensor) -> None:
        assert self.codec is not None
        batch, heads, tokens, head_dim = rows.shape
        vectors = rows.transpose(1, 2).reshape(batch * tokens, heads * head_dim)
        code = self.codec.encode(vectors)
        code = {name: tensor.unflatten(0, (batch, tokens)) for name, tensor in code.items()}
        if self.code is not None:
            code = {name: torch.cat([self.code[name], tensor], dim=1) for name, tensor in code.items()}
        self.code = code

    def read(self, like: torch.Tensor) -> torch.Tensor:
        """All tokens held, `[B, heads, tokens, head_dim]`, in the dtype of `like`."""
        decoded = None
        if self.code is not None and self.codec is not None:
            batch, tokens = next(iter(self.code.values())).shape[:2]
            vectors = self.codec.decode({name: tensor.flatten(0, 1) for name, tensor in self.code.items()})
            decoded = vectors.to(like.dtype).reshape(batch, tokens, like.shape[1], like.shape[3]).transpose(1, 2)
        pieces = [piece for piece in (self.sink_rows, decoded, self.window_rows) if piece is not None]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def __len__(self) -> int:
        return sum(self._lengths())

    def _lengths(self) -> tuple[int, int, int]:
        coded = next(iter(self.code.values())).shape[1] if self.code is not None else 0
        return _length(self.sink_rows, 2), coded, _length(self.window_rows, 2)

    def keep(self, start: int, stop: int) -> None:
        """Forget all tokens but those from `start` to `stop`, counted from the first one held."""
        sinks, coded, _ = self._lengths()
        self.seen -= max(len(self) - stop, 0)

        def cut(tensor: torch.Tensor, dim: int, offset: int) -> torch.Tensor | None:
            first = min(max(start - offset, 0), tensor.shape[dim])
            last = min(max(stop - offset, first), tensor.shape[dim])
            if last == first:
                return None
            if last - first == tensor.shape[dim]:
                return tensor
            return tensor.narrow(dim, first, last - first).clone()  # a view would keep the whole storage alive

        if self.sink_rows is not None:
            self.sink_rows = cut(self.sink_rows, 2, 0)
        if self.code is not None:
            kept = {name: cut(tensor, 1, sinks) for name, tensor in self.code.items()}
            self.code = {name: t for name, t in kept.items() if t is not None} or None
        if self.window_rows is not None:
            self.window_rows = cut(self.window_rows, 2, sinks + coded)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor held; `function` acts on the batch dimension or moves to a device."""
        if self.sink_rows is not None:
            self.sink_rows = function(self.sink_rows)
        if self.code is not None:
            self.code = {name: function(tensor) for name, tensor in self.code.items()}
        if self.window_rows is not None:
            self.window_rows = function(self.window_rows)

    def tensors(self) -> list[torch.Tensor]:
        exact = [rows for rows in (self.sink_rows, self.window_rows) if rows is not None]
        return exact + list((self.code or {}).values())


def _length(tensor: torch.Tensor | None, dim: int) -> int:
    return 0 if tensor is None else tensor.shape[dim]


def _cat(first: torch.Tensor | None, second: torch.Tensor) -> torch.Tensor:
    """`first` (or nothing) and `second` along the tokens; always a copy, so that the model's own can be freed."""
    return second.clone() if first is None else torch.cat([first, second], dim=2)


class LeanLayer(DynamicLayer):
    """One compressed layer.

    Args:
        codecs: part -> codec; a part that is not named is held exact.
        sinks: first tokens held exact.
        window: latest tokens held exact.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, codecs: Mapping[str, Codec], sinks: int, window: int):
        super().__init__()
        self.codecs = dict(codecs)
        self.sinks = sinks
        self.window = window
        self._clear()

    def _clear(self) -> None:
        self.parts = {part: _PartStore(self.codecs.get(part), self.sinks, self.window) for part in ("k", "v")}
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note dtype and device, and bring the codecs to the device where this layer's keys are."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for codec in self.codecs.values():
            codec.to(self.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new keys and values `[B, heads, T, head_dim]`; return all that is held, as decoding gives it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.parts["k"].append(key_states)
        self.parts["v"].append(value_states)
        return self.parts["k"].read(key_states), self.parts["v"].read(value_states)

    def get_seq_length(self) -> int:
        return len(self.parts["k"])

    def reset(self) -> None:
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens. The window is shorter afterwards until new tokens fill it."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number of tokens to remove")
        for part in self.parts.values():
            part.keep(0, len(part) + tokens_to_remove)

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

    def __init__(self, sliding_window: int, codecs: Mapping[str, Codec], sinks: int, window: int):
        super().__init__(codecs, sinks, window)
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False

    get_mask_sizes = DynamicSlidingWindowLayer.get_mask_sizes
    get_max_length = DynamicSlidingWindowLayer.get_max_length

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.cumulative_length += key_states.shape[2]
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

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError(
                "a sliding-window layer that dropped tokens can only be cropped while recording its past"
            )
        super().crop(tokens_to_remove)
        self.cumulative_length += tokens_to_remove
        self._drop_unseen()


class LeanCache(Cache):
    """A transformers cache in which the layers of a plan hold codes.

    Use one for each sequence batch, as any `past_key_values`: `model.generate(**inputs, past_key_values=cache)`.

    With left-padded batches pass `attention_mask`: the sinks of a row begin where its padding ends, so the longest
    padding is kept exact with them.

    Args:
        config: the model's configuration.
        plan: layer -> part -> fitted codec.
        sinks: first tokens of each sequence held exact in compressed layers.
        window: latest tokens held exact in compressed layers.
        attention_mask: `[B, T]` of the prompt, 0 at padding; only its left padding matters.
    """

    def __init__(
        self,
        config: Any,
        plan: Plan,
        sinks: int = 0,
        window: int = 0,
        attention_mask: torch.Tensor | None = None,
    ):
        if sinks and attention_mask is not None:
            sinks += int((attention_mask.long().cumsum(dim=1) == 0).sum(dim=1).max())
        layers = DynamicCache(config=config).layers
        for layer, codecs in plan.items():
            stock = layers[layer]
            if type(stock) is DynamicSlidingWindowLayer:
                layers[layer] = LeanSlidingLayer(stock.sliding_window, codecs, sinks, window)
            else:
                assert type(stock) is DynamicLayer, "find_geometry lets no other layers pass"
                layers[layer] = LeanLayer(codecs, sinks, window)
        super().__init__(layers=layers)
        self.config, self.plan, self.sinks, self.window = config, plan, sinks, window

    def fresh(self) -> "LeanCache":
        """An empty cache of the same plan, sharing its codecs."""
        return LeanCache(self.config, self.plan, self.sinks, self.window)

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
        return cls(model.config, bundle.plan, **{"sinks": bundle.sinks, "window": bundle.window, **overrides})

    def nbytes(self) -> int:
        """Bytes of memory that the cache really holds: the storage of every tensor in it, codecs not counted."""
        tensors: list[torch.Tensor] = []
        for layer in self.layers:
            if isinstance(layer, LeanLayer):
                tensors += [tensor for part in layer.parts.values() for tensor in part.tensors()]
            elif layer.is_initialized:
                tensors += [layer.keys, layer.values]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())


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

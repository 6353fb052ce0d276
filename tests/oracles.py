"""Slow, obvious twins of the cache, a codec whose losses are easy to predict, and plans for tiny models."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from leankv.cache.plan import Plan, Site, codecs_by_layer
from leankv.codecs import Code, Codec, FitData, Recipe, TrainingSettings
from leankv.codecs.autoencoder import AutoencoderRecipe
from leankv.codecs.base import Context, Vectors
from leankv.codecs.identity import Identity
from leankv.codecs.pca import PCARecipe
from leankv.models.geometry import find_geometry
from leankv.models.observers import RecordingCache
from tests import tiny


class RoundingRecipe(Recipe):
    """Quarters."""

    family = grammar = "rounding"

    def fit(self, data: FitData) -> list[Codec]:
        return [Rounding(data.train.shape[-1]) for _ in data.train]

    def unfitted(self, width: int) -> Codec:
        return Rounding(width)


class Rounding(Codec):
    """Rounds each number by itself to a quarter, in one byte: lossy, and the same whatever rows stand beside."""

    def __init__(self, width: int):
        super().__init__(RoundingRecipe(), width)

    @property
    def bits_per_token(self) -> int:
        return self.width * 8

    def encode(self, x: Vectors, context: Context = None) -> Code:
        return Code({"q": (x.float() * 4).round().clamp(-127, 127).to(torch.int8)})

    def decode(self, code: Code, context: Context = None) -> Vectors:
        return code["q"].float() / 4


def through(codec: Codec | None, rows: torch.Tensor) -> torch.Tensor:
    """decode(encode(rows)) for rows `[B, heads, T, head_dim]`; unchanged without a codec."""
    if codec is None:
        return rows
    batch, heads, length, head_dim = rows.shape
    vectors = rows.transpose(1, 2).reshape(batch * length, heads * head_dim)
    decoded = codec.decode(codec.encode(vectors)).to(rows.dtype)
    return decoded.reshape(batch, length, heads, head_dim).transpose(1, 2)


class EveryRow:
    """The oracle of one part of one layer: all original rows of the sequence, and which of them have been encoded."""

    def __init__(
        self, codec: Codec | None, sinks: int, window: int, sliding_window: int | None = None, encode_every: int = 1
    ):
        self.codec, self.sinks, self.window, self.sliding_window = codec, sinks, window, sliding_window
        self.encode_every = encode_every
        self.rows: torch.Tensor | None = None
        self.encoded: list[bool] = []
        self.first_held = 0

    def update(self, new: torch.Tensor, record_past: bool = False) -> torch.Tensor:
        self.rows = new if self.rows is None else torch.cat([self.rows, new], dim=2)
        total = self.rows.shape[2]
        self.encoded += [False] * new.shape[2]
        if self.codec is not None:
            # Once encoded always encoded: a crop does not bring rows back.
            left = [self.sinks <= t < total - self.window and not was for t, was in enumerate(self.encoded)]
            if sum(left) >= self.encode_every:
                self.encoded = [was or now for was, now in zip(self.encoded, left, strict=True)]
        if not record_past:
            self.forget_unseen()
        visible = total if self.sliding_window is None else min(total, self.sliding_window - 1 + new.shape[2])
        where = torch.tensor(self.encoded)[None, None, :, None]
        return torch.where(where, through(self.codec, self.rows), self.rows)[:, :, total - visible :]

    def forget_unseen(self) -> None:
        if self.sliding_window is not None:
            self.first_held = max(self.first_held, len(self.encoded) - self.sliding_window + 1)

    def crop(self, count: int) -> None:
        assert self.rows is not None
        left = self.rows.shape[2] - count
        self.rows, self.encoded = self.rows[:, :, :left], self.encoded[:left]
        self.forget_unseen()

    def batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        assert self.rows is not None
        self.rows = function(self.rows)

    def nbytes(self) -> int:
        assert self.rows is not None
        batch, heads, _, head_dim = self.rows.shape
        held = self.encoded[self.first_held :]
        exact = held.count(False) * heads * head_dim * self.rows.element_size()
        return batch * (exact + held.count(True) * (self.codec.bits_per_token // 8 if self.codec else 0))


class SlowCache(DynamicCache):
    """A stock cache whose layers return what `EveryRow` says that a compressed one must."""

    def __init__(self, config: Any, plan: Plan, sinks: int = 0, window: int = 0, encode_every: int = 1):
        super().__init__(config=config)
        self.parts = {
            (layer, part): EveryRow(
                codecs.get(part), sinks, window, getattr(self.layers[layer], "sliding_window", None), encode_every
            )
            for layer, codecs in codecs_by_layer(plan).items()
            for part in ("k", "v")
        }

    def update(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        stock = super().update(k, v, layer_idx)
        if (layer_idx, "k") not in self.parts:
            return stock
        return self.parts[layer_idx, "k"].update(k), self.parts[layer_idx, "v"].update(v)


class SlowChain(DynamicCache):
    """The oracle of codecs that predict from earlier layers: all rows are kept, and coded anew at every update."""

    def __init__(self, config: Any, plan: Plan, sinks: int, window: int, rotation: Any = None):
        super().__init__(config=config)
        self.plan, self.sinks, self.window, self.rotation = plan, sinks, window, rotation
        self.known: dict[tuple[int, str], torch.Tensor] = {}

    def update(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        read = []
        # The windows of the tiny models' sliding layers are wider than the texts these are tried on.
        windows = [getattr(layer, "sliding_window", None) for layer in self.layers]
        alike = [layer for layer in range(layer_idx) if windows[layer] == windows[layer_idx]][::-1]
        for part, rows in zip(("k", "v"), super().update(k, v, layer_idx), strict=True):
            batch, heads, length, head_dim = rows.shape
            positions = torch.arange(length)[None]
            rotated = part == "k" and self.rotation is not None
            x = self.rotation.remove(layer_idx, rows, positions) if rotated else rows
            x = x.transpose(1, 2).reshape(batch * length, heads * head_dim).float()
            codec = self.plan.get(Site(layer_idx, part))
            decoded = x
            if codec is not None:
                back = codec.n_context_layers
                context = [self.known[layer, each] for layer in alike[:back] for each in ("k", "v")]
                context += [self.known[layer_idx, "k"]] if part == "v" and back else []
                r = torch.cat([x[:, :0].half(), *context], dim=1)
                decoded = codec.decode(codec.encode(x, r), r)
            self.known[layer_idx, part] = decoded.half()  # as those see it that predict from it
            given = decoded.reshape(batch, length, heads, head_dim).transpose(1, 2)
            given = (self.rotation.restore(layer_idx, given, positions) if rotated else given).to(rows.dtype)
            coded = (positions >= self.sinks) & (positions < length - self.window)
            read.append(torch.where(coded[:, None, :, None], given, rows) if codec is not None else rows)
        return tuple(read)


def held_tensors(thing: Any) -> list[torch.Tensor]:
    """Every tensor that can be reached from a cache or a layer, codecs and configurations left out."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict):
        return [tensor for value in thing.values() for tensor in held_tensors(value)]
    if isinstance(thing, list | tuple | set):
        return [tensor for value in thing for tensor in held_tensors(value)]
    if isinstance(thing, torch.nn.Module) or not type(thing).__module__.startswith("leankv"):
        return []
    return held_tensors(vars(thing))


def plan_of(model: Any, make: Callable[[int], Codec], parts: Sequence[str] = ("k", "v")) -> dict[Site, Codec]:
    """A plan with `make(width)` for the given parts of every layer."""
    layers = find_geometry(model).layers
    return {Site(number, part): make(layer.width_of(part)) for number, layer in enumerate(layers) for part in parts}


def identity_plan(model: Any) -> dict[Site, Codec]:
    return plan_of(model, lambda width: Identity(width, model.dtype))


@torch.no_grad()
def recorded(model: Any, tokens: torch.Tensor) -> dict[Site, torch.Tensor]:
    """Site -> `[tokens, W]` of a plain forward pass."""
    vectors: dict[Site, torch.Tensor] = {}

    def record(layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        vectors[Site(layer, "k")] = k.transpose(1, 2).flatten(2).flatten(0, 1)
        vectors[Site(layer, "v")] = v.transpose(1, 2).flatten(2).flatten(0, 1)

    model(tokens, past_key_values=RecordingCache(model.config, record))
    return vectors


def fitted_plan(model: Any, dimensions: int = 6) -> dict[Site, Codec]:
    """Principal components for the keys and an autoencoder for the values of every layer, fitted on random tokens."""
    training = TrainingSettings(epochs=1, batch_tokens=32, learning_rate=3e-3, seed=0)
    plan: dict[Site, Codec] = {}
    for site, x in recorded(model, tiny.tokens(4, 40, seed=9)).items():
        recipe = PCARecipe(dimensions) if site.part == "k" else AutoencoderRecipe(dimensions, 16)
        (codec,) = recipe.fit(FitData(x[None], x[None], training=training))
        plan[site] = codec
    return plan

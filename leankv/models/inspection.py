"""What LeanKV finds out about a model's cache before anything is fitted: what `leankv info` prints."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from leankv.errors import UserError
from leankv.models.geometry import Width
from leankv.models.loading import LoadedModel
from leankv.models.rope import KeyRotation, find_conventions
from leankv.models.structure import attention_heads


@dataclass(frozen=True)
class CacheInspection:
    """What is known of a model's cache.

    Attributes:
        model: its name, as asked for.
        model_type: its architecture, as transformers calls it.
        fingerprint: see `leankv.models.fingerprint`.
        dtype: of its weights and its cache.
        device: where it lies.
        n_layers: layers with a cache.
        kv_heads: heads of K and V; one number where all layers agree, else one a layer.
        attention_heads: query heads; None where the configuration does not say.
        head_dim: numbers a head of K; likewise.
        v_head_dim: numbers a head of V; likewise.
        width: W; likewise, and `(K's, V's)` in a layer where they differ.
        sliding_windows: tokens that a layer sees, None where it sees all; likewise.
        bytes_per_token: of the 16-bit cache, all layers.
        key_convention: rotary convention (`half`, `interleaved`, `none`, or `None` where it is not known) -> layers.
        can: what LeanKV can do with this cache.
        cannot: what it cannot, and why.
    """

    model: str
    model_type: str
    fingerprint: str
    dtype: str
    device: str
    n_layers: int
    kv_heads: int | list[int]
    attention_heads: int | None
    head_dim: int | list[int]
    v_head_dim: int | list[int]
    width: int | list[Width]
    sliding_windows: int | list[int | None] | None
    bytes_per_token: int
    key_convention: dict[str, int]
    can: list[str]
    cannot: list[str]


def inspect_cache(loaded: LoadedModel) -> CacheInspection:
    """The cache's geometry, the keys' rotary convention, and what can be done with them."""
    layers = loaded.geometry.layers
    conventions = find_conventions(loaded.model)
    sliding = sum(layer.sliding_window is not None for layer in layers)
    unknown = [number for number, convention in enumerate(conventions) if convention is None]
    can = ["capture, fit, sweep, map, compare, select and generate with K, V or both compressed"]
    cannot = []
    try:
        KeyRotation(loaded.model)
        can.append("compress keys pre-RoPE (--key-space pre-rope)")
    except UserError as error:
        cannot.append(f"compress keys pre-RoPE (--key-space pre-rope): {error}")
    if unknown:
        cannot.append(f"say how positions enter the keys of layers {_ranges(unknown)}: no rotary convention matches")
    if sliding:
        can.append(f"compress the {sliding} sliding-window layers inside their window")
    return CacheInspection(
        model=loaded.name,
        model_type=loaded.model.config.model_type,
        fingerprint=loaded.fingerprint,
        dtype=loaded.numerics["dtype"],
        device=loaded.numerics["device"],
        n_layers=len(layers),
        kv_heads=_one_or_all([layer.kv_heads for layer in layers]),
        attention_heads=attention_heads(loaded.model.config),
        head_dim=_one_or_all([layer.head_dim for layer in layers]),
        v_head_dim=_one_or_all([layer.v_head_dim or layer.head_dim for layer in layers]),
        width=loaded.geometry.width,
        sliding_windows=_one_or_all([layer.sliding_window for layer in layers]),
        bytes_per_token=loaded.geometry.bytes_per_token,
        key_convention={str(name): count for name, count in Counter(conventions).items()},
        can=can,
        cannot=cannot,
    )


def info_rows(info: CacheInspection) -> list[tuple[str, str]]:
    """The same as name and value, for people."""
    context = 4096
    words = {
        "half": "rotary, halves rotated (Llama)",
        "interleaved": "rotary, pairs interleaved (GPT-J)",
        "none": "keys do not depend on the position",
        "None": "not rotary, or not recognised",
    }
    heads = f"{info.attention_heads}, {info.kv_heads} x {info.head_dim}"
    if info.v_head_dim != info.head_dim:
        heads += f" (K), {info.v_head_dim} (V)"
    conventions = "; ".join(f"{words[name]}: {count} layers" for name, count in info.key_convention.items())
    return [
        ("model", f"{info.model} ({info.model_type}), {info.dtype} on {info.device}"),
        ("layers", str(info.n_layers)),
        ("attention heads, KV heads x head dim", heads),
        ("width W", str(info.width)),
        ("sliding window", str(info.sliding_windows or "none")),
        ("16-bit cache, bytes per token", f"{info.bytes_per_token:,}"),
        (f"16-bit cache, {context} tokens", f"{info.bytes_per_token * context / 2**20:,.1f} MiB without windows"),
        ("key convention", conventions),
        ("fingerprint", info.fingerprint[:16]),
        *[("can", text) for text in info.can],
        *[("cannot", text) for text in info.cannot],
    ]


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else values


def _ranges(numbers: list[int]) -> str:
    """`0-29` for a run of numbers, `0, 2, 5` for scattered ones."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers))

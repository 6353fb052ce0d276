"""Caches on disk: what `LeanCache.save` wrote, checked and read back, so that a sequence goes on as if it never ended.

The file is safetensors under one checksum (`leankv.cache.tensor_file`). Its table says

    format    of the file
    codecs    checksum of the fitted codecs and their key space; model, its fingerprint
    tokens    hash of the token ids, where the writer gave them
    seen      tokens of each row so far, left padding and what sliding windows dropped included
    batch     rows
    sinks     first tokens kept exact; window, latest ones
    streams   store (`LAYER.PART`) -> its tokens that are codes, and the bytes of each row's stream

and its tensors are the streams, each store's exact vectors in the model's dtype, and the rows' left padding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from transformers.cache_utils import DynamicSlidingWindowLayer

from leankv.cache.bundle import Bundle
from leankv.cache.contents import MOST_TOKENS, DamagedError, Held, Room, Sealed, hash_of_tokens, opened, sealed_in
from leankv.cache.layers import LeanLayer, LeanSlidingLayer
from leankv.cache.lean_cache import SAVED_FORMAT, LeanCache
from leankv.cache.part_store import UNBOUNDED
from leankv.cache.plan import Site
from leankv.cache.tensor_file import read_tensors
from leankv.config.plan_table import PARTS
from leankv.errors import UserError
from leankv.models.geometry import LayerGeometry

WHAT, WAY_OUT = "the saved cache", "make it again from its text"

MOST_ROWS = 2**16  # assumption: of a batch


def load_cache(
    path: str | Path,
    bundle: Bundle,
    tokens: Int[torch.Tensor, "B T"] | None = None,
    device: torch.device | str = "cpu",
) -> LeanCache:
    """A cache that `LeanCache.save` wrote. It goes on as the one that was saved would: the same logits, bit for bit.

    Args:
        path: of the file.
        bundle: that made the cache.
        tokens: the ids of what it should hold; more may follow behind.
        device: where its exact layers are held at first; all of them follow the keys that come.

    Raises:
        UserError: there is no such file, it is damaged, another bundle, model or version made it, or it holds other
            tokens.
    """
    path = Path(path)
    tensors, about = read_tensors(path, WHAT, WAY_OUT)
    try:
        cache = _restored(path, tensors, about, bundle, torch.device(device))
    except DamagedError as error:
        raise UserError(f"{WHAT} {path} cannot be: {error}; {WAY_OUT}") from error
    if tokens is not None and about["tokens"] != hash_of_tokens(tokens, about["batch"], about["seen"]):
        raise UserError(
            f"{WHAT} {path} was not made of these tokens; {WAY_OUT}, or give those that it was saved with"
            if about["tokens"] is not None
            else f"{WHAT} {path} does not say which tokens it was made of; save it with `tokens`"
        )
    return cache


def _restored(
    path: Path, tensors: dict[str, torch.Tensor], about: Mapping[str, Any], bundle: Bundle, device: torch.device
) -> LeanCache:
    if about.get("format") != SAVED_FORMAT:
        raise UserError(
            f"{WHAT} {path} has format {about.get('format')!r}, this version reads {SAVED_FORMAT}; {WAY_OUT}"
        )
    check_origin(path, WHAT, about, bundle)
    about = {"encode_every": 1, **about}  # what an earlier version saved does not say
    numbers = {
        "seen": MOST_TOKENS,
        "batch": MOST_ROWS,
        "sinks": MOST_TOKENS,
        "window": UNBOUNDED,
        "encode_every": MOST_TOKENS,
    }
    for name, most in numbers.items():
        if type(about.get(name)) is not int or not 0 <= about[name] <= most:
            raise DamagedError(f"{name} is {about.get(name)!r}")
    if not isinstance(about.get("tokens"), str | None) or not isinstance(about.get("streams"), dict):
        raise DamagedError("its table lacks tokens or streams")
    seen, batch = about["seen"], about["batch"]
    padding, rows = (_padding(tensors.pop(name, None), seen) for name in ("padding", "rows"))
    if rows is not None and len(rows) != batch:
        raise DamagedError(f"it has the padding of {len(rows)} rows, not of {batch}")
    kept = {name: about[name] for name in ("sinks", "window", "encode_every")}
    cache = bundle.new_cache(**kept, padding=padding)
    rooms = rooms_of(bundle, cache.sinks_with_padding)
    sealed = sealed_in(tensors, about["streams"], rooms, batch)
    for number, layer in enumerate(cache.layers):
        for part in PARTS:
            _check_length(f"{number}.{part}", sealed[f"{number}.{part}"], seen, layer)
    fill(cache, opened([sealed], rooms), seen, device)
    for layer in cache.layers:
        if isinstance(layer, LeanLayer):
            for store in layer.parts.values():
                if store.space is not None:
                    store.space.restore(None if rows is None else rows.clone())
    return cache


def fill(cache: LeanCache, held: Mapping[str, Held], seen: int, device: torch.device) -> None:
    """Have an empty cache hold what was held after `seen` tokens, store by store."""
    for number, layer in enumerate(cache.layers):
        own: dict[str, Held] = {part: held[f"{number}.{part}"] for part in PARTS}
        if isinstance(layer, LeanLayer):
            for part, store in layer.parts.items():
                store.restore(seen, own[part].sinks, own[part].code, own[part].window)
        elif (keys := own["k"].window) is not None and (values := own["v"].window) is not None:
            layer.lazy_initialization(keys.to(device), values.to(device))
            layer.keys, layer.values = keys.to(device), values.to(device)
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = seen


def forget_unseen(cache: LeanCache) -> None:
    """Drop what lies behind sliding windows, as their layers would have themselves."""
    for layer in cache.layers:
        if isinstance(layer, LeanSlidingLayer):
            layer.drop_unseen()
        elif isinstance(layer, DynamicSlidingWindowLayer):
            layer.keys, layer.values = (
                rows[:, :, -layer.sliding_window + 1 :].clone() for rows in (layer.keys, layer.values)
            )


def check_origin(path: Path, what: str, about: Mapping[str, Any], bundle: Bundle) -> None:
    """Refuse what was written with another model's bundle, or another bundle's codecs.

    Raises:
        UserError: it was.
    """
    if about.get("model") != bundle.made_for["fingerprint"]:
        raise UserError(
            f"{what} {path} is of another model than {bundle.made_for['name']} (its fingerprint differs); load it with "
            "the bundle that made it"
        )
    if about.get("codecs") != bundle.checksum:
        raise UserError(
            f"{what} {path} was made with other codecs than this bundle's (their checksum differs); load it with the "
            f"bundle that made it, or {WAY_OUT}"
        )


def rooms_of(bundle: Bundle, sinks: int) -> dict[str, Room]:
    """What each store of a bundle's caches can hold, with at most so many sinks."""
    rooms: dict[str, Room] = {}
    for number, layer in enumerate(bundle.made_for["layers"]):
        own = LayerGeometry(layer["kv_heads"], layer["head_dim"], None, layer.get("v_head_dim"))
        for part in PARTS:
            codec = bundle.plan.get(Site(number, part))
            head_dim = own.width_of(part) // own.kv_heads
            rooms[f"{number}.{part}"] = Room(codec, own.kv_heads, head_dim, 0 if codec is None else sinks)
    return rooms


def _padding(padding: torch.Tensor | None, seen: int) -> torch.Tensor | None:
    if padding is None:
        return None
    is_padding = padding.dtype == torch.int64 and padding.ndim == 1 and 1 <= len(padding) <= MOST_ROWS
    if not is_padding or int(padding.min()) < 0 or int(padding.max()) > seen:
        raise DamagedError("its left padding cannot be")
    return padding


def _check_length(name: str, sealed: Sealed, seen: int, layer: Any) -> None:
    length = sealed.length
    least = min(seen, layer.sliding_window - 1) if layer.is_sliding else seen
    if not least <= length <= seen:
        raise DamagedError(f"{name} holds {length} tokens of {seen}")

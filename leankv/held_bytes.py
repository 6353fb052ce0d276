"""Bytes that a cache holds, whoever wrote it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig


def held_bytes(cache: Any) -> int:
    """Bytes of the storages behind all tensors that can be reached from `cache`, each storage counted once.

    Followed are attributes, mappings and sequences; tensors that wrap others count as what they wrap. Modules (codecs,
    models) and configurations are not the cache's own.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    seen: dict[int, Any] = {}  # the things too, so that no other takes the number of one that is gone
    rest: list[Any] = [cache]
    while rest:
        thing = rest.pop()
        if id(thing) in seen or isinstance(thing, (str, bytes, type, torch.nn.Module, PreTrainedConfig)):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, torch.Tensor):
            if is_traceable_wrapper_subclass(thing):
                rest += [getattr(thing, name) for name in thing.__tensor_flatten__()[0]]
            else:
                storage = thing.untyped_storage()
                storages[thing.device, storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, Mapping):
            rest += thing.values()
        elif isinstance(thing, (list, tuple, set, frozenset)):
            rest += thing
        else:
            rest += _attributes(thing)
    return sum(storages.values())


def _attributes(thing: Any) -> Iterable[Any]:
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    found = [getattr(thing, name) for name in slots if isinstance(name, str) and hasattr(thing, name)]
    return [*getattr(thing, "__dict__", {}).values(), *found]

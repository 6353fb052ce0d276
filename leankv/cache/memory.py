"""The ruler: bytes of memory that a cache really holds, the same for ours and for those of others."""

from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig

NOT_ITS_OWN = (str, bytes, type, ModuleType, torch.nn.Module, PreTrainedConfig)
"""Kinds of things whose memory is not the cache's: text, classes, modules (codecs and models too), configurations."""


def held_bytes(cache: Any) -> int:
    """Bytes of the storages behind all tensors that can be reached from `cache`, each storage counted once.

    Followed are attributes, mappings and sequences, and what functions hold: the object of a bound method, the
    arguments of a `functools.partial`, the variables of a closure, defaults. Tensors that wrap others count as what
    they wrap. Modules (codecs, models) and configurations are not the cache's own.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    seen: dict[int, Any] = {}  # the things too, so that no other takes the number of one that is gone
    rest: list[Any] = [cache]
    while rest:
        thing = rest.pop()
        if id(thing) in seen or isinstance(thing, NOT_ITS_OWN):
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
        elif isinstance(thing, (list, tuple, set, frozenset, deque)):
            rest += thing
        else:
            rest += _attributes(thing)
            rest += _held_by_function(thing)
    return sum(storages.values())


def _attributes(thing: Any) -> Iterable[Any]:
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    found = [getattr(thing, name) for name in slots if isinstance(name, str) and hasattr(thing, name)]
    return [*getattr(thing, "__dict__", {}).values(), *found]


def _held_by_function(thing: Any) -> Iterable[Any]:
    if isinstance(thing, partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, BuiltinFunctionType):
        return [thing.__self__]
    if isinstance(thing, FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if cell != CellType()]
        return [*cells, thing.__defaults__, thing.__kwdefaults__]
    return []

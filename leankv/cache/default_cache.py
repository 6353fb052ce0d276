"""The cache that a model's `generate` makes where it is given none: one of ours in place of the stock one.

Transformers asks a method of the model for it, once settings are read, padding is found and rows are repeated for
beams. While ours is wanted, another method stands in for that one.
"""

import threading
from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch

METHOD = "_prepare_cache_for_generation"

NewCache = Callable[[torch.Tensor | None], Any]
"""Makes an empty cache for a prompt of this attention mask `[B, T]`."""

Makers = list[tuple[int, NewCache]]
"""Each with the thread that asked for it; the latest stands last."""

_in_use: WeakKeyDictionary[Any, tuple[Makers, Any]] = WeakKeyDictionary()  # and the method that a model had of its own
_changing = threading.Lock()


def make_by_default(model: Any, new_cache: NewCache) -> Callable[[], None]:
    """Have `generate` make its caches by `new_cache` where it is given none, and asked for none of another kind.

    A thread that asked for this gets the caches that it asked for last, and any other those that were asked for last.

    Returns:
        What ends it. The model is as it was once all have ended it.
    """
    owner = getattr(model, METHOD).__self__  # adapters hand on what belongs to the model that they wrap
    maker = threading.get_ident(), new_cache
    with _changing:
        if owner not in _in_use:
            _in_use[owner] = [], vars(owner).get(METHOD)
            prepare = _preparing(getattr(owner, METHOD).__func__, _in_use[owner][0])
            setattr(owner, METHOD, MethodType(prepare, owner))
        makers, before = _in_use[owner]
        makers.append(maker)

    def end() -> None:
        with _changing:
            makers.remove(maker)
            if makers:
                return
            del _in_use[owner]
            if before is None:
                delattr(owner, METHOD)
            else:
                setattr(owner, METHOD, before)

    return end


def _preparing(stock: Callable[..., Any], makers: Makers) -> Callable[..., Any]:
    """What stands in for a model's method `stock`."""

    def prepare(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *others: Any, **given: Any) -> Any:
        all_makers = tuple(makers)
        own = [maker for maker in all_makers if maker[0] == threading.get_ident()]
        is_wanted = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if all_makers and is_wanted and model_kwargs.get("past_key_values") is None:
            _, new_cache = (own or all_makers)[-1]
            cache = model_kwargs["past_key_values"] = new_cache(model_kwargs.get("attention_mask"))
            if generation_config.is_assistant:  # what it proposes may be taken back
                cache.activate_past_recording()
        return stock(model, generation_config, model_kwargs, *others, **given)

    return prepare

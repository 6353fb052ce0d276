"""Baselines: caches that someone else wrote, which `leankv compare` measures beside ours."""

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leankv.errors import UserError, first_line
from leankv.models.loading import LoadedModel
from leankv.storage.files import hash_of, hash_of_file


@dataclass(frozen=True)
class Baseline:
    """A cache that someone else wrote.

    Attributes:
        spec: as `--baseline` names it.
        method: what kind of cache it is; baselines of one method differ in rate.
        maker: package, version and settings; or the module of `module:factory` and a hash of its source. Results are
            found again by it.
        make: a configuration -> a fresh `transformers.Cache` for one batch.
    """

    spec: str
    method: str
    maker: str
    make: Callable[[Any], Any]


AXES = {"hqq": 1, "quanto": 0}
"""As transformers' documentation of the cache recommends; its defaults are 0 for both."""


def _quantized(backend: str, bits: int) -> Callable[[Any], Any]:
    """Transformers' own quantized cache: groups of 64 numbers along the axis recommended for the backend.

    The first tokens it is given are quantized at once. Later ones wait, exact, until 128 have gathered; then everything
    is quantized anew. So after whole pieces of 128 tokens nothing is exact, and in between up to 127 tokens are.
    """

    def make(config: Any) -> Any:
        from transformers import QuantizedCache

        axis = AXES[backend]
        return QuantizedCache(backend=backend, config=config, nbits=bits, axis_key=axis, axis_value=axis)

    return make


def _turboquant(preset: str) -> Callable[[Any], Any]:
    """tiny-turboquant's cache: blocks of 128 tokens are quantized once, when 256 tokens have gathered.

    So the latest 128 to 255 tokens are exact. After a block was quantized those left are a view into memory of 256.
    """

    def make(config: Any) -> Any:
        from tiny_turboquant import TinyKVCache

        layers = config.get_text_config(decoder=True).num_hidden_layers
        return TinyKVCache(compression=preset, num_hidden_layers=layers)

    return make


PRESETS = ("safe", "balanced", "compact", "aggressive")  # of tiny-turboquant 0.18

_KNOWN: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    # spec: (package, module in it, make)
    **{f"hqq:{bits}": ("hqq", "hqq", _quantized("hqq", bits)) for bits in (4, 2)},
    **{f"quanto:{bits}": ("optimum-quanto", "optimum.quanto", _quantized("quanto", bits)) for bits in (4, 2)},
    **{f"turboquant:{preset}": ("tiny-turboquant", "tiny_turboquant", _turboquant(preset)) for preset in PRESETS},
}

BASELINES = tuple(_KNOWN)
"""What `--baseline all` stands for."""


def find_baselines(texts: Sequence[str]) -> list[Baseline]:
    """Baselines as `--baseline` names them: one of `BASELINES`, `all` of them, or `module:factory` of any other.

    Raises:
        UserError: unknown, or the package of one is missing.
    """
    wanted = [spec for text in texts for spec in (BASELINES if text == "all" else (text,))]
    return [_known(spec) if spec in _KNOWN else _other(spec) for spec in dict.fromkeys(wanted)]


def _known(spec: str) -> Baseline:
    package, module, make = _KNOWN[spec]
    parent = module.partition(".")[0]
    if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
        raise UserError(
            f"the baseline {spec} needs the package {package}; install it with: pip install 'leankv[baselines]'"
        )
    method = spec.partition(":")[0]
    settings = f", axis {AXES[method]}" if AXES.get(method) else ""  # where it is not the default
    return Baseline(spec, method, f"{package} {importlib.metadata.version(package)}{settings}", make)


def _other(spec: str) -> Baseline:
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise UserError(f"the baseline {spec!r} is none of all, {', '.join(BASELINES)}, nor of the form module:factory")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the baseline {spec} cannot be imported: {error}; see that its module is on PYTHONPATH"
        ) from error
    if not callable(make):
        raise UserError(f"the baseline {spec} is no function; name one that makes a cache of a model's configuration")
    return Baseline(spec, name, f"{module}, source {_source_hash(spec, module, make)[:12]}", make)


def _source_hash(spec: str, module: str, make: Any) -> str:
    """sha256 of the file of `module`, and of that in which the factory is defined if it is another.

    What these import in turn is not looked at: a baseline that changes there is to be given another name.

    Raises:
        UserError: there is no such file.
    """
    defined = inspect.unwrap(make)
    while isinstance(defined, functools.partial):
        defined = defined.func
    owner = getattr(defined, "__module__", None) or module
    files = [getattr(sys.modules.get(name), "__file__", None) for name in dict.fromkeys([module, owner])]
    if not all(files):
        raise UserError(
            f"the source of the baseline {spec} cannot be read, so that its figures could not be told from those of "
            "another version; put the factory in a module that is a file"
        )
    return hash_of([hash_of_file(Path(file)) for file in files if file])


@torch.no_grad()
def try_baseline(baseline: Baseline, loaded: LoadedModel, tokens: torch.Tensor, chunk: int) -> None:
    """Feed a fresh cache two chunks: what does not run on this model or machine is known before long passes.

    Args:
        baseline: the cache.
        loaded: the model.
        tokens: `[1, T]`.
        chunk: tokens fed at a time.

    Raises:
        UserError: it fails, or what comes out is not finite.
    """
    try:
        cache = baseline.make(loaded.model.config)
        for piece in tokens[:, : 2 * chunk].to(loaded.model.device).split(chunk, dim=1):
            states = loaded.model.base_model(input_ids=piece, past_key_values=cache, use_cache=True)[0]
    except Exception as error:  # whatever code of others raises
        reason = first_line(error)
        raise UserError(
            f"the cache of baseline {baseline.spec} does not run on this model: {type(error).__name__}: {reason}; "
            "leave it out"
        ) from error
    if not torch.isfinite(states).all():
        raise UserError(
            f"the cache of baseline {baseline.spec} gives numbers that are not finite on this model; leave it out"
        )

"""LeanKV: how far can a model's KV cache be compressed, where, and at what price?

`import leankv` is cheap; torch and transformers are imported when a name that needs them is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from leankv.version import __version__

if TYPE_CHECKING:
    from leankv.api import Cache as Cache
    from leankv.api import LayerVectors as LayerVectors
    from leankv.api import PerplexityReport as PerplexityReport
    from leankv.api import capture as capture
    from leankv.api import compressed as compressed
    from leankv.api import fit as fit
    from leankv.api import load as load
    from leankv.api import perplexity as perplexity
    from leankv.api import sweep as sweep
    from leankv.cache.bundle import Bundle as Bundle
    from leankv.cache.lean_cache import LeanCache as LeanCache
    from leankv.cache.plan import PlanSpec as PlanSpec
    from leankv.cache.saved_cache import load_cache as load_cache
    from leankv.codecs import Codec as Codec
    from leankv.codecs import FitData as FitData
    from leankv.codecs import Recipe as Recipe
    from leankv.codecs import register as register
    from leankv.config.experiment import ModelConfig as ModelConfig
    from leankv.errors import UserError as UserError
    from leankv.evaluation.prefix_store import PrefixStore as PrefixStore
    from leankv.models.loading import load_model as load_model

_HOME = {
    **dict.fromkeys(
        ("Cache", "LayerVectors", "PerplexityReport", "capture", "compressed", "fit", "load", "perplexity", "sweep"),
        "leankv.api",
    ),
    **dict.fromkeys(("Codec", "FitData", "Recipe", "register"), "leankv.codecs"),
    "Bundle": "leankv.cache.bundle",
    "LeanCache": "leankv.cache.lean_cache",
    "ModelConfig": "leankv.config.experiment",
    "PlanSpec": "leankv.cache.plan",
    "PrefixStore": "leankv.evaluation.prefix_store",
    "UserError": "leankv.errors",
    "load_cache": "leankv.cache.saved_cache",
    "load_model": "leankv.models.loading",
}
__all__ = [
    "Bundle",
    "Cache",
    "Codec",
    "FitData",
    "LayerVectors",
    "LeanCache",
    "ModelConfig",
    "PerplexityReport",
    "PlanSpec",
    "PrefixStore",
    "Recipe",
    "UserError",
    "__version__",
    "capture",
    "compressed",
    "fit",
    "load",
    "load_cache",
    "load_model",
    "perplexity",
    "register",
    "sweep",
]


def __dir__() -> list[str]:
    """What a notebook offers behind `leankv.`: names that are imported when they are first asked for, too."""
    return __all__


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'leankv' has no attribute {name!r}")

"""LeanKV: how far can a model's KV cache be compressed, where, and at what price?

`import leankv` is cheap; torch and transformers are imported when a name that needs them is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leankv.cache import LeanCache as LeanCache
    from leankv.errors import UserError as UserError
    from leankv.experiment import ModelConfig as ModelConfig
    from leankv.model import load_model as load_model

__version__ = "0.1.0"
_HOME = {
    "LeanCache": "leankv.cache",
    "ModelConfig": "leankv.experiment",
    "UserError": "leankv.errors",
    "load_model": "leankv.model",
}
__all__ = ["LeanCache", "ModelConfig", "UserError", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'leankv' has no attribute {name!r}")

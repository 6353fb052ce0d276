"""Codecs: how vectors are coded. Each file beside this one that defines a family registers it as it is imported."""

import importlib
import pkgutil

from leankv.codecs.base import Codec, Factored, FitData, Recipe, TrainingSettings
from leankv.codecs.code import Code
from leankv.codecs.registry import FAMILIES, codec_from_tensors, parse_recipe, register
from leankv.codecs.statistics import fraction_of_variance_unexplained

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "FAMILIES",
    "Code",
    "Codec",
    "Factored",
    "FitData",
    "Recipe",
    "TrainingSettings",
    "codec_from_tensors",
    "fraction_of_variance_unexplained",
    "parse_recipe",
    "register",
]

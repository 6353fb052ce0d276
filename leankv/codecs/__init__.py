"""Codecs: how vectors are coded."""

from leankv.codecs import families
from leankv.codecs.base import Codec, Factored, FitData, Recipe, TrainingSettings
from leankv.codecs.code import Code
from leankv.codecs.registry import FAMILIES, codec_from_tensors, parse_recipe, register
from leankv.codecs.statistics import fraction_of_variance_unexplained

__all__ = [
    "FAMILIES",
    "Code",
    "Codec",
    "Factored",
    "FitData",
    "Recipe",
    "TrainingSettings",
    "codec_from_tensors",
    "families",
    "fraction_of_variance_unexplained",
    "parse_recipe",
    "register",
]

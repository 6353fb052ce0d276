"""Codec families. A spec such as `ae:4` names a family and its arguments; see `FAMILIES`."""

from leankv.codecs.autoencoder import Autoencoder
from leankv.codecs.base import Code, Codec, TrainingSettings, fraction_of_variance_unexplained
from leankv.codecs.identity import Identity
from leankv.codecs.integers import Integers
from leankv.codecs.mean import Mean
from leankv.codecs.nonuniform import NonUniform
from leankv.codecs.orthogonal import Orthogonal
from leankv.codecs.pca import PCA
from leankv.codecs.product import ProductQuantizer
from leankv.codecs.residual import Residual
from leankv.codecs.rotated import Rotated
from leankv.codecs.sparse import Sparse
from leankv.codecs.spec import FAMILIES, CodecSpec, codec_from_tensors, parse_spec

__all__ = [
    "FAMILIES",
    "PCA",
    "Autoencoder",
    "Code",
    "Codec",
    "CodecSpec",
    "Identity",
    "Integers",
    "Mean",
    "NonUniform",
    "Orthogonal",
    "ProductQuantizer",
    "Residual",
    "Rotated",
    "Sparse",
    "TrainingSettings",
    "codec_from_tensors",
    "fraction_of_variance_unexplained",
    "parse_spec",
]

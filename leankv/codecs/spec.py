"""Reading codec specs: `FAMILY` or `FAMILY:ARGUMENTS`, e.g. `mean`, `pca:8`, `ae:4x128`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from leankv.codecs.autoencoder import Autoencoder
from leankv.codecs.base import Codec
from leankv.codecs.identity import Identity
from leankv.codecs.mean import Mean
from leankv.codecs.pca import PCA
from leankv.errors import UserError

FAMILIES: dict[str, type[Codec]] = {family.family: family for family in (Autoencoder, PCA, Mean, Identity)}


@dataclass(frozen=True)
class CodecSpec:
    """A parsed spec: a family and its arguments."""

    text: str
    family: type[Codec]
    arguments: tuple[Any, ...]

    def check_width(self, width: int) -> None:
        """Refuse arguments that do not suit vectors of `width` numbers.

        Raises:
            UserError: e.g. more latent dimensions than the vector has.
        """
        try:
            self.family.check_width(self.arguments, width)
        except ValueError as error:
            raise UserError(f"codec {self.text!r} does not suit this model: {error}") from error


def parse_spec(text: str) -> CodecSpec:
    """Read a spec.

    Raises:
        UserError: unknown family or malformed arguments; the sentence shows the grammar.
    """
    name, colon, arguments = text.strip().partition(":")
    family = FAMILIES.get(name)
    try:
        if family is None or (colon and not arguments):
            raise ValueError
        return CodecSpec(text.strip(), family, family.parse_arguments(arguments))
    except ValueError as error:
        grammar = ", ".join(known.grammar for known in FAMILIES.values())
        raise UserError(f"codec {text!r} is not understood; write {grammar}, or none (numbers from 1)") from error


def codec_from_tensors(spec: str, width: int, tensors: Mapping[str, torch.Tensor]) -> Codec:
    """A fitted codec from its saved state dict; dtypes are those of `tensors`.

    Raises:
        ValueError: names or shapes are not those that the spec has at this width; the message names the tensor.
    """
    parsed = parse_spec(spec)
    codec = parsed.family.empty(parsed.arguments, width)
    for name, expected in codec.state_dict().items():
        if name not in tensors:
            raise ValueError(f"{name} is missing")
        if tensors[name].shape != expected.shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, but {spec} has {tuple(expected.shape)}")
    if extra := set(tensors) - set(codec.state_dict()):
        raise ValueError(f"{min(extra)} does not belong to {spec}")
    codec.load_state_dict(dict(tensors), strict=True, assign=True)
    return codec.requires_grad_(False)

"""Reading codec specs: `FAMILY`, `FAMILY:ARGUMENTS` or `FAMILY(SPEC,SPEC)`, e.g. `pca:8`, `resid(pca:8,int:2)`."""

import hashlib
import importlib
import inspect
import itertools
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from leankv.codecs.base import Codec
from leankv.errors import UserError


def _families() -> Iterator[type[Codec]]:
    """Every codec that a file beside this one defines."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != "spec":
            for thing in vars(importlib.import_module(f"leankv.codecs.{module.name}")).values():
                if isinstance(thing, type) and issubclass(thing, Codec) and hasattr(thing, "family"):
                    yield thing


FAMILIES: dict[str, type[Codec]] = {family.family: family for family in sorted(_families(), key=lambda f: f.family)}

MOST_NESTED = 8  # assumption: codecs behind codecs that anyone wants; deeper ones are mistakes, or mischief
SHOWN = 80  # characters of a spec that a sentence shows


@dataclass(frozen=True)
class CodecSpec:
    """A parsed spec: a family and its arguments, by which specs are compared; `ae:4` and `ae:4x128` are one."""

    text: str = field(compare=False)
    family: type[Codec]
    arguments: tuple[Any, ...]
    """As the family's `parse_arguments` gives them; of a nested family, the specs in it as `CodecSpec`."""

    def revisions(self) -> dict[str, int | str]:
        """family -> its revision (or a hash of its file, where it has none), of this spec and of those in it."""
        found: dict[str, int | str] = {self.family.family: self.family.revision or _source_hash(self.family)}
        for argument in self.arguments:
            if isinstance(argument, CodecSpec):
                found |= argument.revisions()
        return found

    def check_width(self, width: int) -> None:
        """Refuse arguments that do not suit vectors of `width` numbers.

        Raises:
            UserError: e.g. more latent dimensions than the vector has.
        """
        try:
            self.family.check_width(self.arguments, width)
        except ValueError as error:
            raise UserError(f"codec {self.text!r} does not suit this model: {error}") from error


def _source_hash(family: type[Codec]) -> str:
    return hashlib.sha256(Path(inspect.getfile(family)).read_bytes()).hexdigest()[:16]


def parse_spec(text: str) -> CodecSpec:
    """Read a spec.

    Raises:
        UserError: unknown family or malformed arguments (the sentence shows the family's grammar, or all), or nested
            too deep.
    """
    shown = repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
    if _nesting(text) > MOST_NESTED:
        raise UserError(f"codec {shown} is nested more than {MOST_NESTED} deep; write a simpler one")
    name = re.split(r"[:(]", text.strip())[0]
    family = FAMILIES.get(name)
    try:
        if family is None:
            raise ValueError
        match = re.fullmatch(r"\((.+)\)" if family.nested else r"(?::(.+))?", text.strip().removeprefix(name))
        if match is None:
            raise ValueError
        arguments = family.parse_arguments(match[1] or "")
    except ValueError as error:
        grammar = family.grammar if family else "; ".join(known.grammar for known in FAMILIES.values()) + "; or none"
        raise UserError(f"codec {shown} is not understood; write {grammar}") from error
    return CodecSpec(text.strip(), family, tuple(map(parse_spec, arguments)) if family.nested else arguments)


def _nesting(text: str) -> int:
    """How deep parentheses stand in each other."""
    return max(itertools.accumulate(((letter == "(") - (letter == ")") for letter in text), initial=0))


def unfitted(parsed: CodecSpec, width: int) -> Codec:
    """An unfitted codec on the `meta` device: names, shapes and dtypes of its tensors, which take no memory.

    Raises:
        ValueError: the arguments do not suit the width, or are beyond all sizes of tensors.
    """
    parsed.family.check_width(parsed.arguments, width)
    try:
        with torch.device("meta"):
            return parsed.family.empty(parsed.arguments, width)
    except (RuntimeError, TypeError) as error:  # what torch says of sizes beyond 64 bits
        raise ValueError(f"no tensors are as large as those of {parsed.text}") from error


def codec_from_tensors(spec: str, width: int, tensors: Mapping[str, torch.Tensor]) -> Codec:
    """A fitted codec from its saved state dict; dtypes are those of `tensors`.

    Raises:
        ValueError: names or shapes are not those that the spec has at this width; the message names the tensor.
    """
    codec = unfitted(parse_spec(spec), width)
    for name, expected in codec.state_dict().items():
        if name not in tensors:
            raise ValueError(f"{name} is missing")
        if tensors[name].shape != expected.shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, but {spec} has {tuple(expected.shape)}")
    if extra := set(tensors) - set(codec.state_dict()):
        raise ValueError(f"{min(extra)} does not belong to {spec}")
    codec.load_state_dict(dict(tensors), strict=True, assign=True)
    return codec.requires_grad_(False)

"""The families that are known by name, and the reading of recipes: `ae:4`, `resid(pca:8,int:2)`, `module:Recipe:4`."""

import importlib
import itertools
import re
from collections.abc import Mapping
from typing import TypeVar

import torch

from leankv.codecs.base import Codec, Recipe, Shapes
from leankv.errors import UserError

FAMILIES: dict[str, type[Recipe]] = {}
"""By name. Importing `leankv.codecs` fills it with the families whose files stand there."""

MOST_NESTED = 8  # assumption: codecs behind codecs that anyone wants; deeper ones are mistakes, or mischief
SHOWN = 80  # characters of a recipe that a sentence shows

OUTSIDE = re.compile(r"(^|[(,])(\s*)([A-Za-z_][\w.]*):([A-Za-z_]\w*)(?=[:(),]|\s*$)")
"""`module:Recipe` wherever a recipe may begin; `ae:x` looks like it too, but `ae` is a family."""

RecipeType = TypeVar("RecipeType", bound=type)


def register(recipe: RecipeType) -> RecipeType:
    """Make a family known by its name; a decorator of its recipe's class.

    A class may be registered again, and be defined again where it was (a notebook cell that is run twice).

    Raises:
        UserError: it is no recipe, or its name is taken by another class, or no recipe could be written with it.
    """
    if not isinstance(recipe, type) or not issubclass(recipe, Recipe):
        raise UserError(f"{recipe!r} cannot be registered as a codec family: it is no subclass of leankv.codecs.Recipe")
    name = getattr(recipe, "family", None)
    if not isinstance(name, str) or re.fullmatch(r"\w[\w.-]*", name) is None or name == "none":
        raise UserError(f"{recipe.__name__} needs a `family`, the name that its recipes begin with, not {name!r}")
    known = FAMILIES.get(name, recipe)
    if (known.__module__, known.__qualname__) != (recipe.__module__, recipe.__qualname__):
        raise UserError(
            f"the codec family {name} is {known.__module__}.{known.__qualname__} already; give "
            f"{recipe.__module__}.{recipe.__qualname__} another name"
        )
    FAMILIES[name] = recipe
    return recipe


def register_by_name(text: str) -> type[Recipe]:
    """Import `module:Recipe`, as a person wrote it, and register its class.

    Raises:
        UserError: it is not of this form, cannot be imported, or cannot be registered.
    """
    named = OUTSIDE.fullmatch(text)
    if named is None:
        raise UserError(f"--register {_shown(text)} is not understood; write module:Recipe, such as lab:SignRecipe")
    return _import_and_register(*named.groups()[2:])


def parse_recipe(text: str) -> Recipe:
    """Read a recipe that a person wrote.

    `module:Recipe` and `module:Recipe:ARGUMENTS` import the module and register its class.

    Raises:
        UserError: unknown family or malformed arguments (the sentence shows the family's grammar, or all), nested too
            deep, or a module that has no such recipe.
    """
    _refuse_nesting(text)
    return known_recipe(OUTSIDE.sub(_registered, text))


def known_recipe(text: str) -> Recipe:
    """Read a recipe of families that are known, and import nothing: what stands in a file is not to be trusted.

    Raises:
        UserError: as `parse_recipe`.
    """
    _refuse_nesting(text)
    text = text.strip()
    name = re.split(r"[:(]", text)[0]
    family = FAMILIES.get(name)
    try:
        if family is None:
            raise ValueError
        match = re.fullmatch(r"\((.+)\)" if family.nested else r"(?::(.+))?", text.removeprefix(name))
        if match is None:
            raise ValueError
        return family.parse(match[1] or "")
    except UserError:  # of a recipe in this one, which it names
        raise
    except ValueError as error:
        every = "; ".join(FAMILIES[known].grammar for known in sorted(FAMILIES)) + "; or none"
        grammar = family.grammar if family else every
        raise UserError(f"codec {_shown(text)} is not understood; write {grammar}") from error


def split_recipes(text: str) -> list[str]:
    """Recipes that stand behind each other, cut at the commas outside of parentheses: `a,resid(b,c)` -> two.

    Raises:
        ValueError: a parenthesis is not closed, or closed before it is opened.
    """
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            raise ValueError
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    if depth:
        raise ValueError
    return [piece.strip() for piece in pieces]


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def _refuse_nesting(text: str) -> None:
    depths = itertools.accumulate(((letter == "(") - (letter == ")") for letter in text), initial=0)
    if max(depths) > MOST_NESTED:
        raise UserError(f"codec {_shown(text)} is nested more than {MOST_NESTED} deep; write a simpler one")


def _registered(found: re.Match[str]) -> str:
    """`module:Recipe` as the name of the family that it is registered as; what begins with a family as it was."""
    before, space, module, name = found.groups()
    return found[0] if module in FAMILIES else f"{before}{space}{_import_and_register(module, name).family}"


def _import_and_register(module: str, name: str) -> type[Recipe]:
    try:
        recipe = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"codec {_shown(f'{module}:{name}')} is not understood: no family is called {module}, and no {name} can be "
            f"imported from a module {module} ({error}); check the name, or where Python looks for modules"
        ) from error
    registered: type[Recipe] = register(recipe)
    return registered


def unfitted(recipe: Recipe, width: int, shapes: Shapes) -> Codec:
    """An unfitted codec on the `meta` device: names, shapes and dtypes of its tensors, which take no memory.

    Sizes that fitting chooses are those that `shapes` show, as far as they may be; see `Recipe.shaped`.

    Raises:
        ValueError: the recipe does not suit the width, or is beyond all sizes of tensors.
    """
    recipe.check_width(width)
    try:
        with torch.device("meta"):
            return recipe.shaped(width, shapes)
    except (RuntimeError, TypeError) as error:  # what torch says of sizes beyond 64 bits
        raise ValueError(f"no tensors are as large as those of {recipe.text}") from error


def codec_from_tensors(text: str, width: int, tensors: Mapping[str, torch.Tensor]) -> Codec:
    """A fitted codec from its recipe's text and its saved state dict; dtypes are those of `tensors`.

    Raises:
        UserError: the recipe is of no family that is known; nothing is imported for it.
        ValueError: names or shapes are not those that the recipe has at this width; the message names the tensor.
    """
    codec = unfitted(known_recipe(text), width, {name: tensor.shape for name, tensor in tensors.items()})
    for name, expected in codec.state_dict().items():
        if name not in tensors:
            raise ValueError(f"{name} is missing")
        if tensors[name].shape != expected.shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, but {text} has {tuple(expected.shape)}")
    if extra := set(tensors) - set(codec.state_dict()):
        raise ValueError(f"{min(extra)} does not belong to {text}")
    codec.load_state_dict(dict(tensors), strict=True, assign=True)
    return codec.requires_grad_(False)

"""How a plan is written in YAML and JSON: one recipe where all layers are alike, a table where they are not.

    plan: transform:s0.02

    plan:
      k: int:4
      v: transform:s0.02
      layers:
        0-1: {k: none}
        28: int:4

Recipes are only text here; `leankv.cache.plan.PlanSpec` reads them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from leankv.config.notation import parse_layers
from leankv.errors import UserError

PlanTable = str | Mapping[str, Any]
"""A recipe, or a table with `k`, `v` and `layers`."""
EXACT = "none"
"""What stands for leaving a part as it is."""
Part = Literal["k", "v"]
PARTS: tuple[Part, ...] = ("k", "v")


def plan_table(written: Any, where: str = "plan") -> str | dict[str, Any]:
    """A plan as it was written, checked for its form and brought to its shortest.

    Args:
        written: what YAML or JSON gave. `null` says the same as `none`; a part that is not named stays exact.
        where: names it in sentences.

    Raises:
        UserError: an entry is unknown, or something else than a recipe stands where one should.
    """
    if not isinstance(written, Mapping):
        return _recipe(written, where)
    _check_entries(written, (*PARTS, "layers"), where)
    own: dict[str, Any] = {part: _recipe(written.get(part), f"{where}.{part}") for part in PARTS}
    layers = written.get("layers") or {}
    if not isinstance(layers, Mapping):
        raise UserError(f"{where}.layers must be a table such as {{0-3: int:4}}, not {layers!r}")
    named = {str(numbers): _layer(recipe, f"{where}.layers.{numbers}") for numbers, recipe in layers.items()}
    for numbers in named:
        if numbers == "all":
            raise UserError(f"{where}.layers names all layers; write what they get as {where}.k and {where}.v")
        parse_layers(numbers, option=f"{where}.layers")
    if named:
        return {**own, "layers": named}
    return own["k"] if own["k"] == own["v"] else own


def read_plan_table(path: Path) -> str | dict[str, Any]:
    """A plan from a JSON file.

    Raises:
        UserError: the file is missing, or holds something else.
    """
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the plan {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the plan {path} is not valid JSON ({error})") from error
    return plan_table(written, str(path))


def with_part(table: PlanTable, part: str, recipe: Any) -> str | dict[str, Any]:
    """The plan with another recipe for one part of all layers, those that are named among them."""
    if isinstance(table, str):
        return plan_table({**dict.fromkeys(PARTS, table), part: recipe})
    layers = {}
    for numbers, own in table.get("layers", {}).items():
        recipes = dict.fromkeys(PARTS, own) if isinstance(own, str) else own
        if others := {name: each for name, each in recipes.items() if name != part}:
            layers[numbers] = others
    return plan_table({**table, part: recipe, "layers": layers})


def recipes_by_layer(table: PlanTable, n_layers: int) -> list[dict[Part, str]]:
    """What each layer of a model gets: part -> recipe, `none` included."""
    if isinstance(table, str):
        return [dict.fromkeys(PARTS, table) for _ in range(n_layers)]
    layers: list[dict[Part, str]] = [{part: table[part] for part in PARTS} for _ in range(n_layers)]
    for numbers, own in table.get("layers", {}).items():
        for layer in parse_layers(numbers, n_layers):
            layers[layer].update(dict.fromkeys(PARTS, own) if isinstance(own, str) else own)
    return layers


def compresses_nothing(table: PlanTable) -> bool:
    """Whether all that it names stays exact."""
    if isinstance(table, str):
        return table == EXACT
    own = [table[part] for part in PARTS] + list(table.get("layers", {}).values())
    return all(
        compresses_nothing({**dict.fromkeys(PARTS, EXACT), **each} if isinstance(each, Mapping) else each)
        for each in own
    )


def _layer(recipe: Any, where: str) -> str | dict[str, str]:
    """What stands behind some layers: a recipe for both parts, or one for each that is named."""
    if not isinstance(recipe, Mapping):
        return _recipe(recipe, where)
    _check_entries(recipe, PARTS, where)
    return {part: _recipe(own, f"{where}.{part}") for part, own in recipe.items()}


def _recipe(value: Any, where: str) -> str:
    if value is None:
        return EXACT
    if not isinstance(value, str):
        raise UserError(f"{where} must be a recipe such as int:4, or none, not {value!r}")
    return value.strip()


def _check_entries(table: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := [key for key in table if key not in known]:
        raise UserError(f"{where} has no entry {unknown[0]!r}; there are {', '.join(known)}")

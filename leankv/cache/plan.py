"""Plans: which recipe each layer's keys and values get (`PlanSpec`), and which fitted codec (`Plan`)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from leankv.codecs import Codec, Recipe, parse_recipe
from leankv.config.notation import format_layers, parse_layers
from leankv.config.plan_table import EXACT, PARTS, PlanTable, plan_table, read_plan_table
from leankv.errors import UserError
from leankv.storage.files import hash_of

SHORT = 60  # characters of a plan that a table shows whole


class Site(NamedTuple):
    """One part (`k` or `v`) of one layer."""

    layer: int
    part: str


Plan = Mapping[Site, Codec]
"""Site -> its fitted codec. What is not named stays exact."""


@dataclass(frozen=True)
class PlanSpec:
    """Which recipe each site gets: one for all keys, one for all values, and what differs from these.

    A plan is a value: hashable, compared by what it says, and the same when it is written as JSON and read back. Its
    layers are counted from 0; it does not know how many there are, until `resolved` or `sites` are told.

    Attributes:
        k: recipe of the keys of all layers that are not named; None leaves them exact.
        v: the same of the values.
        exceptions: sites that differ, sorted, each with its recipe or None.
    """

    k: Recipe | None = None
    v: Recipe | None = None
    exceptions: tuple[tuple[Site, Recipe | None], ...] = ()

    def __post_init__(self) -> None:
        for part in PARTS:
            object.__setattr__(self, part, _recipe(getattr(self, part)))
        # Two plans that say the same are equal, whatever they were made of.
        differing = {site: recipe for site, recipe in self.exceptions if recipe != getattr(self, site.part)}
        object.__setattr__(self, "exceptions", tuple(sorted(differing.items(), key=lambda item: item[0])))

    @classmethod
    def uniform(
        cls, recipe: str | Recipe | None = None, *, k: str | Recipe | None = None, v: str | Recipe | None = None
    ) -> "PlanSpec":
        """One recipe for the keys and values of all layers, or one for each part.

        Args:
            recipe: of both parts; `k` and `v` go before it.
            k: of keys, as text (`int:4`, `none`) or as a value.
            v: of values.

        Raises:
            UserError: a recipe is not understood.
        """
        return cls(_recipe(recipe if k is None else k), _recipe(recipe if v is None else v))

    @classmethod
    def parse(cls, table: PlanTable) -> "PlanSpec":
        """A plan from the form that YAML and JSON have.

        Raises:
            UserError: a key is none of `k`, `v`, `layers`, layers are not understood, or a recipe is not.
        """
        checked = plan_table(table)
        if isinstance(checked, str):
            return cls.uniform(checked)
        spec = cls.uniform(k=checked["k"], v=checked["v"])
        for layers, own in checked.get("layers", {}).items():
            spec = spec.with_layers(
                parse_layers(layers), **(dict.fromkeys(PARTS, own) if isinstance(own, str) else own)
            )
        return spec

    def with_layers(
        self, layers: Iterable[int], *, k: str | Recipe | None = None, v: str | Recipe | None = None
    ) -> "PlanSpec":
        """The plan with other recipes in some layers.

        Args:
            layers: which.
            k: of their keys; `"none"` leaves them exact, and None (not given) as they were.
            v: of their values, likewise.

        Raises:
            UserError: a recipe is not understood.
        """
        given = {part: _recipe(own) for part, own in zip(PARTS, (k, v), strict=True) if own is not None}
        return self.with_sites({Site(layer, part): recipe for layer in layers for part, recipe in given.items()})

    def with_sites(self, recipes: Mapping[Site, Recipe | None]) -> "PlanSpec":
        """The plan with other recipes at some sites; None leaves a site exact."""
        named = {Site(*site): recipe for site, recipe in recipes.items()}
        return replace(self, exceptions=tuple((self._named | named).items()))

    def only(self, layers: Iterable[int], parts: Sequence[str] = PARTS) -> "PlanSpec":
        """The plan in these layers and parts, all else exact."""
        sites = [Site(layer, part) for layer in layers for part in parts]
        return PlanSpec(exceptions=tuple((site, self[site]) for site in sites))

    def resolved(self, n_layers: int) -> "PlanSpec":
        """The same plan for a model of `n_layers` layers, every site that is not exact named.

        Raises:
            UserError: it names a layer that the model has not.
        """
        if beyond := [site.layer for site, _ in self.exceptions if not 0 <= site.layer < n_layers]:
            raise UserError(
                f"the plan names layer {beyond[0]}, but the model has layers 0 to {n_layers - 1}; leave it out"
            )
        return self.only(range(n_layers))

    def sites(self, n_layers: int) -> dict[Site, Recipe]:
        """The sites that are compressed in a model of `n_layers` layers, in order, with their recipes.

        Raises:
            UserError: as `resolved`.
        """
        return {site: recipe for site, recipe in self.resolved(n_layers).exceptions if recipe is not None}

    def __getitem__(self, site: tuple[int, str]) -> Recipe | None:
        site = Site(*site)
        found: Recipe | None = self._named[site] if site in self._named else getattr(self, site.part)
        return found

    @cached_property
    def _named(self) -> dict[Site, Recipe | None]:
        return dict(self.exceptions)

    def recipes(self) -> Iterator[Recipe]:
        """Every recipe that it names, once."""
        named = [self.k, self.v, *(recipe for _, recipe in self.exceptions)]
        yield from dict.fromkeys(recipe for recipe in named if recipe is not None)

    def is_alike(self, n_layers: int) -> bool:
        """Whether all layers of a model of `n_layers` layers get the same."""
        return len({(self[layer, "k"], self[layer, "v"]) for layer in range(n_layers)}) == 1

    @property
    def is_uniform(self) -> bool:
        """Whether all layers are treated alike."""
        return not self.exceptions

    def table(self) -> str | dict[str, Any]:
        """The plan as YAML and JSON write it, as `parse` reads it; layers that are alike stand together."""
        k, v = _written(self.k), _written(self.v)
        if self.is_uniform:
            return k if k == v else {"k": k, "v": v}
        by_layer: dict[int, dict[str, str]] = {}
        for site, recipe in self.exceptions:
            by_layer.setdefault(site.layer, {})[site.part] = _written(recipe)
        groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for layer, own in by_layer.items():
            groups.setdefault(tuple(own.items()), []).append(layer)
        layers = {format_layers(members): _short(dict(own)) for own, members in groups.items()}
        return {"k": k, "v": v, "layers": layers}

    def key(self) -> str:
        """sha256 (hex) of what it says, the revisions of its families included."""
        revisions: dict[str, int | str] = {}
        for recipe in self.recipes():
            revisions |= recipe.revisions()
        return hash_of({"plan": self.table(), "revisions": revisions})

    def in_short(self, n_layers: int) -> str:
        """A few words: the recipe of layers that are compressed alike, or how many sites get which families."""
        sites = self.sites(n_layers)
        alike = {(self[layer, "k"], self[layer, "v"]) for layer, _ in sites}
        if len(alike) == 1:
            return str(PlanSpec(*alike.pop()))
        text = str(self)
        if len(text) <= SHORT:
            return text
        counts: dict[str, int] = {}
        for recipe in sites.values():
            counts[recipe.method] = counts.get(recipe.method, 0) + 1
        return ", ".join(f"{name} at {count} of {2 * n_layers} sites" for name, count in counts.items())

    def __str__(self) -> str:
        """In one line: `ae:4`, `k=int:4 v=ae:4`, `ae:4, but layers 0-1: k=int:4`."""
        default = _line({"k": _written(self.k), "v": _written(self.v)})
        table = self.table()
        if isinstance(table, str) or "layers" not in table:
            return default
        rest = "; ".join(f"layers {layers}: {_line(own)}" for layers, own in table["layers"].items())
        return f"{default}, but {rest}" if self.k or self.v else rest


def read_plan(path: Path) -> PlanSpec:
    """A plan from a JSON file.

    Raises:
        UserError: the file is missing, or holds something else.
    """
    return PlanSpec.parse(read_plan_table(path))


def _recipe(given: str | Recipe | None) -> Recipe | None:
    if isinstance(given, str):
        return None if given.strip() == EXACT else parse_recipe(given)
    if given is not None and not isinstance(given, Recipe):
        raise UserError(f"{given!r} is no recipe; write one such as 'int:4', or 'none'")
    return given


def _written(recipe: Recipe | None) -> str:
    return EXACT if recipe is None else recipe.text


def _short(own: dict[str, str]) -> str | dict[str, str]:
    return own["k"] if own.keys() == set(PARTS) and own["k"] == own["v"] else own


def _line(own: str | Mapping[str, str]) -> str:
    if isinstance(own, str):
        return own
    return own["k"] if own.get("k") == own.get("v") else " ".join(f"{part}={text}" for part, text in own.items())


def codecs_by_layer(plan: Plan) -> dict[int, dict[str, Codec]]:
    """layer -> part -> codec, of the layers that a plan compresses."""
    found: dict[int, dict[str, Codec]] = {}
    for (layer, part), codec in plan.items():
        found.setdefault(layer, {})[part] = codec
    return found

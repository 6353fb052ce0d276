"""What a search of plans chooses from, in numbers: every site's recipes with their bytes and errors."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from leankv.cache.footprint import Footprint
from leankv.cache.plan import PlanSpec, Site
from leankv.codecs import Recipe, parse_recipe
from leankv.config.experiment import SelectionConfig
from leankv.config.notation import parse_bytes, parse_sites
from leankv.config.plan_table import EXACT, PARTS
from leankv.config.presets import LADDERS, RATE_LADDERS
from leankv.errors import UserError
from leankv.evaluation.cache_bytes import codec_memory
from leankv.models.geometry import BYTES_16_BIT
from leankv.search.plan_space import Option, PlanSpace, ladder, not_beaten
from leankv.studies.codec_store import CodecStore, StoredCodec
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.workspace import Workspace


def search_recipes(text: str, error_metric: str) -> list[Recipe]:
    """The recipes that `--recipes` names: families stand for their usual rates.

    Raises:
        UserError: one is not understood.
    """
    families = LADDERS if error_metric == "gradient" else LADDERS | RATE_LADDERS
    recipes: list[Recipe] = []
    for piece in _pieces(text):
        recipes += [parse_recipe(each) for each in families.get(piece.replace(" ", ""), (piece,))]
    return list(dict.fromkeys(recipes))


def _pieces(text: str) -> list[str]:
    """The text cut at the commas that stand outside of parentheses."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces if piece.strip()]


def search_sites(workspace: Workspace, selection: SelectionConfig) -> list[Site]:
    """The sites that may be compressed, in order.

    Raises:
        UserError: `selection.sites` does not parse, or names what the model has not, or nothing is left.
    """
    named = parse_sites(selection.sites, workspace.n_layers, PARTS)
    allowed = set(workspace.layers)
    sites = sorted(Site(layer, part) for layer, part in named if layer in allowed)
    if not sites:
        raise UserError("selection.sites and layers leave nothing to compress; name more of them")
    return sites


def fit_ladders(codecs: CodecStore, sites: Sequence[Site], recipes: Sequence[Recipe]) -> None:
    """See that every recipe is fitted at every site."""
    codecs.fit([PlanSpec().with_sites(dict.fromkeys(sites, recipe)) for recipe in recipes])


def plan_space(
    evaluator: PlanEvaluator, selection: SelectionConfig, sites: Sequence[Site], recipes: Sequence[Recipe], peak: int
) -> PlanSpace:
    """The choices of a search, at the context that costs are measured at.

    Sizes are those of real rows: what codecs claim on held-out text, sinks and window and exact sites counted.

    Args:
        evaluator: its codec store holds the recipes, fitted.
        selection: which bytes are to be few, and how much memory codecs may take.
        sites: that may be compressed; all others stay exact.
        recipes: that each of them may get.
        peak: bytes that a decoding step takes over what is held, for `all-in`.

    Raises:
        UserError: codecs may take less memory than any choice needs.
    """
    workspace, protocol = evaluator.workspace, evaluator.protocol
    geometry, context = workspace.loaded.geometry, workspace.experiment.counted_length
    exact = Footprint(geometry, {}, protocol.sinks, protocol.window)
    limit = parse_bytes(selection.max_codec_memory) if selection.max_codec_memory is not None else None
    with_codecs = selection.minimize == "all-in"
    options = []
    for site in sites:
        vector = exact.geometry.layers[site.layer].width_of(site.part) * BYTES_16_BIT
        held = exact.geometry.layers[site.layer].tokens_held(context)
        found = [Option(EXACT, held * vector, 0.0, 0.0)]
        for recipe in recipes:
            stored = evaluator.codecs.codecs(PlanSpec().with_sites({site: recipe}))[site]
            found.append(_option(site, recipe, stored, replace(exact, bits={}), context, selection.minimize))
        chosen_from = ladder(found) if limit is None and not with_codecs else not_beaten(found)
        options.append(chosen_from)
    size_of_sites = sum(
        own[0].size if own[0].name == EXACT else _exact(exact, site, context)
        for own, site in zip(options, sites, strict=True)
    )
    fixed = exact.base_bytes(context) - size_of_sites + (peak if with_codecs else 0)
    space = PlanSpace(tuple(sites), tuple(options), fixed, exact.base_bytes(context))
    return space if limit is None else replace(space, max_codec_bytes=float(limit))


def _exact(footprint: Footprint, site: Site, context: int) -> float:
    layer = footprint.geometry.layers[site.layer]
    return float(layer.tokens_held(context) * layer.width_of(site.part) * BYTES_16_BIT)


def _option(
    site: Site, recipe: Recipe, stored: StoredCodec, footprint: Footprint, context: int, minimize: str
) -> Option:
    codec = stored.codec
    bits = codec.stored_bits_per_token if minimize == "stored" else codec.bits_per_token
    others = footprint.base_bytes(context) - _exact(footprint, site, context)
    size = replace(footprint, bits={site: float(bits)}).compressed_bytes(context) - others
    memory = float(codec_memory([codec]))
    assert stored.error is not None, "codecs of a ladder know their error"
    return Option(recipe.text, size + (memory if minimize == "all-in" else 0.0), memory, stored.error)


def plan_of(names: Mapping[Site, str]) -> PlanSpec:
    """The plan that gives sites these recipes; all else exact."""
    recipes = {site: None if name == EXACT else parse_recipe(name) for site, name in names.items()}
    return PlanSpec().with_sites(recipes)

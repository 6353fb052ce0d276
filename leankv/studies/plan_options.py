"""What a search of plans chooses from, in numbers: every site's recipes with their bytes and errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.interpolate import PchipInterpolator

from leankv.cache.footprint import Footprint
from leankv.cache.plan import PlanSpec, Site
from leankv.codecs import Codec, Recipe, parse_recipe
from leankv.codecs.registry import split_recipes
from leankv.config.experiment import SelectionConfig
from leankv.config.notation import parse_bytes, parse_layers, parse_sites
from leankv.config.plan_table import EXACT, PARTS
from leankv.config.presets import LADDERS, RATE_LADDERS
from leankv.errors import UserError
from leankv.evaluation.cache_bytes import codec_memory
from leankv.models.geometry import BYTES_16_BIT
from leankv.search.plan_space import Option, PlanSpace, ladder, not_beaten
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.workspace import Workspace

N_REFERENCES = 5
"""An octave of the step apart on the usual ladder: with three, claims between two were 15 % too high (log of
2026-11-30)."""
STEPS_BETWEEN = 4  # levels from one reference plan to the next
TINY = 1e-30  # stands for no error where its logarithm is taken


def search_recipes(text: str, error_metric: str) -> list[Recipe]:
    """The recipes that `--recipes` names: families stand for their usual rates.

    Raises:
        UserError: one is not understood.
    """
    families = LADDERS if error_metric == "gradient" else LADDERS | RATE_LADDERS
    try:
        pieces = split_recipes(text)
    except ValueError:
        pieces = [text]  # refused as a recipe is
    names = [name for piece in pieces if piece for name in families.get(piece.replace(" ", ""), (piece,))]
    return list(dict.fromkeys(parse_recipe(name) for name in names))


def search_sites(workspace: Workspace, selection: SelectionConfig) -> list[Site]:
    """The sites that may be compressed, in order.

    Raises:
        UserError: `selection.sites` or `selection.layers` does not parse, or names what the model has not, or nothing
            is left.
    """
    named = parse_sites(selection.sites, workspace.n_layers, PARTS)
    allowed = set(workspace.layers) & set(parse_layers(selection.layers, workspace.n_layers))
    sites = sorted(Site(layer, part) for layer, part in named if layer in allowed)
    if not sites:
        raise UserError("selection.sites, selection.layers and layers leave nothing to compress; name more of them")
    return sites


def reference_recipes(rates: Sequence[Recipe]) -> list[Recipe]:
    """The recipes of the reference plans that ladders are fitted to the contexts of, in the order of `rates`.

    Args:
        rates: the recipes that predict; where none does, all, whose context does not matter.
    """
    if not any(rate.n_context_layers for rate in rates):
        return [rates[len(rates) // 2]]
    places = np.linspace(0, len(rates) - 1, min(N_REFERENCES, len(rates)))
    return [rates[round(place)] for place in places]


def same_everywhere(sites: Sequence[Site], recipe: Recipe) -> PlanSpec:
    """The plan that gives these sites one recipe, and leaves all else exact."""
    return PlanSpec().with_sites(dict.fromkeys(sites, recipe))


def plan_space(
    evaluators: Sequence[PlanEvaluator],
    selection: SelectionConfig,
    sites: Sequence[Site],
    recipes: Sequence[Recipe],
    references: Sequence[Recipe],
    peak: int,
) -> PlanSpace:
    """The choices of a search, at the context that costs are measured at.

    Sizes are those of real rows: what codecs claim on held-out text, sinks and window and exact sites counted. Codecs
    that predict claim more, and err more, behind coarse sites than behind fine ones: each has a size and an error for
    every reference plan.

    Args:
        evaluators: one a reference plan, whose codec stores hold the recipes, fitted to what that plan leaves.
        selection: which bytes are to be few, and how much memory codecs may take.
        sites: that may be compressed; all others stay exact.
        recipes: that each of them may get.
        references: the recipe that each reference plan has everywhere, from fine to coarse.
        peak: bytes that a decoding step takes over what is held, for `all-in`.

    Raises:
        UserError: codecs may take less memory than any choice needs.
    """
    middle = len(evaluators) // 2
    evaluator = evaluators[middle]
    workspace, protocol = evaluator.workspace, evaluator.protocol
    geometry, context = workspace.loaded.geometry, workspace.experiment.counted_length
    exact = Footprint(geometry, {}, protocol.sinks, protocol.window)
    limit = parse_bytes(selection.max_codec_memory) if selection.max_codec_memory is not None else None
    with_codecs = selection.minimize == "all-in"
    claims: dict[tuple[Site, Recipe], list[Claim]] = {}
    errors: dict[tuple[Site, Recipe], list[float]] = {}
    for each in evaluators:
        for recipe in recipes:
            for site, own in each.codecs.codecs(same_everywhere(sites, recipe)).items():
                claim = _claim(site, own.codec, exact, context, selection.minimize)
                claims.setdefault((site, recipe), []).append(claim)
                assert own.error is not None, "codecs of a ladder know their error"
                errors.setdefault((site, recipe), []).append(own.error)
            each.codecs.forget()  # so that the codecs of one rate only are in memory
    options = []
    for site in sites:
        rungs = [errors[site, recipe][place] for place, recipe in enumerate(references)]
        coded = []
        for recipe in recipes:
            sizes = _between([claim.size for claim in claims[site, recipe]])
            own_errors = _between(errors[site, recipe])
            codec_bytes = claims[site, recipe][middle].codec_bytes
            coded.append(Option(recipe.text, sizes, codec_bytes, own_errors, _levels(own_errors, rungs)))
        found = [Option(EXACT, (_exact(exact, site, context),), 0.0, (0.0,)), *coded]
        options.append(ladder(found) if limit is None and not with_codecs else not_beaten(found))
    exact_sites = sum(_exact(exact, site, context) for site in sites)
    fixed = exact.base_bytes(context) - exact_sites + (peak if with_codecs else 0)
    contexts = tuple(_context(workspace, site, sites, recipes) for site in sites) if len(evaluators) > 1 else ()
    space = PlanSpace(tuple(sites), tuple(options), fixed, exact.base_bytes(context), contexts=contexts)
    return space if limit is None else replace(space, max_codec_bytes=float(limit))


def _levels(errors: Sequence[float], rungs: Sequence[float]) -> tuple[float, ...]:
    """Where errors stand among those of the reference plans, by their logarithms; beyond them, at their ends."""
    places = np.arange(len(rungs)) * STEPS_BETWEEN
    return tuple(float(level) for level in np.interp(_log(errors), np.maximum.accumulate(_log(rungs)), places))


def _between(numbers: Sequence[float]) -> tuple[float, ...]:
    """Numbers at the levels between those of the reference plans: their logarithms on a smooth curve that never turns.

    Corners at the references would hold a search there. (Fritsch and Butland's curve, SIAM J. Sci. Stat. Comput. 5,
    1984.)
    """
    if len(numbers) == 1:
        return tuple(numbers)
    places = np.linspace(0, len(numbers) - 1, (len(numbers) - 1) * STEPS_BETWEEN + 1)
    curve = PchipInterpolator(np.arange(len(numbers)), _log(numbers))
    return tuple(float(number) for number in np.exp(curve(places)))


def _log(numbers: Sequence[float]) -> np.ndarray:
    logarithms: np.ndarray = np.log(np.maximum(numbers, TINY))
    return logarithms


def _context(
    workspace: Workspace, site: Site, sites: Sequence[Site], recipes: Sequence[Recipe]
) -> tuple[int | None, ...]:
    """The sites, by number, that the recipe which looks the furthest back predicts from."""
    furthest = max(recipes, key=lambda recipe: recipe.n_context_layers)
    numbers = {own: number for number, own in enumerate(sites)}
    return tuple(numbers.get(source) for source in workspace.context_of(site, furthest))


@dataclass(frozen=True)
class Claim:
    """What the codec of a site, or those of a plan, claim in a search's bytes.

    Attributes:
        size: bytes of all that is to be small.
        codec_bytes: memory that the codecs take.
    """

    size: float
    codec_bytes: float


def claim_of(evaluator: PlanEvaluator, spec: PlanSpec, minimize: str, peak: int) -> Claim:
    """The size of a plan by what its own codecs claim, counted as `plan_space` counts options.

    Args:
        evaluator: its codec store holds the plan's codecs.
        spec: the plan.
        minimize: which bytes.
        peak: bytes that a decoding step takes over what is held, for `all-in`.
    """
    workspace, protocol = evaluator.workspace, evaluator.protocol
    geometry, context = workspace.loaded.geometry, workspace.experiment.counted_length
    exact = Footprint(geometry, {}, protocol.sinks, protocol.window)
    stored = evaluator.codecs.codecs(spec)
    claims = [_claim(site, own.codec, exact, context, minimize) for site, own in stored.items()]
    rest = exact.base_bytes(context) - sum(_exact(exact, site, context) for site in stored)
    size = rest + sum(claim.size for claim in claims) + (peak if minimize == "all-in" else 0)
    return Claim(size, sum(claim.codec_bytes for claim in claims))


def _exact(footprint: Footprint, site: Site, context: int) -> float:
    layer = footprint.geometry.layers[site.layer]
    return float(layer.tokens_held(context) * layer.width_of(site.part) * BYTES_16_BIT)


def _claim(site: Site, codec: Codec, footprint: Footprint, context: int, minimize: str) -> Claim:
    bits = codec.stored_bits_per_token if minimize == "stored" else codec.bits_per_token
    others = footprint.base_bytes(context) - _exact(footprint, site, context)
    size = replace(footprint, bits={site: float(bits)}).compressed_bytes(context) - others
    memory = float(codec_memory([codec]))
    return Claim(size + (memory if minimize == "all-in" else 0.0), memory)


def plan_of(names: Mapping[Site, str]) -> PlanSpec:
    """The plan that gives sites these recipes; all else exact."""
    recipes = {site: None if name == EXACT else parse_recipe(name) for site, name in names.items()}
    return PlanSpec().with_sites(recipes)

"""Fitting ladders: several recipes for each site, given what one plan leaves of the sites that they predict from.

A search tries many plans. If every one had its look-back codecs fitted anew to its own context, each would take as long
to fit as to measure many times over. So all recipes of a site are fitted to one context, that of a *reference plan*,
and what they have in common (a regression, principal components) is fitted once. A codec is right in any context, since
its encoder sees the one it is used in; but its bits are more than they could be, and behind coarse sites more than
behind fine ones. So a search has ladders of several references, and reads between them (`leankv.search.plan_space`).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from leankv.cache.on_device import codec_on
from leankv.cache.plan import Site
from leankv.calibration.activations import Activations
from leankv.calibration.error_metrics import ErrorMetrics
from leankv.calibration.fit import FittedCodec, Fitting, finite, fit_data, in_precision, on_its_own, weighted_error
from leankv.calibration.fit_in_context import SiteInContext, check_memory, reconstructed
from leankv.codecs import Codec, Recipe
from leankv.codecs.base import fit_together
from leankv.codecs.share import as_context
from leankv.codecs.statistics import fraction_of_variance_unexplained


def fit_ladders(
    activations: Activations,
    ladders: Mapping[Site, Sequence[SiteInContext]],
    reference: Mapping[Site, SiteInContext],
    fitting: Fitting,
    error_metrics: ErrorMetrics,
    on_fitted: Callable[[Site, Recipe, FittedCodec], None],
) -> None:
    """Fit every recipe of every site.

    Args:
        activations: of all layers in `reference`.
        ladders: site -> what to fit there, each recipe with its context.
        reference: the plan whose decoded vectors are the context, with all sites that have ladders or are predicted
            from, in order. Where its codec is not fitted yet, its recipe is one of the site's ladder.
        fitting: how.
        error_metrics: what errors count by; all alike where there are none.
        on_fitted: called with each codec as soon as it is fitted.

    Raises:
        UserError: the memory does not hold a site's vectors with those that it predicts from.
    """
    check_memory(activations, reference, fitting)
    everything = [*reference.items(), *((site, own) for site, ladder in ladders.items() for own in ladder)]
    last_reader = {source: site for site, own in sorted(everything, key=lambda item: item[0]) for source in own.context}
    decoded: dict[Site, torch.Tensor] = {}
    for site, own in reference.items():
        x = fitting.read(activations, site).to(fitting.device)
        metric, used = error_metrics.get(site), own.codec
        ladder = ladders.get(site, ())
        for sources in dict.fromkeys(tuple(rung.context) for rung in ladder):
            recipes = [rung.recipe for rung in ladder if tuple(rung.context) == sources and rung.recipe is not None]
            context = _side_by_side(x, decoded, sources)
            for recipe, fitted in _fitted(recipes, x, context, metric, activations, fitting):
                used = fitted.codec if used is None and recipe == own.recipe else used
                on_fitted(site, recipe, fitted)
        if site in last_reader:
            decoded[site] = _shown(own.recipe, used, x, _side_by_side(x, decoded, own.context))
        decoded = {source: vectors for source, vectors in decoded.items() if last_reader[source] > site}


def _fitted(
    recipes: Sequence[Recipe],
    x: torch.Tensor,
    context: torch.Tensor,
    metric: torch.Tensor | None,
    activations: Activations,
    fitting: Fitting,
) -> Iterator[tuple[Recipe, FittedCodec]]:
    """The codecs of one site, from vectors `[N, W]` and their context `[N, R]`."""
    started = time.monotonic()
    first_heldout = fitting.first_heldout(activations.manifest)
    heldout, known = x[first_heldout:], context[first_heldout:]
    data = fit_data(x, context, first_heldout, metric, fitting)
    for recipe, (codec,) in zip(recipes, fit_together(recipes, data), strict=True):
        in_precision(codec, fitting.codec_dtype)
        shown = reconstructed(codec, heldout, known)
        fvu = finite(fraction_of_variance_unexplained(heldout, shown).item())
        # Sums of a regression, components and all rates together: most of it is common work.
        seconds = (time.monotonic() - started) / len(recipes)
        error = weighted_error(heldout, shown, metric)
        yield recipe, FittedCodec(on_its_own(codec), fvu, [], seconds, error)


def _side_by_side(x: torch.Tensor, decoded: Mapping[Site, torch.Tensor], sources: Sequence[Site]) -> torch.Tensor:
    """The context `[N, R]` of vectors `[N, W]`."""
    return torch.cat([decoded[source] for source in sources], dim=1) if sources else x[:, :0].float()


def _shown(recipe: Recipe | None, codec: Codec | None, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """The vectors `[N, W]` of one site as later ones see them."""
    if recipe is None:
        return as_context(x)
    assert codec is not None, "the reference's recipe is fitted, or one of the ladder"
    return as_context(reconstructed(codec_on(codec, x.device), x, context))

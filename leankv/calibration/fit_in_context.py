"""Fitting codecs that predict from earlier layers: one site after another, each given what the plan leaves of those."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from leankv.cache.on_device import codec_on
from leankv.cache.plan import Site
from leankv.calibration.activations import Activations
from leankv.calibration.error_metrics import ErrorMetrics
from leankv.calibration.fit import (
    FittedCodec,
    Fitting,
    finite,
    fit_data,
    in_precision,
    on_its_own,
    refuse_if_short,
    weighted_error,
)
from leankv.codecs import Codec, FitData, Recipe
from leankv.codecs.share import as_context
from leankv.codecs.statistics import ROWS, fraction_of_variance_unexplained


@dataclass(frozen=True)
class SiteInContext:
    """A site that is fitted, or that others predict from.

    Attributes:
        recipe: what it gets; None leaves it exact.
        codec: fitted already; None where it is to be fitted, or exact.
        context: the sites that it predicts from, in the order in which its codec takes them.
        refit: makes the codec of its vectors, in place of the recipe; None where the recipe does.
    """

    recipe: Recipe | None
    codec: Codec | None
    context: Sequence[Site]
    refit: Callable[[FitData], Codec] | None = None


def fit_in_context(
    activations: Activations,
    sites: Mapping[Site, SiteInContext],
    fitting: Fitting,
    error_metrics: ErrorMetrics,
    on_fitted: Callable[[Site, FittedCodec], None],
) -> None:
    """Fit the codecs of sites that predict from others, in order.

    Each is fitted given what the codecs of those others leave, so that errors are corrected as they arise and do not
    add up.

    Args:
        activations: of the layers of all these sites.
        sites: in order of layers, keys before values; all that are predicted from are among them.
        fitting: how.
        error_metrics: what errors count by; all alike where there are none.
        on_fitted: called with each codec as soon as it is fitted.

    Raises:
        UserError: the memory does not hold a site's vectors with those that it predicts from.
    """
    first_heldout = fitting.first_heldout(activations.manifest)
    check_memory(activations, sites, fitting)
    decoded: dict[Site, torch.Tensor] = {}
    for site, own in sites.items():
        started = time.monotonic()
        x = fitting.read(activations, site).to(fitting.device)
        if own.recipe is None:
            decoded[site] = as_context(x)
        else:
            known = [decoded[source] for source in own.context]
            context = torch.cat(known, dim=1) if known else x[:, :0].float()
            if own.codec is None:
                data = fit_data(x, context, first_heldout, error_metrics.get(site), fitting)
                codec = own.recipe.fit(data)[0] if own.refit is None else own.refit(data)
                codec = in_precision(codec, fitting.codec_dtype).to(fitting.device)
            else:
                codec = codec_on(own.codec, fitting.device)
            shown = reconstructed(codec, x, context)
            decoded[site] = as_context(shown)
            if own.codec is None:
                fvu = fraction_of_variance_unexplained(x[first_heldout:], shown[first_heldout:]).item()
                error = weighted_error(x[first_heldout:], shown[first_heldout:], error_metrics.get(site))
                seconds = time.monotonic() - started
                on_fitted(site, FittedCodec(on_its_own(codec), finite(fvu), [], seconds, error))
        still = {source for later, other in sites.items() if later > site for source in other.context}
        decoded = {known_site: vectors for known_site, vectors in decoded.items() if known_site in still}


def reconstructed(codec: Codec, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """What a codec makes of vectors `[N, W]` given their context `[N, R]`, `[N, W]`."""
    pieces = zip(x.split(ROWS), context.split(ROWS), strict=True)
    return torch.cat([codec.decode(codec.encode(rows, known), known) for rows, known in pieces])


def check_memory(activations: Activations, sites: Mapping[Site, SiteInContext], fitting: Fitting) -> None:
    """Refuse a memory that does not hold what `fit_in_context` does at its fullest."""
    manifest = activations.manifest
    width = max(activations.widths().values())
    tokens = manifest["blocks"] * fitting.tokens_a_block(manifest)
    itemsize = getattr(torch, manifest["dtype"]).itemsize
    recipes = [own.recipe for own in sites.values() if own.recipe is not None]
    # Context in 16 bits: of all sites that may still be asked for, and side by side once more for the regression.
    sources = max(len(own.context) for own in sites.values())
    context = (sources + 1 + sources) * tokens * width * 2
    copies = 1 + max(recipe.data_copies for recipe in recipes)
    working = max(recipe.working_bytes(width, fitting.training) for recipe in recipes)
    # The file as it is read, and the reconstruction in pieces and whole.
    vectors = tokens * width * (itemsize * (copies + 1 + (fitting.sinks > 0)) + 2 * 4)
    refuse_if_short(fitting, context + vectors + working, tokens, width)

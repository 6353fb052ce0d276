"""Fitting: activations to fitted codecs, as many layers and parts at once as memory holds.

A codec's numbers depend on its own layer and part only, never on which others are fitted with it.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from leankv.cache.plan import Site
from leankv.calibration.activations import Activations
from leankv.codecs import Codec, FitData, Recipe, TrainingSettings, fraction_of_variance_unexplained
from leankv.codecs.statistics import ROWS
from leankv.config.experiment import FitConfig
from leankv.errors import UserError
from leankv.progress import Progress

FITTING_REVISION = 2
"""Raised when what codecs are fitted to changes: captured vectors, sinks left out, error metrics. Families have one of
their own."""


@dataclass(frozen=True)
class FittedCodec:
    """A codec and how its fitting went.

    Attributes:
        codec: on the CPU.
        fvu: fraction of variance unexplained on the held-out calibration blocks, through encode and decode.
        fvu_by_epoch: the same after each epoch, as training saw it; empty for closed-form families.
        seconds: this codec's share of the batched fit.
        error: mean of `e^T M e` over the held-out vectors, `e` their errors and `M` the error metric.
    """

    codec: Codec
    fvu: float
    fvu_by_epoch: list[float]
    seconds: float
    error: float


@dataclass(frozen=True)
class Fitting:
    """How codecs are fitted, the same for all sites.

    Attributes:
        settings: of trained families, and how much is held out.
        codec_dtype: precision that the codecs' parameters are kept in.
        seed: of everything random.
        sinks: first tokens of each block that are held exact; codecs never meet them, so they are not fitted to.
        device: where.
        memory_bytes: what fitting may take.
    """

    settings: FitConfig
    codec_dtype: torch.dtype
    seed: int
    sinks: int
    device: torch.device
    memory_bytes: int

    @property
    def training(self) -> TrainingSettings:
        settings = self.settings
        return TrainingSettings(settings.epochs, settings.batch_tokens, settings.learning_rate, self.seed)

    def first_heldout(self, manifest: Mapping[str, Any]) -> int:
        """The first held-out vector.

        The last blocks of the calibration text (`heldout_fraction` of them, at least one) are held out whole, so that
        no held-out token has a neighbour among the fitted ones.
        """
        blocks: int = manifest["blocks"]
        return (blocks - self.heldout_blocks(blocks)) * self.tokens_a_block(manifest)

    def heldout_blocks(self, blocks: int) -> int:
        """How many of so many blocks are held out."""
        return min(max(1, round(self.settings.heldout_fraction * blocks)), blocks - 1)

    def tokens_a_block(self, manifest: Mapping[str, Any]) -> int:
        """Fitted tokens in each block; all of them where sinks would leave none."""
        length: int = manifest["block_length"]
        return length - self.sinks if self.sinks < length else length

    def read(self, activations: Activations, site: Site) -> torch.Tensor:
        """The vectors of one site, `[N, W]`."""
        x = activations.read(*site)
        manifest = activations.manifest
        return x.unflatten(0, (manifest["blocks"], -1))[:, -self.tokens_a_block(manifest) :].flatten(0, 1)


def fit_codecs(
    activations: Activations,
    sites: Mapping[Site, Recipe],
    fitting: Fitting,
    error_metrics: Mapping[Site, torch.Tensor],
    on_fitted: Callable[[Site, FittedCodec], None],
    progress: Progress,
) -> None:
    """Fit a codec for each site and hand it to `on_fitted` as soon as its group is done.

    As many sites of one recipe are fitted at once as the memory holds. `error_metrics` say what errors count by
    (`leankv.calibration.error_metrics`); without one they all count alike.

    Raises:
        UserError: the memory does not hold one.
    """
    manifest = activations.manifest
    widths = activations.widths()

    def kind(site: Site) -> tuple[str, int]:
        return sites[site].text, widths[site]

    for (_, width), alike in groupby(sorted(sites, key=lambda p: (kind(p), p)), key=kind):
        ordered = list(alike)
        recipe = sites[ordered[0]]
        size = _group_size(recipe, width, fitting, manifest)
        for start in range(0, len(ordered), size):
            # A call a group: whatever it held is gone before the next one's vectors are read.
            _fit_group(
                activations, recipe, ordered[start : start + size], width, fitting, error_metrics, on_fitted, progress
            )


def _fit_group(
    activations: Activations,
    recipe: Recipe,
    group: Sequence[Site],
    width: int,
    fitting: Fitting,
    error_metrics: Mapping[Site, torch.Tensor],
    on_fitted: Callable[[Site, FittedCodec], None],
    progress: Progress,
) -> None:
    """Fit one recipe to some sites at once."""
    started = time.monotonic()
    first_heldout = fitting.first_heldout(activations.manifest)
    x = _stacked(activations, group, width, fitting)
    train, heldout = x[:, :first_heldout], x[:, first_heldout:]
    history: list[torch.Tensor] = []
    with progress.stage(f"fitting {len(group)} codecs {recipe.text}", fitting.settings.epochs) as step:

        def on_epoch(epoch: int, error: torch.Tensor) -> None:
            history.append(error.cpu())
            step(f"held-out FVU {error.mean().item():.3f}")

        metric = None
        if error_metrics:
            metric = torch.stack([error_metrics[site].to(fitting.device) for site in group])
        data = FitData(train, heldout, error_metric=metric, training=fitting.training, on_epoch=on_epoch)
        codecs = recipe.fit(data)
    for index, (site, codec) in enumerate(zip(group, codecs, strict=True)):
        in_precision(codec, fitting.codec_dtype)
        reconstructed = codec.decode(codec.encode(heldout[index]))
        fvu = fraction_of_variance_unexplained(heldout[index], reconstructed).item()
        by_epoch = [finite(error[index].item()) for error in history]
        seconds = (time.monotonic() - started) / len(group)
        error = weighted_error(heldout[index], reconstructed, None if metric is None else metric[index])
        on_fitted(site, FittedCodec(on_its_own(codec), finite(fvu), by_epoch, seconds, error))


def fit_data(
    x: torch.Tensor, context: torch.Tensor, first_heldout: int, metric: torch.Tensor | None, fitting: Fitting
) -> FitData:
    """What one site's codec is fitted to: its vectors `[N, W]` and their context `[N, R]`, parted at a token."""
    return FitData(
        train=x[None, :first_heldout],
        heldout=x[None, first_heldout:],
        context=context[None, :first_heldout],
        heldout_context=context[None, first_heldout:],
        error_metric=None if metric is None else metric.to(fitting.device)[None],
        training=fitting.training,
    )


def in_precision(codec: Codec, dtype: torch.dtype) -> Codec:
    """The codec with its parameters in the precision asked for; statistics keep theirs."""
    for parameter in codec.parameters():
        parameter.data = parameter.data.to(dtype)
    return codec


def on_its_own(codec: Codec) -> Codec:
    """A copy on the CPU, in tensors of its own.

    As fitted they may be views of what holds far more; and codecs that were fitted together may have a part in common,
    which the others still need where it is.
    """
    copies: dict[int, Any] = {id(codec.recipe): codec.recipe}
    for tensor in codec.state_dict(keep_vars=True).values():
        own = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        copies[id(tensor)] = torch.nn.Parameter(own, tensor.requires_grad) if is_parameter else own
    return copy.deepcopy(codec, copies)


def finite(fvu: float) -> float:
    """An error over no variance at all counts as 0 when there is no error: the mean then says everything."""
    return fvu if math.isfinite(fvu) else 0.0


def weighted_error(x: torch.Tensor, shown: torch.Tensor, metric: torch.Tensor | None) -> float:
    """Mean of `e^T M e` over vectors `[N, W]`, `e` their errors; of `|e|^2` without a metric."""
    error = x.float() - shown.float()
    weighted = error if metric is None else error @ metric.to(error.device)
    return float((error * weighted).sum(dim=1).double().mean())


def _stacked(activations: Activations, group: Sequence[Site], width: int, fitting: Fitting) -> torch.Tensor:
    """The vectors of a group of sites, `[P, N, W]`, with no second copy of them all."""
    manifest = activations.manifest
    tokens = manifest["blocks"] * fitting.tokens_a_block(manifest)
    x = torch.empty((len(group), tokens, width), dtype=getattr(torch, manifest["dtype"]), device=fitting.device)
    for index, site in enumerate(group):
        x[index] = fitting.read(activations, site)
    return x


def refuse_if_short(fitting: Fitting, least: int, tokens: int, width: int) -> None:
    """Refuse a memory that is smaller than `least` bytes, and name the least that works.

    Raises:
        UserError: it is.
    """
    if fitting.memory_bytes < least:
        raise UserError(
            f"a memory budget of {fitting.memory_bytes / 1e9:.3g} GB does not hold one layer's {tokens} vectors of "
            f"{width}; the least that works is --memory-budget {math.ceil(least / 1e3) / 1e6:g}"
        )


def _group_size(recipe: Recipe, width: int, fitting: Fitting, manifest: Mapping[str, Any]) -> int:
    """How many sites of one kind fit the memory: their vectors, held-out reconstructions and working space."""
    tokens = manifest["blocks"] * fitting.tokens_a_block(manifest)
    itemsize = getattr(torch, manifest["dtype"]).itemsize
    vectors = tokens * width * itemsize
    working = recipe.working_bytes(width, fitting.training)
    copies = 1 + recipe.data_copies
    per_site = copies * vectors + (tokens - fitting.first_heldout(manifest)) * width * 4 + working
    # One file as it is read, twice where sinks are cut out of it; pieces; a covariance.
    shared = vectors * (1 + (fitting.sinks > 0)) + 4 * ROWS * width * 4 + 3 * width * width * 8
    refuse_if_short(fitting, shared + per_site, tokens, width)
    return (fitting.memory_bytes - shared) // per_site

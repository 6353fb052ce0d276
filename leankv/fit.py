"""Fitting: activations to fitted codecs, as many layers and parts at once as memory holds.

A codec's numbers depend on its own layer and part only, never on which others are fitted beside it.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from leankv.capture import Activations
from leankv.codecs import Codec, CodecSpec, TrainingSettings, fraction_of_variance_unexplained
from leankv.codecs.base import ROWS
from leankv.codecs.share import as_context
from leankv.errors import UserError
from leankv.experiment import PARTS, FitConfig
from leankv.progress import Progress

FITTING_REVISION = 2
"""Raised when what codecs are fitted to changes: captured vectors, sinks left out, metrics. Families have their own."""

Problem = tuple[int, str]
"""What one codec is fitted to: a layer and a part."""


@dataclass(frozen=True)
class FittedCodec:
    """A codec and how its fitting went.

    Attributes:
        codec: on the CPU.
        fvu: fraction of variance unexplained on the held-out calibration blocks, through encode and decode.
        fvu_by_epoch: the same after each epoch, as training saw it; empty for closed-form families.
        seconds: this codec's share of the batched fit.
    """

    codec: Codec
    fvu: float
    fvu_by_epoch: list[float]
    seconds: float


@dataclass(frozen=True)
class Fitting:
    """How codecs are fitted, the same for all problems.

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
        heldout = min(max(1, round(self.settings.heldout_fraction * blocks)), blocks - 1)
        return (blocks - heldout) * self.tokens_a_block(manifest)

    def tokens_a_block(self, manifest: Mapping[str, Any]) -> int:
        """Fitted tokens in each block; all of them where sinks would leave none."""
        length: int = manifest["block_length"]
        return length - self.sinks if self.sinks < length else length

    def read(self, activations: Activations, problem: Problem) -> torch.Tensor:
        """The vectors of one problem, `[N, W]`."""
        x = activations.read(*problem)
        manifest = activations.manifest
        return x.unflatten(0, (manifest["blocks"], -1))[:, -self.tokens_a_block(manifest) :].flatten(0, 1)


def fit_codecs(
    activations: Activations,
    problems: Mapping[Problem, CodecSpec],
    fitting: Fitting,
    metrics: Mapping[Problem, torch.Tensor],
    on_fitted: Callable[[Problem, FittedCodec], None],
    progress: Progress,
) -> None:
    """Fit a codec for each problem and hand it to `on_fitted` as soon as its group is done.

    As many problems are fitted at once as the memory holds. `metrics` say what errors count by (`leankv.weighting`);
    without one they all count alike.

    Raises:
        UserError: the memory does not hold one.
    """
    manifest = activations.manifest
    widths = dict(zip(manifest["layers"], manifest["widths"], strict=True))

    def kind(problem: Problem) -> tuple[str, int]:
        return problems[problem].text, widths[problem[0]]

    for (spec_text, width), alike in groupby(sorted(problems, key=lambda p: (kind(p), p)), key=kind):
        ordered = list(alike)
        spec = problems[ordered[0]]
        size = _group_size(spec, width, fitting, manifest)
        for group in (ordered[start : start + size] for start in range(0, len(ordered), size)):
            started = time.monotonic()
            first_heldout = fitting.first_heldout(manifest)
            x = _stacked(activations, group, width, fitting)
            train, heldout = x[:, :first_heldout], x[:, first_heldout:]
            history: list[torch.Tensor] = []
            with progress.stage(f"fitting {len(group)} codecs {spec_text}", fitting.settings.epochs) as step:

                def on_epoch(
                    epoch: int,
                    error: torch.Tensor,
                    history: list[torch.Tensor] = history,
                    step: Callable[[str], None] = step,
                ) -> None:
                    history.append(error.cpu())
                    step(f"held-out FVU {error.mean().item():.3f}")

                metric = torch.stack([metrics[p].to(fitting.device) for p in group]) if metrics else None
                codecs = spec.family.fit(spec.arguments, train, heldout, metric, fitting.training, on_epoch)
            for index, (problem, codec) in enumerate(zip(group, codecs, strict=True)):
                _cast(codec, fitting.codec_dtype)
                reconstructed = codec.decode(codec.encode(heldout[index]))
                fvu = fraction_of_variance_unexplained(heldout[index], reconstructed).item()
                by_epoch = [_finite(error[index].item()) for error in history]
                seconds = (time.monotonic() - started) / len(group)
                on_fitted(problem, FittedCodec(codec.cpu(), _finite(fvu), by_epoch, seconds))


def fit_chain(
    activations: Activations,
    specs: Mapping[str, CodecSpec],
    earlier: Mapping[int, Sequence[int]],
    fitting: Fitting,
    metrics: Mapping[Problem, torch.Tensor],
    on_fitted: Callable[[Problem, FittedCodec], None],
    progress: Progress,
) -> None:
    """Fit codecs that predict from layers before their own, one layer after another.

    Each is fitted beside what the codecs of the same specs leave of those layers, so that errors are corrected as they
    arise and do not add up.

    Args:
        specs: part -> spec, the same for all layers; a part without one is read exact.
        earlier: layer -> the layers that it predicts from, the nearest first; all layers from the first on, in order.
        activations, fitting, metrics, on_fitted, progress: as in `fit_codecs`.

    Raises:
        UserError: the memory does not hold a layer's vectors with those that its codecs predict from.
    """
    first_heldout = fitting.first_heldout(activations.manifest)
    _check_chain(specs, max(map(len, earlier.values())), fitting, activations.manifest)
    known: dict[Problem, torch.Tensor] = {}
    names = ", ".join(sorted({spec.text for spec in specs.values()}))
    with progress.stage(f"fitting {names} layer by layer", len(earlier)) as step:
        for layer, sources in earlier.items():
            for part in PARTS:
                started = time.monotonic()
                x = fitting.read(activations, (layer, part)).to(fitting.device)
                if part in specs:
                    # As many layers as a cache shows it, whatever the other part looks at.
                    looks_back = specs[part].family.layers_looked_at(specs[part].arguments)
                    reference = [known[source, each] for source in sources[:looks_back] for each in PARTS]
                    reference += [known[layer, "k"]] if part == "v" else []
                    r = torch.cat(reference, dim=1) if reference else x[:, :0].float()
                    metric = metrics[layer, part].to(fitting.device)[None] if metrics else None
                    (codec,) = specs[part].family.fit_beside(
                        specs[part].arguments,
                        x[None, :first_heldout],
                        x[None, first_heldout:],
                        (r[None, :first_heldout], r[None, first_heldout:]),
                        metric,
                        fitting.training,
                        lambda epoch, error: None,
                    )
                    _cast(codec, fitting.codec_dtype)
                    pieces = zip(x.split(ROWS), r.split(ROWS), strict=True)
                    decoded = [codec.decode_beside(codec.encode_beside(rows, own), own) for rows, own in pieces]
                    reconstructed = torch.cat(decoded)
                    fvu = fraction_of_variance_unexplained(x[first_heldout:], reconstructed[first_heldout:]).item()
                    known[layer, part] = as_context(reconstructed)
                    seconds = time.monotonic() - started
                    on_fitted((layer, part), FittedCodec(codec.cpu(), _finite(fvu), [], seconds))
                else:
                    known[layer, part] = as_context(x)
            still = {source for later, own in earlier.items() if later > layer for source in own}
            known = {problem: vectors for problem, vectors in known.items() if problem[0] in still}
            step()


def _cast(codec: Codec, dtype: torch.dtype) -> None:
    """Parameters in the precision asked for; statistics keep theirs."""
    for parameter in codec.parameters():
        parameter.data = parameter.data.to(dtype)


def _finite(fvu: float) -> float:
    """An error over no variance at all counts as 0 when there is no error: the mean then says everything."""
    return fvu if math.isfinite(fvu) else 0.0


def _stacked(activations: Activations, group: Sequence[Problem], width: int, fitting: Fitting) -> torch.Tensor:
    """The vectors of a group of problems, `[P, N, W]`, with no second copy of them all."""
    manifest = activations.manifest
    tokens = manifest["blocks"] * fitting.tokens_a_block(manifest)
    x = torch.empty((len(group), tokens, width), dtype=getattr(torch, manifest["dtype"]), device=fitting.device)
    for index, problem in enumerate(group):
        x[index] = fitting.read(activations, problem)
    return x


def _check_chain(
    specs: Mapping[str, CodecSpec], looks_back: int, fitting: Fitting, manifest: Mapping[str, Any]
) -> None:
    """Refuse a memory that does not hold what `fit_chain` does at its fullest."""
    width = max(manifest["widths"])
    tokens = manifest["blocks"] * fitting.tokens_a_block(manifest)
    itemsize = getattr(torch, manifest["dtype"]).itemsize
    sources = len(PARTS) * looks_back + 1
    # Context in 16 bits, of the layers looked at and of the layer's own, and side by side once more for the regression.
    context = (len(PARTS) * (looks_back + 1) + sources) * tokens * width * 2
    families = [(spec.family, spec.arguments) for spec in specs.values()]
    copies = 1 + max(family.data_copies(arguments) for family, arguments in families)
    working = max(family.working_bytes(arguments, width, fitting.training) for family, arguments in families)
    # The file as it is read, and the reconstruction in pieces and whole.
    vectors = tokens * width * (itemsize * (copies + 1 + (fitting.sinks > 0)) + 2 * 4)
    _refuse_if_short(fitting, context + vectors + working, tokens, width)


def _refuse_if_short(fitting: Fitting, least: int, tokens: int, width: int) -> None:
    if fitting.memory_bytes < least:
        raise UserError(
            f"a memory budget of {fitting.memory_bytes / 1e9:.3g} GB does not hold one layer's {tokens} vectors of "
            f"{width}; the least that works is --memory-budget {math.ceil(least / 1e3) / 1e6:g}"
        )


def _group_size(spec: CodecSpec, width: int, fitting: Fitting, manifest: dict[str, Any]) -> int:
    """How many problems of one kind fit the memory: their vectors, held-out reconstructions and working space."""
    tokens = manifest["blocks"] * fitting.tokens_a_block(manifest)
    itemsize = getattr(torch, manifest["dtype"]).itemsize
    vectors = tokens * width * itemsize
    working = spec.family.working_bytes(spec.arguments, width, fitting.training)
    copies = 1 + spec.family.data_copies(spec.arguments)
    per_problem = copies * vectors + (tokens - fitting.first_heldout(manifest)) * width * 4 + working
    # One file as it is read, twice where sinks are cut out of it; pieces; a covariance.
    shared = vectors * (1 + (fitting.sinks > 0)) + 4 * ROWS * width * 4 + 3 * width * width * 8
    _refuse_if_short(fitting, shared + per_problem, tokens, width)
    return (fitting.memory_bytes - shared) // per_problem

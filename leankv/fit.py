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
from leankv.errors import UserError
from leankv.experiment import FitConfig
from leankv.progress import Progress

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


def fit_codecs(
    activations: Activations,
    problems: Mapping[Problem, CodecSpec],
    settings: FitConfig,
    metrics: Mapping[Problem, torch.Tensor],
    codec_dtype: torch.dtype,
    seed: int,
    device: torch.device,
    memory_bytes: int,
    on_fitted: Callable[[Problem, FittedCodec], None],
    progress: Progress,
) -> None:
    """Fit a codec for each problem and hand it to `on_fitted` as soon as its group is done.

    The last blocks of the calibration text (`settings.heldout_fraction` of them, at least one) are held out whole, so
    that no held-out token has a neighbour among the fitted ones. As many problems are fitted at once as
    `memory_bytes` hold. `metrics` say what errors count by (`leankv.weighting`); without one they all count alike.

    Raises:
        UserError: `memory_bytes` do not hold one.
    """
    manifest = activations.manifest
    heldout_blocks = min(max(1, round(settings.heldout_fraction * manifest["blocks"])), manifest["blocks"] - 1)
    first_heldout = (manifest["blocks"] - heldout_blocks) * manifest["block_length"]
    training = TrainingSettings(settings.epochs, settings.batch_tokens, settings.learning_rate, seed)

    widths = dict(zip(manifest["layers"], manifest["widths"], strict=True))

    def kind(problem: Problem) -> tuple[str, int]:
        return problems[problem].text, widths[problem[0]]

    for (spec_text, width), alike in groupby(sorted(problems, key=lambda p: (kind(p), p)), key=kind):
        ordered = list(alike)
        spec = problems[ordered[0]]
        size = _group_size(spec, width, training, manifest, first_heldout, memory_bytes)
        for group in (ordered[start : start + size] for start in range(0, len(ordered), size)):
            started = time.monotonic()
            x = _stacked(activations, group, device)
            train, heldout = x[:, :first_heldout], x[:, first_heldout:]
            history: list[torch.Tensor] = []
            with progress.stage(f"fitting {len(group)} codecs {spec_text}", settings.epochs) as step:

                def on_epoch(
                    epoch: int,
                    error: torch.Tensor,
                    history: list[torch.Tensor] = history,
                    step: Callable[[str], None] = step,
                ) -> None:
                    history.append(error.cpu())
                    step(f"held-out FVU {error.mean().item():.3f}")

                weights = torch.stack([metrics[problem].to(device) for problem in group]) if metrics else None
                codecs = spec.family.fit(spec.arguments, train, heldout, weights, training, on_epoch)
            for index, (problem, codec) in enumerate(zip(group, codecs, strict=True)):
                for parameter in codec.parameters():
                    parameter.data = parameter.data.to(codec_dtype)
                reconstructed = codec.decode(codec.encode(heldout[index]))
                fvu = fraction_of_variance_unexplained(heldout[index], reconstructed).item()
                by_epoch = [_finite(error[index].item()) for error in history]
                seconds = (time.monotonic() - started) / len(group)
                on_fitted(problem, FittedCodec(codec.cpu(), _finite(fvu), by_epoch, seconds))


def _finite(fvu: float) -> float:
    """An error over no variance at all counts as 0 when there is no error: the mean then says everything."""
    return fvu if math.isfinite(fvu) else 0.0


def _stacked(activations: Activations, group: Sequence[Problem], device: torch.device) -> torch.Tensor:
    """The vectors of a group of problems, `[P, N, W]`, with no second copy of them all."""
    first = activations.read(*group[0])
    x = torch.empty((len(group), *first.shape), dtype=first.dtype, device=device)
    for index, problem in enumerate(group):
        x[index] = activations.read(*problem)
    return x


def _group_size(
    spec: CodecSpec, width: int, training: TrainingSettings, manifest: dict[str, Any], fitted: int, memory_bytes: int
) -> int:
    """How many problems of one kind fit the memory: their vectors, held-out reconstructions and working space."""
    tokens = manifest["blocks"] * manifest["block_length"]
    itemsize = getattr(torch, manifest["dtype"]).itemsize
    vectors = tokens * width * itemsize
    working = spec.family.working_bytes(spec.arguments, width, training)
    copies = 1 + spec.family.data_copies(spec.arguments)
    per_problem = copies * vectors + (tokens - fitted) * width * 4 + working
    shared = vectors + 4 * ROWS * width * 4 + 3 * width * width * 8  # one file as it is read; pieces; a covariance
    if memory_bytes < shared + per_problem:
        raise UserError(
            f"a memory budget of {memory_bytes / 1e9:.3g} GB does not hold one layer's {tokens} vectors of {width}; "
            f"the least that works is --memory-budget {math.ceil((shared + per_problem) / 1e3) / 1e6:g}"
        )
    return (memory_bytes - shared) // per_problem

"""Fitting: activations to fitted codecs, as many layers and parts at once as memory holds.

A codec's numbers depend on its own layer and part only, never on which others are fitted beside it.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from leankv.capture import Activations
from leankv.codecs import Codec, CodecSpec, TrainingSettings, fraction_of_variance_unexplained
from leankv.experiment import FitConfig
from leankv.progress import Progress

GROUP_BYTES = 2 << 30  # assumption: activations of one batched fit that a laptop can spare

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
    codec_dtype: torch.dtype,
    seed: int,
    device: torch.device,
    on_fitted: Callable[[Problem, FittedCodec], None],
    progress: Progress,
) -> None:
    """Fit a codec for each problem and hand it to `on_fitted` as soon as its group is done.

    The last blocks of the calibration text (`settings.heldout_fraction` of them, at least one) are held out whole, so
    that no held-out token has a neighbour among the fitted ones.
    """
    manifest = activations.manifest
    heldout_blocks = min(max(1, round(settings.heldout_fraction * manifest["blocks"])), manifest["blocks"] - 1)
    first_heldout = (manifest["blocks"] - heldout_blocks) * manifest["block_length"]
    training = TrainingSettings(settings.epochs, settings.batch_tokens, settings.learning_rate, seed)

    def kind(problem: Problem) -> tuple[str, int]:
        return problems[problem].text, activations.read(*problem).shape[1]

    for (spec_text, _), alike in groupby(sorted(problems, key=lambda p: (kind(p), p)), key=kind):
        for group in _fitting_memory(list(alike), activations):
            started = time.monotonic()
            x = torch.stack([activations.read(*problem) for problem in group]).to(device)
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

                spec = problems[group[0]]
                codecs = spec.family.fit(spec.arguments, train, heldout, training, on_epoch)
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


def _fitting_memory(problems: Sequence[Problem], activations: Activations) -> list[list[Problem]]:
    """Cut problems of one shape into groups whose activations stay under `GROUP_BYTES`, at least one in each."""
    first = activations.read(*problems[0])
    size = max(1, GROUP_BYTES // (first.numel() * first.element_size()))
    return [list(problems[start : start + size]) for start in range(0, len(problems), size)]

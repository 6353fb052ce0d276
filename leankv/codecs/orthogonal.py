"""`ortho:D`: a trained orthogonal projection of which every prefix is a codec too."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from leankv.codecs.base import ROWS, Code, Codec, TrainingSettings, as_float16, mean_of, sum_of_squares
from leankv.codecs.components import principal_components


class Orthogonal(Codec):
    """Projects on D orthonormal directions trained to be good for every number of them (MatryoshkaKV).

        z = U^T (x - mean),        x_hat = mean + U z,        U^T U = I

    After Lin et al., 2024: U starts at principal components and is trained so that the error summed over the prefixes
    of its columns is least: each token of each step keeps a number of them drawn from 1 to D. U is the Q of a QR
    decomposition throughout, so it stays orthogonal, and prefixes stay prefixes. MatryoshkaKV trains through the
    network's own loss; here the metric stands for that. So without a metric there is nothing to gain: the components
    are best for every prefix at once (Eckart and Young, 1936). With one, the components of `pca:D` are best too, but
    take two matrices; this is one, whose transpose undoes it.

    Storage: D float16 numbers a token; fewer with `truncated`. What it does not do: bend (see `ae`), quantize, or give
    tokens different numbers of dimensions.
    """

    family = "ortho"
    revision = 1
    grammar = "ortho:D (D from 1 to the width)"

    def __init__(self, basis: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor):
        """
        Args:
            basis: `[W, D]`, orthonormal columns.
            mean: `[W]`.
            scale: `[D]`, root mean square of each coordinate, by which it is divided to suit float16.
        """
        super().__init__(len(mean))
        self.basis = torch.nn.Parameter(basis, requires_grad=False)
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)
        self.scale: torch.Tensor
        self.register_buffer("scale", scale)

    @property
    def spec(self) -> str:
        return f"ortho:{self.basis.shape[1]}"

    @property
    def bits_per_token(self) -> int:
        return self.basis.shape[1] * 16

    def encode(self, x: torch.Tensor) -> Code:
        z = (x.float() - self.mean).to(self.basis.dtype) @ self.basis
        return {"z": as_float16(z.float() / self.scale)}

    def decode(self, code: Code) -> torch.Tensor:
        z = (code["z"].float() * self.scale).to(self.basis.dtype)
        return (z @ self.basis.T).float() + self.mean

    def truncated(self, dimensions: int) -> "Orthogonal":
        """The codec of the first `dimensions` directions; its codes are the first numbers of this one's."""
        assert 1 <= dimensions <= self.basis.shape[1]
        return Orthogonal(self.basis[:, :dimensions].clone(), self.mean.clone(), self.scale[:dimensions].clone())

    @classmethod
    def fit(
        cls,
        arguments: Sequence[Any],
        train: torch.Tensor,
        heldout: torch.Tensor,
        metric: torch.Tensor | None,
        settings: TrainingSettings,
        on_epoch: Callable[[int, torch.Tensor], None],
    ) -> list[Self]:
        """Adam (Kingma and Ba, 2015) with a cosine schedule to zero; the epoch of least held-out error is kept.

        That error is summed over prefixes under the metric, as in training. `on_epoch` is given the held-out FVU of
        all D dimensions.
        """
        (dimensions,) = arguments
        tokens = train.shape[1]
        means = mean_of(train)
        metrics = [None] * len(train) if metric is None else [own.float() for own in metric]
        bases, totals = [], []
        for x, own in zip(train, metrics, strict=True):
            found = principal_components(x, own)
            bases.append(torch.linalg.qr(found.analysis[:, :dimensions]).Q.contiguous().requires_grad_())
            totals.append(found.variances.sum().clamp_min(1e-30).item())

        generator = torch.Generator().manual_seed(settings.seed)

        def drawn_prefixes(count: int) -> torch.Tensor:
            lengths = torch.randint(1, dimensions + 1, (count, 1), generator=generator)
            return (torch.arange(dimensions) < lengths).to(train.device)

        heldout_kept = drawn_prefixes(heldout.shape[1])
        spread = sum_of_squares(heldout, mean_of(heldout)[:, None])

        def nested_error() -> torch.Tensor:
            return _lost_by_each(heldout, means, bases, heldout_kept, metrics)

        optimizer = torch.optim.Adam(bases, lr=settings.learning_rate)
        steps = max(1, settings.epochs * math.ceil(tokens / settings.batch_tokens))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        best = [torch.linalg.qr(basis.detach()).Q for basis in bases]
        lowest = nested_error()
        for epoch in range(1, settings.epochs + 1):
            for rows in torch.randperm(tokens, generator=generator).to(train.device).split(settings.batch_tokens):
                kept = drawn_prefixes(len(rows))
                optimizer.zero_grad(set_to_none=True)
                for x, mean, basis, own, total in zip(train, means, bases, metrics, totals, strict=True):
                    (_lost(x[rows], mean, basis, kept, own) / (total * len(rows))).backward()
                optimizer.step()
                schedule.step()
            error = nested_error()
            for index in (error < lowest).nonzero().flatten().tolist():
                best[index] = torch.linalg.qr(bases[index].detach()).Q
            lowest = torch.minimum(error, lowest)
            of_all = _lost_by_each(heldout, means, bases, torch.ones_like(heldout_kept), [None] * len(bases))
            on_epoch(epoch, of_all / spread)
        return [cls(b.contiguous(), m.clone(), _scale(x, m, b)) for x, m, b in zip(train, means, best, strict=True)]

    @classmethod
    def empty(cls, arguments: Sequence[Any], width: int) -> Self:
        (dimensions,) = arguments
        return cls(torch.zeros(width, dimensions), torch.zeros(width), torch.ones(dimensions))

    @classmethod
    def working_bytes(cls, arguments: Sequence[Any], width: int, settings: TrainingSettings) -> int:
        # The basis, its gradient, Adam's two moments, the best so far, a decomposition; one step's vectors.
        return 4 * (8 * width * arguments[0] + settings.batch_tokens * (6 * width + 4 * arguments[0]))

    @classmethod
    def parse_arguments(cls, text: str) -> tuple[Any, ...]:
        if re.fullmatch(r"[1-9][0-9]*", text) is None:
            raise ValueError
        return (int(text),)

    @classmethod
    def check_width(cls, arguments: Sequence[Any], width: int) -> None:
        if arguments[0] > width:
            raise ValueError(f"D = {arguments[0]} is more than the width {width}")


def _lost(
    x: torch.Tensor, mean: torch.Tensor, basis: torch.Tensor, kept: torch.Tensor, metric: torch.Tensor | None
) -> torch.Tensor:
    """Error, summed over vectors `[n, W]`, of projecting each on those columns of Q of `basis` `[W, D]` that it keeps.

    Args:
        kept: `[n, D]`, bool.
        metric: `[W, W]`; None for the plain squared error.
    """
    centred = x.float() - mean
    q = torch.linalg.qr(basis).Q
    error = centred - (centred @ q * kept) @ q.T
    return (error * (error if metric is None else error @ metric)).sum()


@torch.no_grad()
def _lost_by_each(
    x: torch.Tensor,
    means: torch.Tensor,
    bases: Sequence[torch.Tensor],
    kept: torch.Tensor,
    metrics: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """`_lost` of each problem, `[P]`, float64, for vectors `[P, N, W]` and one `kept` `[N, D]` for all."""
    errors = [
        [_lost(rows, mean, basis, own_kept, metric).double() for rows, own_kept in zip(*pieces, strict=True)]
        for pieces, mean, basis, metric in zip(
            ((own.split(ROWS), kept.split(ROWS)) for own in x), means, bases, metrics, strict=True
        )
    ]
    return torch.stack([torch.stack(own).sum() for own in errors])


def _scale(x: torch.Tensor, mean: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Root mean squares `[D]` of the coordinates of vectors `[N, W]`, none too small to divide by."""
    squares = [((rows.float() - mean) @ basis).square().sum(dim=0, dtype=torch.float64) for rows in x.split(ROWS)]
    variances = torch.stack(squares).sum(dim=0) / len(x)
    return variances.clamp_min(variances.max().clamp_min(1e-30) * 1e-12).sqrt().float()

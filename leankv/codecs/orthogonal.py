"""`ortho:D`: a trained orthogonal projection, good for every number of its directions."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from leankv.codecs.base import Codec, Context, FitData, Recipe, TrainingSettings, Vectors
from leankv.codecs.code import Code
from leankv.codecs.coding.principal_components import principal_components
from leankv.codecs.pca import projected, reconstructed
from leankv.codecs.registry import register
from leankv.codecs.statistics import ROWS, mean_of, sum_of_squares


@register
@dataclass(frozen=True)
class OrthogonalRecipe(Recipe):
    """`dimensions` orthonormal directions, trained so that each prefix of them is good."""

    dimensions: int

    family = "ortho"
    revision = 1
    grammar = "ortho:D (D from 1 to the width)"

    @classmethod
    def parse(cls, arguments: str) -> "OrthogonalRecipe":
        if re.fullmatch(r"[1-9][0-9]*", arguments) is None:
            raise ValueError
        return cls(int(arguments))

    @property
    def arguments(self) -> str:
        return str(self.dimensions)

    def check_width(self, width: int) -> None:
        if self.dimensions > width:
            raise ValueError(f"D = {self.dimensions} is more than the width {width}")

    @torch.enable_grad()  # whatever holds where a notebook calls it
    def fit(self, data: FitData) -> list[Codec]:
        """Adam (Kingma and Ba, 2015, arXiv 1412.6980) with a cosine schedule to zero; the epoch of least held-out error
        is kept.

        That error is summed over prefixes under the error metric, as in training. `on_epoch` is given the held-out FVU
        of all D dimensions.
        """
        dimensions, train, heldout, training = self.dimensions, data.train, data.heldout, data.training
        tokens = train.shape[1]
        means = mean_of(train)
        error_metrics = [None] * len(train) if data.error_metric is None else [own.float() for own in data.error_metric]
        bases, totals = [], []
        for x, own in zip(train, error_metrics, strict=True):
            found = principal_components(x, own)
            bases.append(torch.linalg.qr(found.analysis[:, :dimensions]).Q.contiguous().requires_grad_())
            totals.append(found.variances.sum().clamp_min(1e-30).item())

        generator = torch.Generator().manual_seed(training.seed)

        def drawn_prefixes(count: int) -> torch.Tensor:
            lengths = torch.randint(1, dimensions + 1, (count, 1), generator=generator)
            return (torch.arange(dimensions) < lengths).to(train.device)

        heldout_kept = drawn_prefixes(heldout.shape[1])
        spread = sum_of_squares(heldout, mean_of(heldout)[:, None])

        def nested_error() -> torch.Tensor:
            return _lost_by_each(heldout, means, bases, heldout_kept, error_metrics)

        optimizer = torch.optim.Adam(bases, lr=training.learning_rate)
        steps = max(1, training.epochs * math.ceil(tokens / training.batch_tokens))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        best = [torch.linalg.qr(basis.detach()).Q for basis in bases]
        lowest = nested_error()
        for epoch in range(1, training.epochs + 1):
            for rows in torch.randperm(tokens, generator=generator).to(train.device).split(training.batch_tokens):
                kept = drawn_prefixes(len(rows))
                optimizer.zero_grad(set_to_none=True)
                for x, mean, basis, own, total in zip(train, means, bases, error_metrics, totals, strict=True):
                    (_lost(x[rows], mean, basis, kept, own) / (total * len(rows))).backward()
                optimizer.step()
                schedule.step()
            error = nested_error()
            for index in (error < lowest).nonzero().flatten().tolist():
                best[index] = torch.linalg.qr(bases[index].detach()).Q
            lowest = torch.minimum(error, lowest)
            of_all = _lost_by_each(heldout, means, bases, torch.ones_like(heldout_kept), [None] * len(bases))
            data.on_epoch(epoch, of_all / spread)
        found_bases = zip(train, means, best, strict=True)
        return [Orthogonal(self, b.contiguous(), m.clone(), _scale(x, m, b)) for x, m, b in found_bases]

    def unfitted(self, width: int) -> Codec:
        return Orthogonal(self, torch.zeros(width, self.dimensions), torch.zeros(width), torch.ones(self.dimensions))

    def working_bytes(self, width: int, training: TrainingSettings) -> int:
        # The basis, its gradient, Adam's two moments, the best so far, a decomposition; one step's vectors.
        return 4 * (8 * width * self.dimensions + training.batch_tokens * (6 * width + 4 * self.dimensions))


class Orthogonal(Codec):
    """Projects on D orthonormal directions trained to be good for every number of them (MatryoshkaKV).

        z = U^T (x - mean),        x_hat = mean + U z,        U^T U = I

    After Lin et al., 2024 (arXiv 2410.14731): U starts at principal components and is trained so that the error summed
    over the prefixes of its columns is least: each token of each step keeps a number of them drawn from 1 to D. U is
    the Q of a QR decomposition throughout, so it stays orthogonal, and prefixes stay prefixes. MatryoshkaKV trains
    through the network's own loss; here the error metric stands for that. So without one there is nothing to gain: the
    components are best for every prefix at once (Eckart and Young, 1936). With one, the components of `pca:D` are best
    too, but take two matrices; this is one, whose transpose undoes it.

    Storage: D float16 numbers a token. What it does not do: bend (see `ae`), quantize, or give tokens different numbers
    of dimensions.
    """

    def __init__(
        self,
        recipe: OrthogonalRecipe,
        basis: Float[torch.Tensor, "width dimensions"],
        mean: Float[torch.Tensor, " width"],
        scale: Float[torch.Tensor, " dimensions"],
    ):
        """
        Args:
            recipe: what it was fitted as.
            basis: orthonormal columns.
            mean: of the vectors.
            scale: root mean square of each coordinate, by which it is divided to suit float16.
        """
        super().__init__(recipe, len(mean))
        self.basis = torch.nn.Parameter(basis, requires_grad=False)
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)
        self.scale: torch.Tensor
        self.register_buffer("scale", scale)

    @property
    def bits_per_token(self) -> int:
        return len(self.scale) * 16

    def encode(self, x: Vectors, context: Context = None) -> Code:
        return projected(x, self.mean, self.basis, self.scale)

    def decode(self, code: Code, context: Context = None) -> Vectors:
        return reconstructed(code, self.mean, self.basis.T, self.scale)


def _lost(
    x: torch.Tensor, mean: torch.Tensor, basis: torch.Tensor, kept: torch.Tensor, error_metric: torch.Tensor | None
) -> torch.Tensor:
    """Error, summed over vectors `[n, W]`, of projecting each on those columns of Q of `basis` `[W, D]` that it keeps.

    Args:
        kept: `[n, D]`, bool.
        error_metric: `[W, W]`; None for the plain squared error.
    """
    centred = x.float() - mean
    q = torch.linalg.qr(basis).Q
    error = centred - (centred @ q * kept) @ q.T
    return (error * (error if error_metric is None else error @ error_metric)).sum()


@torch.no_grad()
def _lost_by_each(
    x: torch.Tensor,
    means: torch.Tensor,
    bases: Sequence[torch.Tensor],
    kept: torch.Tensor,
    error_metrics: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """`_lost` of each site, `[P]`, float64, for vectors `[P, N, W]` and one `kept` `[N, D]` for all."""
    errors = [
        [_lost(rows, mean, basis, own_kept, error_metric).double() for rows, own_kept in zip(*pieces, strict=True)]
        for pieces, mean, basis, error_metric in zip(
            ((own.split(ROWS), kept.split(ROWS)) for own in x), means, bases, error_metrics, strict=True
        )
    ]
    return torch.stack([torch.stack(own).sum() for own in errors])


def _scale(x: torch.Tensor, mean: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Root mean squares `[D]` of the coordinates of vectors `[N, W]`, none too small to divide by."""
    squares = [((rows.float() - mean) @ basis).square().sum(dim=0, dtype=torch.float64) for rows in x.split(ROWS)]
    variances = torch.stack(squares).sum(dim=0) / len(x)
    return variances.clamp_min(variances.max().clamp_min(1e-30) * 1e-12).sqrt().float()

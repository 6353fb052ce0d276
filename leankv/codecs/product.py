"""`pq:MxB`: each of M stretches of a vector is replaced by the nearest of 2^B typical ones."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch

from leankv.codecs.base import ROWS, Code, Codec, TrainingSettings, mean_of, sampled
from leankv.codecs.packing import pack, packed_bytes, unpack
from leankv.errors import UserError

ITERATIONS = 15  # assumption: the error falls by less than a percent after these
PER_CENTROID = 64  # vectors fitted to; faiss warns under 39 and uses up to 256


class ProductQuantizer(Codec):
    """Product quantization: M neighbouring stretches of `d = W / M` channels, each with a codebook of 2^B (k-means).

        q_m = argmin_c |root_m^T ((x - mean)_m - codebook[m, c])|,        (x_hat)_m = mean_m + codebook[m, q_m]

    After Jegou et al., 2011, as MILLION (2025) does for caches. Under a metric, errors within a stretch count by its
    block on the metric's diagonal, `root_m root_m^T`, in fitting and in encoding; what the metric says of two
    stretches together is left out. Seeded: k-means starts at vectors of the calibration text; a centroid that is
    nearest to nothing moves to the vector that is farthest from its own.

    Storage: B bits for each stretch, a row padded to whole bytes. What it does not do: choose which channels lie in a
    stretch together, correct outliers (a vector far from all typical ones becomes a typical one), or spend more bits on
    stretches that vary more.
    """

    family = "pq"
    revision = 1
    grammar = "pq:MxB (M stretches, dividing the width; B from 1 to 8)"

    def __init__(self, codebook: torch.Tensor, root: torch.Tensor, mean: torch.Tensor):
        """
        Args:
            codebook: `[M, 2^B, d]`, centred.
            root: `[M, d, d]`, Cholesky factors of the metric's blocks; identities without one.
            mean: `[W]`.
        """
        super().__init__(len(mean))
        self.codebook = torch.nn.Parameter(codebook, requires_grad=False)
        self.root: torch.Tensor
        self.register_buffer("root", root)
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)

    @property
    def bits(self) -> int:
        return self.codebook.shape[1].bit_length() - 1

    @property
    def spec(self) -> str:
        return f"pq:{len(self.codebook)}x{self.bits}"

    @property
    def bits_per_token(self) -> int:
        return 8 * packed_bytes(len(self.codebook), self.bits)

    def encode(self, x: torch.Tensor) -> Code:
        centroids = self.codebook.float() @ self.root
        found = [_nearest(v, centroids)[0] for v in _stretches(x, self.mean, self.root, centroids.shape[1])]
        return {"q": pack(torch.cat(found, dim=1).T, self.bits)}

    def decode(self, code: Code) -> torch.Tensor:
        count, centroids, _ = self.codebook.shape
        first = centroids * torch.arange(count, device=self.codebook.device)  # of each stretch, all in one table
        index = unpack(code["q"], self.bits, count) + first
        return self.mean + self.codebook.flatten(0, 1)[index].flatten(1).float()

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
        """Fit codebooks in turn, each to a sample of its vectors.

        Raises:
            UserError: fewer vectors than centroids.
        """
        count, bits = arguments
        if train.shape[1] < 2**bits:
            raise UserError(
                f"codec pq:{count}x{bits} needs at least {2**bits} calibration vectors to fit to, but there are "
                f"{train.shape[1]}; take more calibration text or fewer bits"
            )
        codecs = []
        for index, x in enumerate(train):
            d = x.shape[1] // count
            blocks = torch.eye(d, device=x.device).expand(count, -1, -1)
            if metric is not None:
                blocks = torch.stack([metric[index, m * d : m * d + d, m * d : m * d + d] for m in range(count)])
            root = torch.linalg.cholesky(blocks.double()).contiguous()
            mean = mean_of(x)
            sample = sampled(x, PER_CENTROID * 2**bits, settings.seed)
            centroids = _k_means(sample, mean, root.float(), 2**bits, settings.seed)
            codebook = torch.linalg.solve_triangular(root.mT, centroids.double().mT, upper=True).mT.float()
            codecs.append(cls(codebook.contiguous(), root.float(), mean))
        return codecs

    @classmethod
    def empty(cls, arguments: Sequence[Any], width: int) -> Self:
        count, bits = arguments
        d = width // count
        return cls(torch.zeros(count, 2**bits, d), torch.zeros(count, d, d), torch.zeros(width))

    @classmethod
    def parse_arguments(cls, text: str) -> tuple[Any, ...]:
        match = re.fullmatch(r"([1-9][0-9]*)x([1-8])", text)
        if match is None:
            raise ValueError
        return int(match[1]), int(match[2])

    @classmethod
    def check_width(cls, arguments: Sequence[Any], width: int) -> None:
        if width % arguments[0]:
            raise ValueError(f"{arguments[0]} stretches do not divide the width {width}")


def _stretches(x: torch.Tensor, mean: torch.Tensor, root: torch.Tensor, centroids: int) -> Iterator[torch.Tensor]:
    """Pieces `[M, n, d]` of `x` `[N, W]`, centred, in the metric's coordinates; n such that distances fit memory."""
    count = len(root)
    for rows in x.split(max(1, ROWS * len(mean) // (count * centroids))):
        yield (rows.float() - mean).unflatten(1, (count, -1)).transpose(0, 1) @ root


def _nearest(v: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of, and squared distance to, the nearest of `centroids` `[M, K, d]`, for `v` `[M, n, d]`; `[M, n]` each."""
    sizes = centroids.square().sum(dim=2)
    least = torch.baddbmm(sizes[:, None], v, centroids.mT, alpha=-2).min(dim=2)
    return least.indices, (least.values + v.square().sum(dim=2)).clamp_min(0)


def _k_means(x: torch.Tensor, mean: torch.Tensor, root: torch.Tensor, centroids: int, seed: int) -> torch.Tensor:
    """`[M, K, d]`: K centroids of each stretch of the vectors `[N, W]` (Lloyd), in the metric's coordinates."""
    start = sampled(x, centroids, seed + 1)  # another draw than the sample's, of which these would be the first
    found = torch.cat(list(_stretches(start, mean, root, centroids)), dim=1)
    count, _, d = found.shape
    for _ in range(ITERATIONS):
        sums = torch.zeros(count, centroids, d + 1, dtype=torch.float64, device=x.device)
        errors = []
        for v in _stretches(x, mean, root, centroids):
            index, error = _nearest(v, found)
            ones = torch.nn.functional.pad(v, (0, 1), value=1).double()
            sums.scatter_add_(1, index[:, :, None].expand_as(ones), ones)
            errors.append(error)
        sizes = sums[:, :, -1:]
        found = torch.where(sizes > 0, sums[:, :, :-1] / sizes.clamp_min(1), found.double()).float()
        empty = sizes[:, :, 0] == 0
        if empty.any():
            farthest = torch.cat(errors, dim=1).topk(int(empty.sum(dim=1).max()), dim=1).indices
            places = empty.cumsum(dim=1) - 1  # each empty one of a stretch takes another vector
            for m, c in empty.nonzero().tolist():
                row = x[farthest[m, places[m, c]]][None]
                found[m, c] = next(_stretches(row, mean, root, centroids))[m, 0]
    return found

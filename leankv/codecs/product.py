"""`pq:MxB`: each of M subvectors of a vector is replaced by the nearest of 2^B centroids."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float

from leankv.codecs.base import Codec, Context, FitData, Recipe, Vectors
from leankv.codecs.code import Code
from leankv.codecs.coding.packing import pack, packed_bytes, unpack
from leankv.codecs.registry import register
from leankv.codecs.statistics import ROWS, mean_of, sampled
from leankv.errors import UserError

ITERATIONS = 15  # assumption: the error falls by less than a percent after these
PER_CENTROID = 64  # vectors fitted to; faiss warns under 39 and uses up to 256


@register
@dataclass(frozen=True)
class ProductQuantizerRecipe(Recipe):
    """`2^bits` centroids for each of so many `subvectors`."""

    subvectors: int
    bits: int

    family = "pq"
    revision = 1
    grammar = "pq:MxB (M subvectors, dividing the width; B from 1 to 8)"

    @classmethod
    def parse(cls, arguments: str) -> "ProductQuantizerRecipe":
        match = re.fullmatch(r"([1-9][0-9]*)x([1-8])", arguments)
        if match is None:
            raise ValueError
        return cls(int(match[1]), int(match[2]))

    @property
    def arguments(self) -> str:
        return f"{self.subvectors}x{self.bits}"

    def check_width(self, width: int) -> None:
        if width % self.subvectors:
            raise ValueError(f"{self.subvectors} subvectors do not divide the width {width}")

    def fit(self, data: FitData) -> list[Codec]:
        """Fit codebooks in turn, each to a sample of its vectors.

        Raises:
            UserError: fewer vectors than centroids.
        """
        count, bits, train = self.subvectors, self.bits, data.train
        if train.shape[1] < 2**bits:
            raise UserError(
                f"codec {self.text} needs at least {2**bits} calibration vectors to fit to, but there are "
                f"{train.shape[1]}; take more calibration text or fewer bits"
            )
        codecs: list[Codec] = []
        for index, x in enumerate(train):
            d = x.shape[1] // count
            blocks = torch.eye(d, device=x.device).expand(count, -1, -1)
            if data.error_metric is not None:
                whole = data.error_metric[index]
                blocks = torch.stack([whole[m * d : m * d + d, m * d : m * d + d] for m in range(count)])
            root = torch.linalg.cholesky(blocks.double()).contiguous()
            mean = mean_of(x)
            sample = sampled(x, PER_CENTROID * 2**bits, data.training.seed)
            centroids = _k_means(sample, mean, root.float(), 2**bits, data.training.seed)
            codebook = torch.linalg.solve_triangular(root.mT, centroids.double().mT, upper=True).mT.float()
            codecs.append(ProductQuantizer(self, codebook.contiguous(), root.float(), mean))
        return codecs

    def unfitted(self, width: int) -> Codec:
        count, d = self.subvectors, width // self.subvectors
        codebook, root = torch.zeros(count, 2**self.bits, d), torch.zeros(count, d, d)
        return ProductQuantizer(self, codebook, root, torch.zeros(width))


class ProductQuantizer(Codec):
    """Product quantization: M neighbouring subvectors of `d = W / M` channels, each with a codebook of 2^B (k-means).

        q_m = argmin_c |root_m^T ((x - mean)_m - codebook[m, c])|,        (x_hat)_m = mean_m + codebook[m, q_m]

    After Jegou et al., 2011, as MILLION (arXiv 2504.03661) does for caches. Under an error metric, errors within a
    subvector count by its block on the metric's diagonal, `root_m root_m^T`, in fitting and in encoding; what the
    metric says of two subvectors together is left out. Seeded: k-means starts at vectors of the calibration text; a
    centroid that is nearest to nothing moves to the vector that is farthest from its own.

    Storage: B bits for each subvector, a row padded to whole bytes. What it does not do: choose which channels lie in a
    subvector together, correct outliers (a vector far from all centroids becomes a centroid), or spend more bits on
    subvectors that vary more.
    """

    def __init__(
        self,
        recipe: ProductQuantizerRecipe,
        codebook: Float[torch.Tensor, "subvectors centroids d"],
        root: Float[torch.Tensor, "subvectors d d"],
        mean: Float[torch.Tensor, " width"],
    ):
        """
        Args:
            recipe: what it was fitted as.
            codebook: centred; `2^B` centroids for each subvector.
            root: Cholesky factors of the error metric's blocks; identities without one.
            mean: of the vectors.
        """
        super().__init__(recipe, len(mean))
        self.bits = recipe.bits
        self.codebook = torch.nn.Parameter(codebook, requires_grad=False)
        self.root: torch.Tensor
        self.register_buffer("root", root)
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)

    @property
    def bits_per_token(self) -> int:
        return 8 * packed_bytes(len(self.codebook), self.bits)

    def encode(self, x: Vectors, context: Context = None) -> Code:
        centroids = self.codebook.float() @ self.root
        found = [_nearest(v, centroids)[0] for v in _subvectors(x, self.mean, self.root, centroids.shape[1])]
        return Code({"q": pack(torch.cat(found, dim=1).T, self.bits)})

    def decode(self, code: Code, context: Context = None) -> Vectors:
        count, centroids, _ = self.codebook.shape
        first = centroids * torch.arange(count, device=self.codebook.device)  # of each subvector, all in one table
        index = unpack(code["q"], self.bits, count) + first
        return self.mean + self.codebook.flatten(0, 1)[index].flatten(1).float()


def _subvectors(x: torch.Tensor, mean: torch.Tensor, root: torch.Tensor, centroids: int) -> Iterator[torch.Tensor]:
    """Pieces `[M, n, d]` of `x` `[N, W]`, centred, in the error metric's coordinates; n such that all distances fit."""
    count = len(root)
    for rows in x.split(max(1, ROWS * len(mean) // (count * centroids))):
        yield (rows.float() - mean).unflatten(1, (count, -1)).transpose(0, 1) @ root


def _nearest(v: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of, and squared distance to, the nearest of `centroids` `[M, K, d]`, for `v` `[M, n, d]`; `[M, n]` each."""
    sizes = centroids.square().sum(dim=2)
    least = torch.baddbmm(sizes[:, None], v, centroids.mT, alpha=-2).min(dim=2)
    return least.indices, (least.values + v.square().sum(dim=2)).clamp_min(0)


def _k_means(x: torch.Tensor, mean: torch.Tensor, root: torch.Tensor, centroids: int, seed: int) -> torch.Tensor:
    """`[M, K, d]`: K centroids of each subvector of the vectors `[N, W]` (Lloyd), in the error metric's coordinates."""
    start = sampled(x, centroids, seed + 1)  # another draw than the sample's, of which these would be the first
    found = torch.cat(list(_subvectors(start, mean, root, centroids)), dim=1)
    count, _, d = found.shape
    for _ in range(ITERATIONS):
        sums = torch.zeros(count, centroids, d + 1, dtype=torch.float64, device=x.device)
        errors = []
        for v in _subvectors(x, mean, root, centroids):
            index, error = _nearest(v, found)
            ones = torch.nn.functional.pad(v, (0, 1), value=1).double()
            sums.scatter_add_(1, index[:, :, None].expand_as(ones), ones)
            errors.append(error)
        sizes = sums[:, :, -1:]
        found = torch.where(sizes > 0, sums[:, :, :-1] / sizes.clamp_min(1), found.double()).float()
        empty = sizes[:, :, 0] == 0
        if empty.any():
            farthest = torch.cat(errors, dim=1).topk(int(empty.sum(dim=1).max()), dim=1).indices
            places = empty.cumsum(dim=1) - 1  # each empty one of a subvector takes another vector
            for m, c in empty.nonzero().tolist():
                row = x[farthest[m, places[m, c]]][None]
                found[m, c] = next(_subvectors(row, mean, root, centroids))[m, 0]
    return found

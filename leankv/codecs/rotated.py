"""`rot:B`, `rot:B+qjl`: a random rotation, then the levels that suit what any rotated vector looks like."""

import math
import re
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8

from leankv.codecs.base import Codec, Context, Factored, FitData, Recipe, Vectors, as_float16
from leankv.codecs.code import Code
from leankv.codecs.coding.lloyd_max import gaussian_levels, nearest_level
from leankv.codecs.coding.packing import looked_up, pack, packed_bytes, unpack
from leankv.codecs.registry import register
from leankv.codecs.statistics import mean_of
from leankv.compiled.packed_rows import PackedRows, ScaledRows

SMALLEST_NORM = 1e-30  # what nothing is divided by


@register
@dataclass(frozen=True)
class RotatedRecipe(Recipe):
    """`bits` a number after a random rotation; `with_sketch` one more, for what is left (`+qjl`)."""

    bits: int
    with_sketch: bool

    family = "rot"
    revision = 1
    grammar = "rot:B or rot:B+qjl (B from 1 to 8)"

    @classmethod
    def parse(cls, arguments: str) -> "RotatedRecipe":
        match = re.fullmatch(r"([1-8])(\+qjl)?", arguments)
        if match is None:
            raise ValueError
        return cls(int(match[1]), bool(match[2]))

    @property
    def arguments(self) -> str:
        return f"{self.bits}+qjl" if self.with_sketch else str(self.bits)

    @property
    def needs_text(self) -> bool:
        """No: the mean is all that it learns, and without text that is taken to be zero, as TurboQuant does."""
        return False

    def fit(self, data: FitData) -> list[Codec]:
        width, device = data.train.shape[2], data.train.device
        codecs: list[Codec] = []
        for x in data.train:
            generator = torch.Generator().manual_seed(data.training.seed)  # on the CPU: the same on every device
            signs = (2 * torch.randint(2, (2, width), generator=generator) - 1).to(device, torch.int8)
            sketch = None
            if self.with_sketch:
                sketch = torch.randn(width, width, generator=generator).to(device, torch.float16)
            levels = gaussian_levels(self.bits).to(device, copy=True)
            codecs.append(Rotated(self, mean_of(x), levels, signs, sketch))
        return codecs

    def unfitted(self, width: int) -> Codec:
        sketch = torch.zeros(width, width, dtype=torch.float16) if self.with_sketch else None
        signs = torch.ones(2, width, dtype=torch.int8)
        return Rotated(self, torch.zeros(width), torch.zeros(2**self.bits), signs, sketch)


class Rotated(Codec):
    """Rotates the direction of each vector at random and rounds its coordinates to fixed levels (TurboQuant).

        y = R (x - mean),   n = |y|,   q = nearest of levels / sqrt(W) to y / n,
        x_hat = mean + R^T y_hat,      y_hat = n levels[q] / sqrt(W)

    After Zandieh et al., 2025 (arXiv 2504.19874; and RotateKV: arXiv 2501.16383): each coordinate of a randomly rotated
    unit vector is nearly normally distributed with variance 1 / W, whatever the vector was, so the levels are those of
    the normal distribution (Max, 1960), and nothing but the mean is fitted. TurboQuant takes the levels of the exact
    distribution, a Beta, which differs little at the widths of caches. R is two rounds of random signs and a Hartley
    transform: a rotation at any width for 2 W signs, where a Hadamard transform wants a power of two.

    `+qjl` (Zandieh et al., 2024, arXiv 2406.03482) adds an estimate of what the levels left, `r = y - y_hat`, from the
    signs of Gaussian projections:  `r_hat = sqrt(pi / 2) / W |r| S^T sign(S r)`,  S `[W, W]` standard normal. Over the
    draw of S, inner products with x_hat then have the right mean, which levels alone shrink; the squared error of a
    vector itself grows.

    Storage: B bits a number and the float16 norm; with `+qjl` one more bit a number and the float16 norm of r. Rows of
    bits are padded to whole bytes. What it does not do: learn from calibration text where the error matters or the
    variance lies (see `pca`, `pq`), or rotate heads apart.
    """

    def __init__(
        self,
        recipe: RotatedRecipe,
        mean: Float[torch.Tensor, " width"],
        levels: Float[torch.Tensor, " levels"],
        signs: Int8[torch.Tensor, "2 width"],
        sketch: Float[torch.Tensor, "width width"] | None,
    ):
        """
        Args:
            recipe: what it was fitted as.
            mean: of the vectors.
            levels: `2^B`, rising, for the standard normal distribution.
            signs: 1 and -1: what the rotation is drawn from.
            sketch: the S of `+qjl`.
        """
        super().__init__(recipe, len(mean))
        self.bits = recipe.bits
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)
        self.levels: torch.Tensor
        self.register_buffer("levels", levels)
        self.signs: torch.Tensor
        self.register_buffer("signs", signs)
        self.sketch: torch.Tensor | None
        self.register_buffer("sketch", sketch)

    @property
    def bits_per_token(self) -> int:
        bits = 8 * packed_bytes(self.width, self.bits) + 16
        return bits if self.sketch is None else bits + 8 * packed_bytes(self.width, 1) + 16

    def encode(self, x: Vectors, context: Context = None) -> Code:
        y = self.rotate(x.float() - self.mean)
        norm = y.norm(dim=1, keepdim=True)
        q = nearest_level(y * (math.sqrt(self.width) / norm.clamp_min(SMALLEST_NORM)), self.levels)
        columns = {"q": pack(q, self.bits), "norm": as_float16(norm)}
        if self.sketch is not None:
            left = y - self._scale(columns["norm"]) * self.levels[q]
            columns["signs"] = pack(left @ self.sketch.float().T >= 0, 1)
            columns["left"] = as_float16(left.norm(dim=1, keepdim=True))
        return Code(columns)

    @property
    def has_packed_rows(self) -> bool:
        return self.sketch is None

    def loop_matrix(self) -> Float[torch.Tensor, "width width"]:
        """`R`: what rows are multiplied by to be rotated back."""
        return self.rotate_back(torch.eye(self.width, device=self.mean.device))

    def packed_rows(self, code: Code, matrix: torch.Tensor | None = None) -> PackedRows:
        scale = self._scale(code["norm"]).flatten()
        matrix = self.loop_matrix() if matrix is None else matrix
        return ScaledRows(code["q"], self.bits, self.levels, scale, matrix, self.mean)

    def factored(self, code: Code) -> Factored:
        return Factored(self._turned(code), self.loop_matrix(), self.mean)

    def decode(self, code: Code, context: Context = None) -> Vectors:
        return self.mean + self.rotate_back(self._turned(code))

    def _turned(self, code: Code) -> torch.Tensor:
        """`R (x - mean)` as the code has it."""
        y = looked_up(self.levels, code["q"], self.bits, self.width).mul_(self._scale(code["norm"]))
        if self.sketch is not None:
            signs = 2.0 * unpack(code["signs"], 1, self.width) - 1
            y += math.sqrt(math.pi / 2) / self.width * code["left"].float() * (signs @ self.sketch.float())
        return y

    def _scale(self, norm: torch.Tensor) -> torch.Tensor:
        return norm.float() / math.sqrt(self.width)

    def rotate(self, x: Vectors) -> Vectors:
        """`R x`, float32."""
        first, second = self.signs
        return _hartley(second * _hartley(first * x))

    def rotate_back(self, y: Vectors) -> Vectors:
        """`R^T y`: undoes `rotate`."""
        first, second = self.signs
        return first * _hartley(second * _hartley(y))


def _hartley(x: torch.Tensor) -> torch.Tensor:
    """The Hartley transform of the rows of `[N, W]`: orthogonal, symmetric and so its own inverse, at any W."""
    if not len(x):
        return x  # MKL's transform refuses no rows
    spectrum = torch.fft.fft(x, norm="ortho")
    return spectrum.real - spectrum.imag

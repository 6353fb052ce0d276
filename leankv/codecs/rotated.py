"""`rot:B`, `rot:B+qjl`: a random rotation, then the levels that suit what any rotated vector looks like."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from leankv.codecs.base import Code, Codec, TrainingSettings, as_float16, mean_of
from leankv.codecs.levels import gaussian_levels, nearest_level
from leankv.codecs.packing import pack, packed_bytes, unpack

SMALLEST_NORM = 1e-30  # what nothing is divided by


class Rotated(Codec):
    """Rotates the direction of each vector at random and rounds its coordinates to fixed levels (TurboQuant).

        y = R (x - mean),   n = |y|,   q = nearest of levels / sqrt(W) to y / n,
        x_hat = mean + R^T y_hat,      y_hat = n levels[q] / sqrt(W)

    After Zandieh et al., 2025 (and RotateKV: Su et al., 2025): each coordinate of a randomly rotated unit vector is
    nearly normally distributed with variance 1 / W, whatever the vector was, so the levels are those of the normal
    distribution (Max, 1960), and nothing but the mean is fitted. TurboQuant takes the levels of the exact distribution,
    a Beta, which differs little at the widths of caches. R is two rounds of random signs and a Hartley transform: a
    rotation at any width for 2 W signs, where a Hadamard transform wants a power of two.

    `+qjl` (Zandieh et al., 2024) adds an estimate of what the levels left, `r = y - y_hat`, from the signs of Gaussian
    projections:  `r_hat = sqrt(pi / 2) / W |r| S^T sign(S r)`,  S `[W, W]` standard normal. Over the draw of S, inner
    products with x_hat then have the right mean, which levels alone shrink; the squared error of a vector itself grows.

    Storage: B bits a number and the float16 norm; with `+qjl` one more bit a number and the float16 norm of r. Rows of
    bits are padded to whole bytes. What it does not do: learn from calibration text where the error matters or the
    variance lies (see `pca`, `pq`), or rotate heads apart.
    """

    family = "rot"
    revision = 1
    grammar = "rot:B or rot:B+qjl (B from 1 to 8)"

    def __init__(self, mean: torch.Tensor, levels: torch.Tensor, signs: torch.Tensor, sketch: torch.Tensor | None):
        """
        Args:
            mean: `[W]`.
            levels: `[2^B]`, rising, for the standard normal distribution.
            signs: `[2, W]`, int8, 1 and -1: what the rotation is drawn from.
            sketch: `[W, W]`, float16, the S of `+qjl`.
        """
        super().__init__(len(mean))
        self.bits = len(levels).bit_length() - 1
        self.mean: torch.Tensor
        self.register_buffer("mean", mean)
        self.levels: torch.Tensor
        self.register_buffer("levels", levels)
        self.signs: torch.Tensor
        self.register_buffer("signs", signs)
        self.sketch: torch.Tensor | None
        self.register_buffer("sketch", sketch)

    @property
    def spec(self) -> str:
        return f"rot:{self.bits}" + ("" if self.sketch is None else "+qjl")

    @property
    def bits_per_token(self) -> int:
        bits = 8 * packed_bytes(self.width, self.bits) + 16
        return bits if self.sketch is None else bits + 8 * packed_bytes(self.width, 1) + 16

    def encode(self, x: torch.Tensor) -> Code:
        y = self.rotate(x.float() - self.mean)
        norm = y.norm(dim=1, keepdim=True)
        q = nearest_level(y * (math.sqrt(self.width) / norm.clamp_min(SMALLEST_NORM)), self.levels)
        code = {"q": pack(q, self.bits), "norm": as_float16(norm)}
        if self.sketch is not None:
            left = y - self._rounded(q, code["norm"])
            code["signs"] = pack(left @ self.sketch.float().T >= 0, 1)
            code["left"] = as_float16(left.norm(dim=1, keepdim=True))
        return code

    def decode(self, code: Code) -> torch.Tensor:
        y = self._rounded(unpack(code["q"], self.bits, self.width).int(), code["norm"])
        if self.sketch is not None:
            signs = 2.0 * unpack(code["signs"], 1, self.width) - 1
            y += math.sqrt(math.pi / 2) / self.width * code["left"].float() * (signs @ self.sketch.float())
        return self.mean + self.rotate_back(y)

    def _rounded(self, q: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return norm.float() / math.sqrt(self.width) * self.levels[q]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """`R x` of vectors `[N, W]`, float32."""
        first, second = self.signs
        return _hartley(second * _hartley(first * x))

    def rotate_back(self, y: torch.Tensor) -> torch.Tensor:
        """`R^T y`: undoes `rotate`."""
        first, second = self.signs
        return first * _hartley(second * _hartley(y))

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
        bits, with_sketch = arguments
        width, device = train.shape[2], train.device
        codecs = []
        for x in train:
            generator = torch.Generator().manual_seed(settings.seed)  # drawn on the CPU: the same on every device
            signs = (2 * torch.randint(2, (2, width), generator=generator) - 1).to(device, torch.int8)
            sketch = torch.randn(width, width, generator=generator).to(device, torch.float16) if with_sketch else None
            codecs.append(cls(mean_of(x), gaussian_levels(bits).to(device, copy=True), signs, sketch))
        return codecs

    @classmethod
    def empty(cls, arguments: Sequence[Any], width: int) -> Self:
        bits, with_sketch = arguments
        sketch = torch.zeros(width, width, dtype=torch.float16) if with_sketch else None
        return cls(torch.zeros(width), torch.zeros(2**bits), torch.ones(2, width, dtype=torch.int8), sketch)

    @classmethod
    def parse_arguments(cls, text: str) -> tuple[Any, ...]:
        match = re.fullmatch(r"([1-8])(\+qjl)?", text)
        if match is None:
            raise ValueError
        return int(match[1]), bool(match[2])


def _hartley(x: torch.Tensor) -> torch.Tensor:
    """The Hartley transform of the rows of `[N, W]`: orthogonal, symmetric and so its own inverse, at any W."""
    if not len(x):
        return x  # MKL's transform refuses no rows
    spectrum = torch.fft.fft(x, norm="ortho")
    return spectrum.real - spectrum.imag

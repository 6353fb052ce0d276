"""Matrices that codecs carry as small integers, rounded so that what they are multiplied with hardly notices."""

import torch
from jaxtyping import Float, Float32

LARGEST = {4: 7, 8: 127, 16: 32639}
"""By bits. Two integers of 4 bits make up a byte `16 a + b`, two bytes one of 16 bits `256 a + b`, all of them signed.
"""

CLIPPED = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # shares of the range tried where it has 15 steps only
BLOCK = 64  # rows whose errors are carried on at once; others give the same but for the last bits
DAMPING = 1e-6  # assumption: of the mean weight; keeps directions that never occur from deciding anything


class IntegerMatrix(torch.nn.Module):
    """A matrix `[rows, columns]` of integers of 4, 8 or 16 bits, with a scale for each column: `integers * scale`.

    It takes so many bits a number wherever it is held, and is widened to float32 where it is used.

    Attributes:
        integers: int8 `[rows / 2, columns]` of 4 bits, a byte two rows; `[rows, columns]` of 8; `[2 rows, columns]` of
            16, the upper halves of all rows first.
        scale: `[columns]`.
    """

    def __init__(self, rows: int, columns: int, bits: int = 8):
        """Zeros; `rounded` fills them in."""
        super().__init__()
        self.rows, self.bits = rows, bits
        self.integers: torch.Tensor
        self.register_buffer("integers", torch.zeros(-(-rows * bits // 8), columns, dtype=torch.int8))
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.ones(columns))

    def __len__(self) -> int:
        return self.rows

    def fill(self, whole: Float[torch.Tensor, "rows columns"]) -> None:
        """Keep whole numbers that the bits hold."""
        if self.bits == 4:
            whole = torch.nn.functional.pad(whole, (0, 0, 0, len(whole) % 2))
            whole = 16 * whole[::2] + whole[1::2]
        elif self.bits == 16:
            upper = ((whole + 128) / 256).floor()  # so that what is left is -128 to 127, halves included
            whole = torch.cat([upper, whole - 256 * upper])
        self.integers.copy_(whole)

    def widened(self) -> Float32[torch.Tensor, "rows columns"]:
        if self.bits == 8:
            return self.integers.float().mul_(self.scale)
        if self.bits == 16:
            upper, lower = self.integers.chunk(2)
            return (256 * upper.float()).add_(lower).mul_(self.scale)
        lower = (self.integers + 8 & 15) - 8
        upper = self.integers - lower >> 4
        return torch.stack([upper, lower], dim=1).flatten(0, 1)[: self.rows] * self.scale

    def transposed(self) -> Float32[torch.Tensor, "columns rows"]:
        """The transpose of `widened()`, contiguous; made as small integers, as a decoding step has room for little."""
        if self.bits == 4:
            return self.widened().T.contiguous()
        whole = self.integers.T.contiguous()
        if self.bits == 16:
            whole = whole[:, : self.rows].short().mul_(256).add_(whole[:, self.rows :])
        return whole.float().mul_(self.scale[:, None])


def rounded(
    matrix: Float[torch.Tensor, "rows columns"], weight: Float[torch.Tensor, "rows rows"], bits: int = 8
) -> IntegerMatrix:
    """A matrix as integers, such that `trace(E^T H E)` of its error `E` is small.

    Rows are rounded one after another, and each one's error is made good in the rows that follow, as far as `H` says
    that they can (GPTQ: Frantar et al., 2022, arXiv 2210.17323; to begin with the rows that weigh most brings nothing
    here). With the second moments of `x` for `H`, `x A` keeps its value where rounding each number by itself would add
    noise along the strongest directions of `x`.

    Args:
        matrix: `A`.
        weight: `H`, positive semidefinite.
        bits: 4, 8 or 16.
    """
    rows, columns = matrix.shape
    found = IntegerMatrix(rows, columns, bits).to(matrix.device)
    if not rows or not columns:
        return found
    diagonal = weight.diagonal().double()
    left = matrix.double()
    found.scale.copy_(_scale(left, diagonal, LARGEST[bits]))
    scale = found.scale.double()
    damping = DAMPING * diagonal.mean().clamp_min(1e-30)
    damped = weight.double() + damping * torch.eye(rows, dtype=torch.float64, device=matrix.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    carry = torch.linalg.cholesky(inverse, upper=True)
    left, whole = left.clone(), torch.empty_like(left)
    for first in range(0, rows, BLOCK):
        last = min(first + BLOCK, rows)
        errors = torch.empty_like(left[first:last])
        for row in range(first, last):
            whole[row] = (left[row] / scale).round().clamp(-LARGEST[bits], LARGEST[bits])
            error = errors[row - first] = (left[row] - whole[row] * scale) / carry[row, row]
            left[row + 1 : last] -= torch.outer(carry[row, row + 1 : last], error)
        left[last:] -= carry[first:last, last:].T @ errors
    found.fill(whole)
    return found


def _scale(matrix: torch.Tensor, weight: torch.Tensor, largest: int) -> torch.Tensor:
    """A scale for each column: the whole range, or of few steps the share of it that leaves the least error."""
    whole = matrix.abs().amax(dim=0).clamp_min(1e-30) / largest
    if largest > LARGEST[4]:
        return whole
    errors = []
    for share in CLIPPED:
        back = (matrix / (share * whole)).round().clamp(-largest, largest) * share * whole
        errors.append(weight @ (back - matrix).square())
    shares = torch.tensor(CLIPPED, dtype=torch.float64, device=matrix.device)
    return whole * shares[torch.stack(errors).argmin(dim=0)]

"""`transform:R`, `transform:sX`: principal components, one step size for all coordinates, integers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from leankv import compiled
from leankv.codecs.base import Codec, Context, Factored, FitData, Recipe, Shapes, Vectors, length_in
from leankv.codecs.code import Code
from leankv.codecs.coding.entropy import bits_of, decode_columns, encode_columns, entropy_of, frequencies_of
from leankv.codecs.coding.escapes import (
    ESCAPE_VALUES,
    FINE,
    LINEAR,
    MOST_ESCAPES,
    escape_bits,
    escape_byte,
    escape_values,
    representable,
)
from leankv.codecs.coding.integer_matrix import IntegerMatrix, rounded
from leankv.codecs.coding.mixed_radix import MixedRadix
from leankv.codecs.coding.principal_components import Components, principal_components
from leankv.codecs.coding.ragged import Ragged
from leankv.codecs.coding.shapes import fitted_shapes, probabilities
from leankv.codecs.registry import register
from leankv.codecs.statistics import ROWS
from leankv.compiled.packed_rows import PackedRows, RadixRows

SEEN_AT_LEAST = 2e-4
"""Coordinates that are not zero in fewer vectors are always zero: they would cost more than they bring."""
LARGEST_TABLE = 63  # integers of at most this size have a frequency of their own in stored chunks
LARGEST_SYMBOL = 255  # and in the search for a step
LEAST_RATE, LARGEST_RATE = 0.02, 8.0  # bits a value
LEAST_STEP, LARGEST_STEP = 1e-6, 1e6  # assumption: float32 vectors over the least one still make 64-bit integers
ROUNDING_ERROR = 0.02  # of a codec's own error, that matrices of 8 bits may add; less is not seen in costs
FITTED_ROWS = 32768  # assumption: vectors enough for the ranges and the frequencies
SEARCHED_ROWS = 4096  # assumption: and enough for the step of a rate, which is searched for in 24 rounds


@register
@dataclass(frozen=True)
class TransformRecipe(Recipe):
    """Principal components, rounded.

    Attributes:
        rate: bits a value, or None where the step is stated.
        step: in the root of the error metric's units, or None where it follows from the rate.
    """

    rate: float | None = None
    step: float | None = None

    family = "transform"
    revision = 3  # J coordinates in 8 bits; probabilities of two parameters
    grammar = "transform:R (R bits a value, 0.02 to 8) or transform:sX (step X, 1e-6 to 1e6)"

    @classmethod
    def parse(cls, arguments: str) -> "TransformRecipe":
        by_step = arguments.startswith("s")
        number = float(arguments.removeprefix("s"))
        least, largest = (LEAST_STEP, LARGEST_STEP) if by_step else (LEAST_RATE, LARGEST_RATE)
        if not least <= number <= largest:
            raise ValueError
        return cls(step=number) if by_step else cls(rate=number)

    @property
    def arguments(self) -> str:
        if self.step is not None:
            return f"s{_shortest(self.step)}"
        assert self.rate is not None
        return _shortest(self.rate)

    def fit(self, data: FitData) -> list[Codec]:
        return self.fit_together([self], data)[0]

    @classmethod
    def fit_together(cls, recipes: Sequence[Recipe], data: FitData) -> list[list[Codec]]:
        """Steps and rates share the components."""
        fitted: list[list[Codec]] = [[] for _ in recipes]
        for index, x in enumerate(data.train):
            metric = None if data.error_metric is None else data.error_metric[index]
            found = principal_components(x, metric)
            y = _coordinates(x[:: max(1, len(x) // FITTED_ROWS)], found)
            for recipe, codecs in zip(recipes, fitted, strict=True):
                assert isinstance(recipe, cls)
                codec = recipe._fitted(found, y, recipe._step_for(y), metric)
                codec.count_bits(data.heldout[index])
                codecs.append(codec)
        return fitted

    def _step_for(self, y: torch.Tensor) -> float:
        if self.step is not None:
            return self.step
        assert self.rate is not None, "a rate or a step"
        return _step_of_rate(y, self.rate)

    def _fitted(self, found: Components, y: torch.Tensor, step: float, metric: torch.Tensor | None) -> "Transform":
        q = (y / step).round()
        often = (q != 0).float().mean(dim=0) >= SEEN_AT_LEAST
        used = int(often.nonzero().max()) + 1 if often.any() else 0
        return Transform(
            self,
            *_matrices(found, y, used, step, metric),
            found.mean,
            _statistics(q[:, :used]),
        )

    def unfitted(self, width: int) -> Codec:
        return self._empty(width, width, 8)

    def shaped(self, width: int, shapes: Shapes) -> Codec:
        bits = 16 if length_in(shapes, ["analysis.integers", "synthesis.integers"], 2 * width) > width else 8
        codec = self._empty(width, length_in(shapes, ["low", "levels", "scale", "shape"], width), bits)
        if "offset" in shapes:
            codec.read_around(codec.mean)
        return codec

    def _empty(self, width: int, used: int, bits: int) -> "Transform":
        tensors = {
            "low": torch.zeros(used, dtype=torch.int16),
            "levels": torch.ones(used, dtype=torch.int16),
            "scale": torch.zeros(used, dtype=torch.uint8),
            "shape": torch.zeros(used, dtype=torch.uint8),
        }
        analysis, synthesis = (IntegerMatrix(width, used, bits) for _ in range(2))
        return Transform(self, analysis, synthesis, torch.zeros(width), tensors)


class Transform(Codec):
    """Transform coding: `q = round((x - mean) A)`, `x_hat = mean + q B`; `A` `[W, J]`, `B` `[J, W]`.

    `B` are the first principal components under the error metric the codec was fitted with (see
    `leankv.codecs.coding.principal_components`), of the length of one step, and `A` takes vectors to their coordinates,
    so that one step for all coordinates spends bits by reverse water-filling (Cover and Thomas, 10.3.3): what varies
    less than the step costs nothing. `transform:sX` states the step, in the root of the metric's units: with the same
    step everywhere, layers and parts share bits among themselves by the same law. `transform:R` finds the step at which
    the entropy of `q` is R bits a value. As KVTC (arXiv 2511.01815), without its dynamic programming of bit widths.
    There is no dead zone, and values are not shrunk towards zero: shrunk vectors bias attention.

    Only the J coordinates in use are kept, and both matrices in 8 bits (`leankv.codecs.coding.integer_matrix`): `A` is
    fitted to `B` as it is rounded. Where that would add more than `ROUNDING_ERROR` to the error, steps being small
    beside the vectors, they take 16 bits.

    Storage, live: each coordinate's usual values, a range fitted to pay for itself, packed into bytes by mixed radix;
    what lies outside, in escapes of 16 bits (24 where more than 256 coordinates are in use), and one byte that
    counts a token's escapes. Stored: the same integers, entropy-coded losslessly (`leankv.codecs.coding.entropy`) by
    probabilities of two parameters a coordinate (`leankv.codecs.coding.shapes`). Both are counted on held-out text.

    Codecs that were trained (`leankv.codecs.trainable`) decode around another vector than the mean.

    What it does not do: adapt its probabilities to the text, or look at other tokens.
    """

    def __init__(
        self,
        recipe: TransformRecipe,
        analysis: IntegerMatrix,
        synthesis: IntegerMatrix,
        mean: Float[torch.Tensor, " width"],
        tensors: dict[str, torch.Tensor],
    ):
        """
        Args:
            recipe: what it was fitted as.
            analysis: `A`.
            synthesis: the transpose of `B`.
            mean: of the vectors.
            tensors: `low` and `levels` of the ranges, `scale` and `shape` of the probabilities, of each coordinate.
        """
        super().__init__(recipe, len(mean))
        self.analysis, self.synthesis = analysis, synthesis
        for name, tensor in {"mean": mean, **tensors, "bits": torch.zeros(2, dtype=torch.float64)}.items():
            self.register_buffer(name, tensor)
        self.mean: torch.Tensor
        self.low: torch.Tensor
        self.levels: torch.Tensor
        self.scale: torch.Tensor
        self.shape: torch.Tensor
        self.bits: torch.Tensor
        self.offset: torch.Tensor | None = None
        self._radix: MixedRadix | None = None  # follows from `low` and `levels`

    def read_around(self, centre: Float[torch.Tensor, " width"]) -> None:
        """Decode codes around another vector than the mean that they were made around (`leankv.codecs.trainable`)."""
        del self.offset
        self.register_buffer("offset", centre - self.mean)

    @property
    def centre(self) -> torch.Tensor:
        """What codes are decoded around: the mean, unless they were trained."""
        return self.mean if self.offset is None else self.mean + self.offset

    @property
    def bits_per_token(self) -> float:
        """Live, on held-out calibration text; escapes make it differ from token to token."""
        return self.bits[0].item()

    @property
    def stored_bits_per_token(self) -> float:
        """Entropy-coded, on held-out calibration text."""
        return self.bits[1].item()

    # -- live ---------------------------------------------------------------------------------------------------------

    def integers(self, x: torch.Tensor) -> torch.Tensor:
        """`q` of vectors `[N, W]`: `[N, J]`, float32, of a size that an escape can hold."""
        return representable(((x.float() - self.mean) @ self.analysis.widened()).round())

    def encode(self, x: Vectors, context: Context = None) -> Code:
        return self._packed(self.integers(x))

    def _packed(self, q: torch.Tensor) -> Code:
        layout = self._layout()
        if compiled.serves(q):
            item = escape_bits(q.shape[1]) // 8
            items, counts = compiled.escapes_of(q, layout.low, layout.levels, item, LINEAR, FINE)
            if not counts.numel() or int(counts.max()) <= MOST_ESCAPES:
                return Code({"q": layout.pack(q), "escapes": Ragged.of(items, counts)})
        outside = (q < layout.low) | (q >= layout.low + layout.levels)
        counts = outside.sum(dim=1)
        if counts.numel() and int(counts.max()) > MOST_ESCAPES:  # the largest ones stay
            order = torch.where(outside, q.abs(), -1.0).argsort(dim=1, descending=True)[:, :MOST_ESCAPES]
            outside &= torch.zeros_like(outside).scatter_(1, order, value=True)
            counts = outside.sum(dim=1)
        _, which = outside.nonzero(as_tuple=True)
        index = [which % 256, which // 256] if q.shape[1] > 256 else [which]
        items = torch.stack([*(i.to(torch.uint8) for i in index), escape_byte(q[outside])], dim=1)
        return Code({"q": layout.pack(q), "escapes": Ragged.of(items, counts)})

    def _values(self, code: Code) -> torch.Tensor:
        """The integers of a code, `[N, J]`, float32."""
        q, escapes = self._layout().values(code["q"]), code.ragged("escapes")
        if compiled.serves(q):
            compiled.put_escapes(q, escapes.counts, escapes.items(), ESCAPE_VALUES)
            return q
        items = escapes.items().long()
        which = items[:, 0] + 256 * items[:, 1] if escapes.item == 3 else items[:, 0]
        q[escapes.row_numbers(), which] = escape_values(q.device)[items[:, -1]]
        return q

    def loop_matrix(self) -> Float[torch.Tensor, "numbers width"]:
        return self.synthesis.transposed()

    def packed_rows(self, code: Code, matrix: torch.Tensor | None = None) -> PackedRows:
        escapes = code.ragged("escapes")
        outside = escapes.counts, escapes.items(), ESCAPE_VALUES
        synthesis = self.loop_matrix() if matrix is None else matrix
        return RadixRows(code["q"], self._layout().tables, outside, synthesis, self.centre)

    def factored(self, code: Code) -> Factored:
        return Factored(self._values(code), self.synthesis.widened().T, self.centre)

    def decode(self, code: Code, context: Context = None) -> Vectors:
        return self.factored(code).product()

    def prepare(self) -> None:
        self._layout()

    def _layout(self) -> MixedRadix:
        if self._radix is None or self._radix.low.device != self.low.device:
            self._radix = MixedRadix(self.low.float(), self.levels.float())
        return self._radix

    # -- stored -------------------------------------------------------------------------------------------------------

    def probabilities(self) -> torch.Tensor:
        """Of the sizes of each coordinate that have one of their own, and of all beyond: see `shapes.probabilities`."""
        return probabilities(self.scale, self.shape, LARGEST_TABLE)

    def serialize(self, code: Code) -> bytes:
        return encode_columns(self._values(code), self.probabilities())

    def deserialize(self, data: bytes, tokens: int) -> Code:
        return self.deserialize_all([data], [tokens])

    def deserialize_all(self, streams: Sequence[bytes], tokens: Sequence[int]) -> Code:
        q = decode_columns(streams, tokens, self.probabilities())
        return self._packed(q.to(self.mean.device))

    # -- fitting -------------------------------------------------------------------------------------------------------

    def fit_ranges(self, x: torch.Tensor) -> None:
        """Set ranges and probabilities to what vectors `[N, W]` need, the matrices being as they are."""
        for name, tensor in _statistics(self.integers(x[:: max(1, len(x) // FITTED_ROWS)])).items():
            getattr(self, name).copy_(tensor)
        self._radix = None

    def count_bits(self, heldout: torch.Tensor) -> None:
        """Set `bits` to what vectors `[M, W]` that nothing was fitted to take, live and stored."""
        layout, table, outside, stored = self._layout(), self.probabilities(), 0, 0.0
        for rows in heldout.split(ROWS):
            q = self.integers(rows)
            outside += int(((q < layout.low) | (q >= layout.low + layout.levels)).sum())
            stored += bits_of(q.to(torch.int64).cpu(), table)
        live = 8 * (layout.n_bytes + 1) + escape_bits(len(self.low)) * outside / len(heldout)
        self.bits.copy_(torch.tensor([live, stored / len(heldout)]))


def _statistics(q: torch.Tensor) -> dict[str, torch.Tensor]:
    """`low` and `levels` of the ranges, `scale` and `shape` of the probabilities, from whole numbers `[N, J]`."""
    q = q.to(torch.int64)
    used, item_bits = q.shape[1], escape_bits(q.shape[1])
    seen = frequencies_of(q, LARGEST_SYMBOL).double() / len(q)
    ranges = torch.tensor([_range(shares, item_bits) for shares in seen.tolist()], dtype=torch.int16)
    low, levels = ranges.reshape(used, 2).T.contiguous().to(q.device)
    scale, shape = fitted_shapes(frequencies_of(q, LARGEST_TABLE))
    return {"low": low, "levels": levels, "scale": scale.to(q.device), "shape": shape.to(q.device)}


def _matrices(
    found: Components, y: torch.Tensor, used: int, step: float, metric: torch.Tensor | None
) -> tuple[IntegerMatrix, IntegerMatrix]:
    """`A` and the transpose of `B`, rounded to the fewest bits that will do.

    Args:
        found: the components.
        y: coordinates of vectors, `[N, W]`.
        used: J.
        step: of the coordinates.
        metric: as `found` was made under.
    """
    weight = torch.eye(y.shape[1], device=y.device) if metric is None else metric
    weight = weight.double()
    # Of the coordinates, and through the synthesis of the centred vectors.
    moments = torch.stack([(rows.T @ rows).double() for rows in y.split(ROWS)]).sum(dim=0) / len(y)
    back = found.synthesis.double()
    covariance = back.T @ moments @ back
    # What the rest leaves undone and what rounding to whole steps does, in the metric's units.
    error = moments.diagonal()[used:].sum() + used * step**2 / 12
    for bits in (8, 16):
        synthesis = rounded(step * found.synthesis[:used].T, weight, bits)
        b = synthesis.widened().double()
        # Least squares under the metric: the coordinates of what is nearest to a vector.
        exact = weight @ b @ torch.linalg.inv(b.T @ weight @ b)
        analysis = rounded(exact, covariance, bits)
        # Errors of whole steps aside, vectors lose what they lose to B's directions, and what A's rounding does.
        lost = torch.eye(len(b), dtype=b.dtype, device=b.device) - analysis.widened().double() @ b.T
        added = ((covariance @ lost) * (lost @ weight)).sum() - moments.diagonal()[used:].sum()
        if added <= ROUNDING_ERROR * error:
            break
    return analysis, synthesis


def _shortest(number: float) -> str:
    """The shortest text that reads back as the number."""
    text = f"{number:g}"
    return text if float(text) == number else repr(number)


def _coordinates(x: torch.Tensor, found: Components) -> torch.Tensor:
    """`y = (x - mean) A` of vectors `[N, W]`: `[N, W]`, float32."""
    return torch.cat([(rows.float() - found.mean) @ found.analysis for rows in x.split(ROWS)])


def _range(shares: list[float], item_bits: int) -> tuple[int, int]:
    """The range of usual values of a coordinate: its lowest, and how many; no more than a byte holds.

    The one with the least `log2(levels) + item_bits * P(outside)`, among those grown from zero towards the more
    frequent side.

    Args:
        shares: of the values -255 to 255, as `leankv.codecs.coding.entropy.frequencies_of` counts them.
        item_bits: what a value outside takes.
    """
    zero = LARGEST_SYMBOL
    low = high = zero
    inside = shares[zero]
    best, chosen = item_bits * (1 - inside), (0, 1)
    while high - low < 255:
        if shares[low - 1] > shares[high + 1]:
            low -= 1
            inside += shares[low]
        else:
            high += 1
            inside += shares[high]
        cost = math.log2(high - low + 1) + item_bits * (1 - inside)
        if cost < best:
            best, chosen = cost, (low - zero, high - low + 1)
    return chosen


def _step_of_rate(y: torch.Tensor, rate: float) -> float:
    """The step at which the entropy of `y / step`, rounded, is `rate` bits a value: by bisection of its logarithm."""
    y = y[:: max(1, len(y) // SEARCHED_ROWS)]
    size = float(y.square().mean().sqrt())
    if size == 0:
        return 1.0
    low, high = math.log(size * 1e-4), math.log(size * 1e3)
    for _ in range(24):
        middle = (low + high) / 2
        q = (y / math.exp(middle)).round().clamp(-LARGEST_SYMBOL, LARGEST_SYMBOL).to(torch.int64)
        if entropy_of(frequencies_of(q, LARGEST_SYMBOL)).mean() > rate:
            low = middle
        else:
            high = middle
    return math.exp(high)

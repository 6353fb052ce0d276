"""What every family is: a recipe, which says what to fit, and a codec, which turns vectors into codes and back."""

import hashlib
import inspect
import linecache
import re
import statistics
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Float16, Float32

from leankv.codecs.code import Code
from leankv.codecs.statistics import ROWS
from leankv.compiled.packed_rows import PackedRows
from leankv.errors import UserError

Vectors = Float[torch.Tensor, "tokens width"]
"""Vectors of one site, a row a token."""

Context = Float[torch.Tensor, "tokens known"] | None
"""What is known of the same tokens, the vectors of earlier sites side by side; None for codecs that do not predict."""

Shapes = Mapping[str, Sequence[int]]
"""Name of a tensor in a state dict -> its shape."""

NOTHING = torch.empty(0, 0, 0)


@dataclass(frozen=True)
class Factored:
    """Vectors as a product, `mean + coefficients @ synthesis`: what is linear in them need not multiply it out.

    Attributes:
        coefficients: of each token, float32.
        synthesis: float32.
        mean: float32.
    """

    coefficients: Float32[torch.Tensor, "tokens rank"]
    synthesis: Float32[torch.Tensor, "rank width"]
    mean: Float32[torch.Tensor, " width"]

    def product(self) -> Float32[torch.Tensor, "tokens width"]:
        """The vectors."""
        return torch.addmm(self.mean, self.coefficients, self.synthesis)


@dataclass(frozen=True)
class TrainingSettings:
    """What a trained family needs to know beside its data; `leankv.config.experiment.FitConfig` has the meanings."""

    epochs: int
    batch_tokens: int
    learning_rate: float
    seed: int


@dataclass(frozen=True, eq=False)
class FitData:
    """What P codecs of one recipe are fitted to, one a site; none may depend on which others are in the batch.

    Attributes:
        train: vectors, in float32 or the dtype of the activations.
        heldout: others, never fitted to.
        context: what is known of each of the `train` vectors before it is decoded; unless given, nothing (R = 0).
        heldout_context: the same of `heldout`.
        error_metric: positive definite; an error `e` counts `e^T M e`. None: `|e|^2`.
        training: for trained families.
        on_epoch: called after each epoch with its number and the held-out fraction of variance unexplained, `[P]`.
    """

    train: Float[torch.Tensor, "sites tokens width"]
    heldout: Float[torch.Tensor, "sites heldout width"]
    _: KW_ONLY
    context: Float[torch.Tensor, "sites tokens known"] = NOTHING
    heldout_context: Float[torch.Tensor, "sites heldout known"] = NOTHING
    error_metric: Float[torch.Tensor, "sites width width"] | None = None
    training: TrainingSettings
    on_epoch: Callable[[int, torch.Tensor], None] = lambda epoch, error: None

    def __post_init__(self) -> None:
        for name, vectors in (("context", self.train), ("heldout_context", self.heldout)):
            if getattr(self, name) is NOTHING:
                object.__setattr__(self, name, vectors[..., :0])


class Codec(torch.nn.Module, ABC):
    """One fitted codec: for one layer's keys, or one layer's values.

    A codec knows vectors and codes, and nothing of layers, heads, models or files. Its parameters and statistics are
    tensors of its `state_dict`, so it is saved and moved as any module is.

    Attributes:
        recipe: makes this codec again.
        width: length of a vector.
        lossless: whether decoding gives back the very bits, in the dtype they came in: then no other key space is
            entered for it, since going there and back rounds.
    """

    lossless: bool = False

    def __init__(self, recipe: "Recipe", width: int):
        super().__init__()
        self.recipe = recipe
        self.width = width

    @property
    @abstractmethod
    def bits_per_token(self) -> int | float:
        """Bits that the code of one vector takes, side information included; their mean where rows differ in length."""

    @property
    def stored_bits_per_token(self) -> int | float:
        """The same for codes that are serialized; no less than live where there is no entropy coding."""
        return self.bits_per_token

    @property
    def n_context_layers(self) -> int:
        """How many layers before its own it predicts from."""
        return self.recipe.n_context_layers

    def prepare(self) -> None:
        """Build what coding builds at its first use and keeps, so that it is counted whether it was used or not."""
        return

    @abstractmethod
    def encode(self, x: Vectors, context: Context = None) -> Code:
        """Encode vectors of any floating dtype, each by itself.

        Args:
            x: the vectors.
            context: what is known of the same tokens (see `leankv.codecs.share`); families that do not predict ignore
                it.
        """

    @abstractmethod
    def decode(self, code: Code, context: Context = None) -> Vectors:
        """The way back, given the same context; the caller casts to the dtype it wants."""

    def factored(self, code: Code) -> "Factored | None":
        """What `decode` gives as a product, where it is one and needs no context; None where it is not."""
        return None

    @property
    def has_packed_rows(self) -> bool:
        """Whether there is a compiled loop that attention reads this family's codes with, on the CPU."""
        return type(self).packed_rows is not Codec.packed_rows

    def loop_matrix(self) -> Float[torch.Tensor, "numbers width"] | None:
        """What such a loop multiplies decoded numbers out by, float32; None where it does not."""
        return None

    def packed_rows(self, code: Code, matrix: torch.Tensor | None = None) -> PackedRows:
        """What such a loop reads of a code `[N]`.

        Args:
            code: the code.
            matrix: `loop_matrix()`, from whoever reads several codes in turn; made anew unless given.
        """
        raise NotImplementedError

    def serialize(self, code: Code) -> bytes:
        """The code of some tokens as it is stored when it is not in use: losslessly, in as few bytes as may be."""
        return code.to_bytes()

    def deserialize(self, data: bytes, tokens: int) -> Code:
        """The code of `tokens` tokens from what `serialize` made of it, where the codec is.

        Raises:
            ValueError: no code could be serialized so: one that was read can be decoded, whoever wrote it.
        """
        device = next((tensor.device for tensor in self.state_dict().values()), torch.device("cpu"))
        return self.encode(torch.zeros(1, self.width, device=device)).read(data, tokens).to(device)

    def deserialize_all(self, streams: Sequence[bytes], tokens: Sequence[int]) -> Code:
        """The code of all tokens of several streams, behind each other: as `deserialize` gives them, one by one."""
        codes = [self.deserialize(data, count).unflatten(1) for data, count in zip(streams, tokens, strict=True)]
        return codes[0].append(*codes[1:]).flatten()

    @property
    def n_parameters(self) -> int:
        """Trained numbers; statistics (buffers) are not counted."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def nbytes(self) -> int:
        """Bytes of parameters and statistics together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())


def errors_of(
    codecs: Sequence[Codec],
    x: Float[torch.Tensor, "sites tokens width"],
    context: Float[torch.Tensor, "sites tokens known"],
) -> Float[torch.Tensor, "sites tokens width"]:
    """`x - x_hat` of each codec's own vectors, in the dtype of `x`, worked out in pieces."""
    errors = torch.empty_like(x)
    for codec, own, known, out in zip(codecs, x, context, errors, strict=True):
        for rows, given, place in zip(own.split(ROWS), known.split(ROWS), out.split(ROWS), strict=True):
            place.copy_(rows.float() - codec.decode(codec.encode(rows, given), given).float())
    return errors


@dataclass(frozen=True)
class Recipe(ABC):
    """What to fit: a value, hashable and compared by what it says; each family has a frozen dataclass of its numbers.

    Written down (`text`), a recipe is `FAMILY`, `FAMILY:ARGUMENTS`, or `FAMILY(RECIPE,RECIPE)` where it is nested;
    `leankv.codecs.registry.parse_recipe` reads it.
    """

    family: ClassVar[str]
    revision: ClassVar[int | None] = None
    """Raised when the numbers that fitting, encoding or decoding give change: part of the key of all that they made.
    Without one, the source of the family is in that key, so whoever tries out a codec need not think of it."""
    grammar: ClassVar[str]
    """How it is written, with the ranges of its numbers, for error messages."""
    nested: ClassVar[bool] = False
    """Whether its arguments are recipes, between parentheses, rather than what stands behind a colon."""

    @classmethod
    def parse(cls, arguments: str) -> "Recipe":
        """Read what stands behind the colon or between the parentheses; the empty text where nothing does.

        Raises:
            ValueError: it does not parse; here, there is anything.
        """
        if arguments:
            raise ValueError
        return cls()

    @property
    def arguments(self) -> str:
        """What `parse` reads to make an equal recipe."""
        return ""

    @property
    def text(self) -> str:
        """The recipe written down, the same for equal recipes."""
        if self.nested:
            return f"{self.family}({self.arguments})"
        return f"{self.family}:{self.arguments}" if self.arguments else self.family

    @property
    def method(self) -> str:
        """The recipe without its rates: `transform`, `resid(share,transform)`."""
        return re.sub(r":[^(),]+", "", self.text)

    @property
    def n_context_layers(self) -> int:
        """How many layers before its own a codec predicts from; most code each vector by itself."""
        return 0

    def check_width(self, width: int) -> None:  # noqa: B027 - most families suit all widths
        """Refuse a width that the recipe does not suit.

        Raises:
            ValueError: e.g. more dimensions than the vector has.
        """

    def require_width(self, width: int) -> None:
        """`check_width`, for a width that is a model's.

        Raises:
            UserError: it does not suit.
        """
        try:
            self.check_width(width)
        except ValueError as error:
            raise UserError(f"codec {self.text!r} does not suit this model: {error}") from error

    @abstractmethod
    def fit(self, data: FitData) -> list[Codec]:
        """Fit a codec to each site's vectors, none depending on which others there are."""

    @classmethod
    def fit_together(cls, recipes: Sequence["Recipe"], data: FitData) -> list[list[Codec]]:
        """Fit several recipes of this family to the same vectors, one list of codecs a recipe, as `fit` gives them.

        Families whose recipes have work in common do it once here: a ladder of rates is fitted this way.
        """
        return [recipe.fit(data) for recipe in recipes]

    def fit_and_leave(self, data: FitData) -> tuple[list[Codec], Float[torch.Tensor, "sites tokens width"]]:
        """As `fit`, and what another codec can be fitted to: errors `x - x_hat` of `data.train`.

        Where a codec has so many numbers that it knows its own training vectors better than others, these are the
        errors of codecs that did not see the vector (cross-fitting: Chernozhukov et al., 2018, arXiv 1608.00060).
        """
        codecs = self.fit(data)
        return codecs, errors_of(codecs, data.train, data.context)

    @property
    def needs_text(self) -> bool:
        """Whether fitting looks at vectors at all."""
        return True

    def without_text(self, width: int) -> Codec:
        """A codec that is ready for use, of a recipe that needs no calibration text.

        Raises:
            UserError: it needs some.
        """
        if self.needs_text:
            raise UserError(f"{self.text} is fitted to calibration text; leankv.fit takes it and makes a bundle")
        nothing = torch.zeros(1, 2, width)
        training = TrainingSettings(epochs=0, batch_tokens=1, learning_rate=1e-2, seed=0)
        return self.fit(FitData(nothing, nothing[:, :1], training=training))[0]

    @abstractmethod
    def unfitted(self, width: int) -> Codec:
        """A codec with tensors of the right shapes, to load a state dict into."""

    def shaped(self, width: int, shapes: Shapes) -> Codec:
        """As `unfitted`, where fitting chose sizes: with those that a fitted codec's tensors have.

        Args:
            width: of the vectors.
            shapes: of the tensors of a state dict that may be anyone's; sizes read off it are kept within what the
                recipe allows, and whoever loads tensors compares all shapes with those of the result.
        """
        return self.unfitted(width)

    def working_bytes(self, width: int, training: TrainingSettings) -> int:
        """Memory that one more codec in a batched fit takes beside its data; none where they are fitted in turn."""
        return 0

    @property
    def data_copies(self) -> int:
        """Copies of all its vectors that fitting holds beside them."""
        return 0

    def revisions(self) -> dict[str, int | str]:
        """family -> its revision (or a hash of its source, where it has none), of this recipe and of those in it.

        Raises:
            UserError: there is neither a revision nor a source.
        """
        return {self.family: self.revision or _source_hash(type(self))}


def fit_together(recipes: Sequence[Recipe], data: FitData) -> list[list[Codec]]:
    """Fit recipes of any families to the same vectors: one list of codecs, one a site, for each recipe."""
    fitted: dict[Recipe, list[Codec]] = {}
    for family in dict.fromkeys(type(recipe) for recipe in recipes):
        own = [recipe for recipe in dict.fromkeys(recipes) if type(recipe) is family]
        fitted.update(zip(own, family.fit_together(own, data), strict=True))
    return [fitted[recipe] for recipe in recipes]


def length_in(shapes: Shapes, names: Sequence[str], most: int) -> int:
    """A first dimension that fitting chose, as most of these tensors show it; `most` where none does, or a larger."""
    lengths = [shapes[name][0] for name in names if len(shapes.get(name, ())) > 0]
    return min(statistics.mode(lengths), most) if lengths else most


def as_float16(x: Float[torch.Tensor, "*any"]) -> Float16[torch.Tensor, "*any"]:
    """`x` as float16, what is out of its range at the ends of it: a code is never infinite."""
    return within_float16(x).to(torch.float16)


def within_float16(x: Float[torch.Tensor, "*any"]) -> Float32[torch.Tensor, "*any"]:
    """`x` in float32, held within what float16 can represent (its largest number is 65504)."""
    return x.float().clamp(-65504.0, 65504.0)


def _source_hash(recipe: type[Recipe]) -> str:
    """Hash of the file that a recipe's class stands in, or of the notebook's cells that define recipes and codecs.

    Raises:
        UserError: there is no source to be had.
    """
    try:
        source = Path(inspect.getfile(recipe)).read_bytes()
    except (OSError, TypeError):  # made in a notebook or a console: its methods know which piece of text they are from
        module = vars(sys.modules[recipe.__module__]).values() if recipe.__module__ in sys.modules else ()
        # Which codec belongs to the recipe is not known before it is fitted, so all that stand there count.
        classes = [own for own in module if isinstance(own, type) and issubclass(own, Codec | Recipe)]
        methods = [each for own in {recipe, *classes} for each in vars(own).values()]
        methods = [each.fget if isinstance(each, property) else each for each in methods]
        texts = {each.__code__.co_filename for each in methods if inspect.isfunction(each)}
        source = "".join(line for text in sorted(texts) for line in linecache.getlines(text)).encode()
        if not source:
            raise UserError(
                f"the source of the codec family {recipe.family} cannot be read, so results would be kept under no key "
                "of its own; give its recipe a `revision`"
            ) from None
    return hashlib.sha256(source).hexdigest()[:16]

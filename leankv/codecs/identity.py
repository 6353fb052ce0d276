"""`identity`: stores every vector as it is."""

import torch

from leankv.codecs.base import Codec, Context, FitData, Recipe, Vectors
from leankv.codecs.code import Code
from leankv.codecs.registry import register


@register
class IdentityRecipe(Recipe):
    """The vector itself, in the dtype it came in."""

    family = "identity"
    revision = 1
    grammar = "identity"

    @property
    def needs_text(self) -> bool:
        return False

    def fit(self, data: FitData) -> list[Codec]:
        return [Identity(data.train.shape[-1], data.train.dtype) for _ in data.train]

    def unfitted(self, width: int) -> Codec:
        return Identity(width)


class Identity(Codec):
    """Stores the vector itself, in the dtype it came in: the control that must cost exactly nothing.

    Storage: W numbers of the model's dtype, keys as the cache has them in every key space. It compresses nothing.
    """

    lossless = True

    def __init__(self, width: int, dtype: torch.dtype = torch.bfloat16):
        super().__init__(IdentityRecipe(), width)
        # An empty tensor, so that the dtype is saved and loaded with the codec.
        self.like: torch.Tensor
        self.register_buffer("like", torch.empty(0, dtype=dtype))

    @property
    def bits_per_token(self) -> int:
        return self.width * self.like.element_size() * 8

    def encode(self, x: Vectors, context: Context = None) -> Code:
        return Code({"x": x.to(self.like.dtype, copy=True)})  # never a view that keeps more alive

    def decode(self, code: Code, context: Context = None) -> Vectors:
        return code["x"]

"""Rotary embedding: which convention a model's cached keys follow, found by a test on the model itself.

With a single token, attention weighs one value by 1 wherever it stands, so the hidden states do not depend on the
token's position; only a rotation of the cached keys does. So keys cached at position 0 and at position p must agree in
every layer once the rotation is undone, and only the right convention makes them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int

from leankv import compiled
from leankv.errors import UserError
from leankv.models.observers import RecordingCache
from leankv.models.structure import rope_types, rotary_modules, text_config

PROBE_POSITION = 7  # assumption: far enough for a wrong convention to show, inside any sliding window

TOLERANCE = 2e-2  # relative error; bfloat16 keys differ by 4e-3 from rounding, a wrong convention by about 1


Pairing = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Views of a head's dimensions as pairs that are rotated together: the first of each, and the second of each."""

Keys = Float[torch.Tensor, "B heads T head_dim"]
Positions = Int[torch.Tensor, "#B T"]

Table = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of some positions, each `[B, T, rotary_dim]`."""


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _neighbours(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., ::2], x[..., 1::2]


CONVENTIONS: dict[str, Pairing] = {"half": _halves, "interleaved": _neighbours}


def rotate(
    k: Keys, cos: Float[torch.Tensor, "#B #T rotary"], sin: Float[torch.Tensor, "#B #T rotary"], pairing: Pairing
) -> Float32[torch.Tensor, "B heads T head_dim"]:
    """Rotate the first `cos.shape[-1]` dimensions of each head: `(a, b)` to `(a cos - b sin, b cos + a sin)`, float32.

    A cache of thousands of tokens is rotated for each one generated: hence no temporaries.

    Args:
        k: keys as they are, or as they are cached.
        cos, sin: as the model's rotary embedding gives them, doubled to the rotated dimensions.
        pairing: the convention.
    """
    tracked = torch.is_grad_enabled() and k.requires_grad
    if compiled.serves(k) and not tracked:
        return compiled.rotated(k, cos, sin, halves=pairing is _halves)
    k = k.float()
    rotated = torch.empty_like(k)
    rotary = cos.shape[-1]
    rotated[..., rotary:] = k[..., rotary:]
    (first, second), (into_first, into_second) = pairing(k[..., :rotary]), pairing(rotated[..., :rotary])
    (first_cos, second_cos), (first_sin, second_sin) = pairing(cos.float()[:, None]), pairing(sin.float()[:, None])
    if tracked:  # gradients do not pass what is written to a place
        into_first.copy_(first * first_cos - second * first_sin)
        into_second.copy_(second * second_cos + first * second_sin)
        return rotated
    torch.mul(first, first_cos, out=into_first).addcmul_(second, first_sin, value=-1)
    torch.mul(second, second_cos, out=into_second).addcmul_(first, second_sin)
    return rotated


def unrotate(
    k: Keys, cos: Float[torch.Tensor, "#B #T rotary"], sin: Float[torch.Tensor, "#B #T rotary"], pairing: Pairing
) -> Float32[torch.Tensor, "B heads T head_dim"]:
    """Undo `rotate`: rotate back, and divide by `cos^2 + sin^2`, which is not 1 under yarn scaling."""
    size = cos.float().square() + sin.float().square()
    return rotate(k, cos.float() / size, -sin.float() / size, pairing)


@dataclass(frozen=True)
class _Call:
    """A call of a rotary module as the model makes it; with other positions it gives other tables.

    Of tensors among the arguments only what they are is kept (dtype, device, shape but for the last dimension, which
    is empty): a probe's numbers serve no more.
    """

    module: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @classmethod
    def like(cls, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> "_Call":
        kept = {name: _emptied(argument) for name, argument in keywords.items()}
        return cls(module, tuple(_emptied(argument) for argument in arguments), kept)

    def table_of(self, positions: torch.Tensor, dtype: torch.dtype | None = None) -> Table:
        """cos and sin of `positions` `[1, T]`, in the model's dtype unless another is given."""
        arguments = [_exchanged(argument, positions, dtype) for argument in self.arguments]
        keywords = {name: _exchanged(argument, positions, dtype) for name, argument in self.keywords.items()}
        cos, sin = self.module.forward(*arguments, **keywords)
        return cos, sin


def _emptied(argument: Any) -> Any:
    return argument.new_empty(*argument.shape[:-1], 0) if isinstance(argument, torch.Tensor) else argument


def _exchanged(argument: Any, positions: torch.Tensor, dtype: torch.dtype | None) -> Any:
    # Hidden states give the tables their dtype and device, positions are the whole numbers.
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.to(dtype) if argument.is_floating_point() else positions.to(argument.device, non_blocking=True)


@dataclass(frozen=True)
class _Found:
    """A layer's convention, and the call behind its tables (None where keys do not depend on the position)."""

    convention: str
    call: _Call | None


class KeyRotation:
    """Takes a model's rotary embedding off its cached keys, and puts it back, layer by layer.

    The cos and sin tables are the model's own: its rotary module is asked for the positions wanted, each time anew, or
    once a forward pass (`for_passes`).

    Args:
        model: the transformers model.

    Raises:
        UserError: some layer's keys follow no known convention, or the scaling changes with the length of the text, so
            that what was taken off could not be put back later.
    """

    def __init__(self, model: Any):
        if changing := rope_types(model.config) & CHANGING:
            raise UserError(
                f"this model's rotary embedding ({min(changing)}) changes with the length of the text, so it "
                "cannot be taken off keys for good; use --key-space post-rope"
            )
        found = _find_rotations(model)
        unknown = [str(layer) for layer, own in enumerate(found) if own is None]
        if unknown:
            raise UserError(
                f"the rotary convention of layers {', '.join(unknown)} of this model was not found (half and "
                "interleaved were tried); use --key-space post-rope"
            )
        self._found = [own for own in found if own is not None]
        self._tables: dict[tuple[Any, ...], Table] | None = None

    def for_passes(self) -> "KeyRotation":
        """The same, which makes each table once for all layers of a forward pass, until `forget` says that it is over.

        Kept tables would grow with the text and count as memory of the cache.
        """
        own = copy.copy(self)
        own._tables = {}
        return own

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeyRotation":
        """The modules behind it are the model's own, whose weights may be offloaded: they are shared."""
        own = copy.copy(self)
        own._tables = None if self._tables is None else {}
        return own

    def forget(self) -> None:
        """Let go of all tables."""
        if self._tables is not None:
            self._tables.clear()

    def remove(self, layer: int, keys: Keys, positions: Positions) -> Float32[torch.Tensor, "B heads T head_dim"]:
        """Cached keys at their positions -> keys pre-RoPE, float32."""
        return self._rotated(unrotate, layer, keys, positions)

    def restore(self, layer: int, keys: Keys, positions: Positions) -> Float32[torch.Tensor, "B heads T head_dim"]:
        """The way back: keys pre-RoPE -> keys as the model caches them, float32."""
        return self._rotated(rotate, layer, keys, positions)

    def table_at(self, layer: int, positions: Positions, device: torch.device) -> Table | None:
        """Float32 cos and sin of positions, each `[B or 1, T, rotary]`; None where keys do not depend on them."""
        call = self._found[layer].call
        return None if call is None else self._table(call, positions, torch.float32, device)

    def turning_back_at(self, layer: int, positions: Positions, device: torch.device) -> Table | None:
        """As `table_at`, to turn the other way and never scale: so queries meet keys that were not turned so far."""
        call = self._found[layer].call
        return None if call is None else self._table(call, positions, torch.float32, device, turns_back=True)

    def _table(
        self,
        call: "_Call",
        positions: Positions,
        dtype: torch.dtype | None,
        device: torch.device,
        turns_back: bool = False,
    ) -> Table:
        """Cos and sin of positions, in the model's dtype unless another is given."""
        key = (id(call), positions.shape, positions.numpy().tobytes(), dtype, device, turns_back)
        if self._tables is not None and key in self._tables:
            return self._tables[key]
        # As one row: the model's module need not know in how many rows the positions stand.
        cos, sin = (
            part[0].unflatten(0, positions.shape).to(device) for part in call.table_of(positions.reshape(1, -1), dtype)
        )
        if turns_back:
            size = (cos.square() + sin.square()).sqrt()
            cos, sin = cos / size, -sin / size
        if self._tables is not None:
            self._tables[key] = cos, sin
        return cos, sin

    def rotates_halves(self, layer: int) -> bool:
        """Whether the pairs are halves of a head's rotated dimensions, or else neighbours."""
        return self._found[layer].convention == "half"

    def turned(self, layer: int, vectors: Keys, table: Table | None) -> Float32[torch.Tensor, "B heads T head_dim"]:
        """Vectors rotated by a table of `table_at` or `turning_back_at`, float32."""
        if table is None:
            return vectors.float()
        return rotate(vectors, *table, CONVENTIONS[self._found[layer].convention])

    def remove_from_gradient(
        self, layer: int, gradients: Keys, positions: Positions
    ) -> Float32[torch.Tensor, "B heads T head_dim"]:
        """A gradient with respect to cached keys -> the one with respect to keys pre-RoPE, float32."""
        return self._rotated(lambda k, cos, sin, how: rotate(k, cos, -sin, how), layer, gradients, positions)

    def _rotated(
        self, how: Callable[..., torch.Tensor], layer: int, keys: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        found = self._found[layer]
        if found.call is None:
            return keys.float()
        return how(keys, *self._table(found.call, positions, None, keys.device), CONVENTIONS[found.convention])


CHANGING = frozenset({"dynamic", "longrope"})
"""Kinds of scaling whose frequencies depend on how long the text has become."""


def find_conventions(model: Any) -> list[str | None]:
    """Each layer's rotary convention: `half`, `interleaved`, `none` (keys do not depend on the position), or None.

    None says that no known convention makes the keys agree; the layer can then be compressed post-rope only.
    """
    return [None if found is None else found.convention for found in _find_rotations(model)]


@torch.no_grad()
def _find_rotations(model: Any) -> list[_Found | None]:
    # Any token whose embedding is not the padding token's zero.
    token = text_config(model.config).vocab_size // 2

    def probe(position: int) -> tuple[list[torch.Tensor], list[tuple[_Call, Table]]]:
        """Each layer's keys of one token at `position`, and the tables that the model made for it, with their calls."""
        keys: list[torch.Tensor] = []
        calls: list[tuple[_Call, Table]] = []

        def keep(module: torch.nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            if isinstance(output, tuple) and len(output) == 2 and all(isinstance(t, torch.Tensor) for t in output):
                calls.append((_Call.like(module, arguments, keywords), output))

        hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in rotary_modules(model)]
        try:
            model(
                input_ids=torch.tensor([[token]], device=model.device),
                position_ids=torch.tensor([[position]], device=model.device),
                past_key_values=RecordingCache(model.config, lambda layer, k, v: keys.append(k)),
            )
        finally:
            for hook in hooks:
                hook.remove()
        return keys, calls

    at_zero, zero_calls = probe(0)
    at_position, calls = probe(PROBE_POSITION)
    # A model may make its tables in any order, e.g. that of a set.
    made = [
        (call, (table_at_zero, table))
        for call, table in calls
        for zero_call, table_at_zero in zero_calls
        if zero_call.module is call.module
    ]
    return [_rotation_of(zero, moved, made) for zero, moved in zip(at_zero, at_position, strict=True)]


def _rotation_of(
    zero: torch.Tensor, moved: torch.Tensor, made: list[tuple[_Call, tuple[Table, Table]]]
) -> _Found | None:
    """Under which convention keys at position 0 and moved keys are the same once both rotations are undone."""
    if _agree(moved.float(), zero.float()):
        return _Found("none", None)
    for name, pairing in CONVENTIONS.items():
        for call, tables in made:
            if tables[1][0].shape[-1] > moved.shape[-1]:
                continue
            # Scaled embeddings (yarn) change the keys at position 0 too.
            undone = [
                unrotate(keys, cos.to(keys.device), sin.to(keys.device), pairing)
                for keys, (cos, sin) in zip((zero, moved), tables, strict=True)
            ]
            if _agree(undone[1], undone[0]):
                return _Found(name, call)
    return None


def _agree(keys: torch.Tensor, reference: torch.Tensor) -> bool:
    return bool((keys - reference).norm() <= TOLERANCE * reference.norm())


def find_rotation(
    model: Any, demanded: bool, on_failure: Callable[[str], None] = lambda reason: None
) -> KeyRotation | None:
    """What takes a model's rotary embedding off its keys; None where it cannot be taken off.

    Args:
        model: the model.
        demanded: refuse where it cannot.
        on_failure: told why it cannot, where it is not demanded.

    Raises:
        UserError: it cannot, and is demanded.
    """
    try:
        return KeyRotation(model)
    except UserError as error:
        if demanded:
            raise
        on_failure(str(error))
        return None

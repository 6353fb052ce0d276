"""Rotary embedding: which convention a model's cached keys follow, found by a test on the model itself.

With a single token, attention weighs one value by 1 wherever it stands, so the hidden states do not depend on the
token's position; only a rotation of the cached keys does. So keys cached at position 0 and at position p must agree in
every layer once they are un-rotated, and only the right convention makes them.
"""

from collections.abc import Callable
from typing import Any

import torch

from leankv.cache import RecordingCache

PROBE_POSITION = 7  # assumption: far enough for a wrong convention to show, inside any sliding window
TOLERANCE = 2e-2  # relative error; bfloat16 keys differ by 4e-3 from rounding, a wrong convention by about 1

Rotation = Callable[[torch.Tensor], torch.Tensor]
Table = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of some positions, each `[B, T, rotary_dim]`."""


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _rotate_interleaved(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


CONVENTIONS: dict[str, Rotation] = {"half": _rotate_half, "interleaved": _rotate_interleaved}


def unrotate(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotate: Rotation) -> torch.Tensor:
    """Undo `k cos + rotate(k) sin` on the first `cos.shape[-1]` dimensions of each head.

    Args:
        k: `[B, heads, T, head_dim]`.
        cos, sin: `[B, T, rotary_dim]`, as the model's rotary embedding gives them, doubled to the rotated dimensions.
        rotate: the convention.

    Returns:
        `(k cos - rotate(k) sin) / (cos^2 + sin^2)`, float32; the denominator is not 1 under yarn scaling.
    """
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    rotated, passed = k.float().split([cos.shape[-1], k.shape[-1] - cos.shape[-1]], dim=-1)
    undone = (rotated * cos - rotate(rotated) * sin) / (cos.square() + sin.square())
    return torch.cat([undone, passed], dim=-1)


@torch.no_grad()
def find_conventions(model: Any) -> list[str | None]:
    """Each layer's rotary convention: `half`, `interleaved`, `none` (keys do not depend on the position), or None.

    None says that no known convention makes the keys agree; the layer can then be compressed post-rope only.
    """
    # Any token whose embedding is not the padding token's zero.
    token = model.config.get_text_config(decoder=True).vocab_size // 2
    rotary = [module for name, module in model.named_modules() if name.endswith("rotary_emb")]

    def probe(position: int) -> tuple[list[torch.Tensor], list[Table]]:
        """Each layer's keys of one token at `position`, and the cos and sin tables that the model made for it."""
        keys: list[torch.Tensor] = []
        tables: list[Table] = []

        def keep_table(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(output, tuple) and len(output) == 2 and all(isinstance(t, torch.Tensor) for t in output):
                tables.append(output)

        hooks = [module.register_forward_hook(keep_table) for module in rotary]
        try:
            model(
                input_ids=torch.tensor([[token]], device=model.device),
                position_ids=torch.tensor([[position]], device=model.device),
                past_key_values=RecordingCache(model.config, lambda layer, k, v: keys.append(k)),
            )
        finally:
            for hook in hooks:
                hook.remove()
        return keys, tables

    at_zero, zero_tables = probe(0)
    at_position, tables = probe(PROBE_POSITION)
    table_pairs = list(zip(zero_tables, tables, strict=True))
    return [_convention_of(zero, moved, table_pairs) for zero, moved in zip(at_zero, at_position, strict=True)]


def _convention_of(zero: torch.Tensor, moved: torch.Tensor, table_pairs: list[tuple[Table, Table]]) -> str | None:
    """Under which convention keys at position 0 and moved keys are the same once both are un-rotated."""
    if _agree(moved.float(), zero.float()):
        return "none"
    for name, rotate in CONVENTIONS.items():
        for table_zero, table_moved in table_pairs:
            if table_moved[0].shape[-1] > moved.shape[-1]:
                continue
            # Scaled embeddings (yarn) change the keys at position 0 too.
            undone = [
                unrotate(keys, table[0].to(keys.device), table[1].to(keys.device), rotate)
                for keys, table in ((zero, table_zero), (moved, table_moved))
            ]
            if _agree(undone[1], undone[0]):
                return name
    return None


def _agree(keys: torch.Tensor, reference: torch.Tensor) -> bool:
    return bool((keys - reference).norm() <= TOLERANCE * reference.norm())

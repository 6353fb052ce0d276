"""What a layer's own attention does with its keys and values: queries for keys, the output projection for values.

Queries are seen through transformers' own interface for attention functions: one that records what it is given and
leaves the work to the stock function. It is used for this measurement only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from leankv.data import Blocks
from leankv.errors import UserError
from leankv.model import LoadedModel
from leankv.progress import Progress
from leankv.rope import KeyRotation

WATCHED = "leankv_watched_sdpa"
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""What models call the linear map behind attention."""

Watch = Callable[[torch.nn.Module, torch.Tensor], None]
_watch: list[Watch] = []  # the one that is at work


def attention_moments(
    loaded: LoadedModel,
    blocks: Blocks,
    layers: Sequence[int],
    rotation: KeyRotation | None,
    sinks: int,
    seed: int,
    progress: Progress,
) -> dict[tuple[int, str], torch.Tensor]:
    """(layer, part) -> `[W, W]`: `E[q q^T]` for keys, the Gram matrix of the output projection for values.

    Both are block diagonal, a block for each key head, summed over the query heads that read it. Where keys are
    un-rotated, queries are turned to the position of a key that they see, drawn at random from those behind the sinks.

    Raises:
        UserError: the model's attention has another form than queries, keys, values and a linear output.
    """
    model = loaded.model
    # One for each layer, so that its moments do not depend on which others are asked for.
    generators = {layer: torch.Generator().manual_seed(seed + layer) for layer in layers}
    moments: dict[tuple[int, str], torch.Tensor] = {}
    projections: dict[int, torch.Tensor] = {}

    def watch(module: torch.nn.Module, queries: torch.Tensor) -> None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layer not in layers:
            return
        geometry = loaded.geometry.layers[layer]
        if rotation is not None:
            last = torch.arange(queries.shape[2])
            seen = sinks + (torch.rand(len(last), generator=generators[layer]) * (last - sinks + 1).clamp_min(1)).long()
            queries = rotation.remove_from_gradient(layer, queries, seen.minimum(last)[None])
        heads = queries[:, :, sinks:].float().unflatten(1, (geometry.kv_heads, -1))  # [B, kv, group, T, head_dim]
        flat = heads.transpose(0, 1).flatten(1, 3)
        heads_moments = (flat.mT @ flat / (len(blocks) * len(queries) * heads.shape[3])).cpu()
        own = torch.block_diag(*heads_moments)
        moments[layer, "k"] = moments[layer, "k"] + own if (layer, "k") in moments else own
        if layer not in projections:
            projections[layer] = _output_gram(module, queries.shape[1], geometry.kv_heads, geometry.head_dim)

    with _watched(model, watch), torch.no_grad(), progress.stage("queries", len(blocks)) as step:
        for tokens in blocks.tokens:
            model.base_model(input_ids=tokens[None].to(model.device))
            step()
    if missing := [layer for layer in layers if layer not in projections]:
        raise UserError(
            f"the attention of layers {', '.join(map(str, missing))} shows no queries or no output projection; "
            "use --weighting gradient"
        )
    return moments | {(layer, "v"): gram for layer, gram in projections.items()}


def _output_gram(module: torch.nn.Module, heads: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    """`sum_h O_h O_h^T` over the query heads of each key head, `[W, W]`; `O_h` `[head_dim, hidden]`."""
    found = [getattr(module, name) for name in OUTPUT_PROJECTIONS if hasattr(module, name)]
    if not found:
        raise UserError(
            f"{type(module).__name__} has no output projection of a known name ({', '.join(OUTPUT_PROJECTIONS)}); "
            "use --weighting gradient"
        )
    parameter = next(model_parameter for model_parameter in found[0].parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    unit = torch.eye(heads * head_dim, device=parameter.device, dtype=dtype)
    # Through the module itself, so that it does not matter how its weights are laid out or quantized.
    rows = (found[0](unit) - found[0](torch.zeros_like(unit[:1]))).float().unflatten(0, (kv_heads, -1, head_dim))
    return torch.block_diag(*torch.einsum("kgih,kgjh->kij", rows, rows).cpu())


@contextmanager
def _watched(model: Any, watch: Watch) -> Iterator[None]:
    """While this lasts, `watch` is shown the module and the queries `[B, heads, T, head_dim]` of every attention."""
    AttentionInterface.register(WATCHED, _watched_attention)
    AttentionMaskInterface.register(WATCHED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    _watch.append(watch)
    model.set_attn_implementation(WATCHED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _watch.clear()


def _watched_attention(module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    _watch[-1](module, query)
    return sdpa_attention_forward(module, query, *args, **kwargs)

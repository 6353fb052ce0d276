"""What a layer's own attention does with its keys and values: queries for keys, the output projection for values.

Queries are seen through transformers' own interface for attention functions: one that records what it is given and
leaves the work to the stock function. It is used for this measurement only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from leankv.cache.plan import Site
from leankv.calibration.metric_sample import MetricSample
from leankv.errors import UserError
from leankv.models.loading import LoadedModel
from leankv.models.structure import OUTPUT_PROJECTIONS, output_projection
from leankv.progress import Progress

WATCHED = "leankv_watched_sdpa"


Watch = Callable[[torch.nn.Module, torch.Tensor], None]
"""An attention module, and its queries `[B, heads, T, head_dim]`."""

_watch: list[Watch] = []  # the one that is at work


def attention_moments(
    loaded: LoadedModel, sample: MetricSample, progress: Progress
) -> dict[Site, Float[torch.Tensor, "W W"]]:
    """Site -> `E[q q^T]` for keys, the Gram matrix of the output projection for values.

    Both are block diagonal, a block for each key head, summed over the query heads that read it. Where keys are
    pre-RoPE, queries are rotated to the position of a key that they see, drawn at random from those behind the sinks.

    Raises:
        UserError: the model's attention has another form than queries, keys, values and a linear output.
    """
    blocks, layers, rotation, sinks = sample.blocks, sample.layers, sample.rotation, sample.sinks
    model = loaded.model
    # One for each layer, so that its moments do not depend on which others are asked for.
    generators = {layer: torch.Generator().manual_seed(sample.seed + layer) for layer in layers}
    moments: dict[Site, torch.Tensor] = {}
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
        site = Site(layer, "k")
        moments[site] = moments[site] + own if site in moments else own
        if layer not in projections:
            v_head_dim = geometry.width_of("v") // geometry.kv_heads
            projections[layer] = _output_gram(module, queries, geometry.kv_heads, v_head_dim)

    with _watched(model, watch), torch.no_grad(), progress.stage("queries", len(blocks)) as step:
        for tokens in blocks.tokens:
            model.base_model(input_ids=tokens[None].to(model.device))
            step()
    if missing := [layer for layer in layers if layer not in projections]:
        raise UserError(
            f"the attention of layers {', '.join(map(str, missing))} shows no queries or no output projection; "
            "use --error-metric gradient"
        )
    return moments | {Site(layer, "v"): gram for layer, gram in projections.items()}


def _output_gram(module: torch.nn.Module, queries: torch.Tensor, kv_heads: int, v_head_dim: int) -> torch.Tensor:
    """`sum_h O_h O_h^T` over the query heads of each value head, `[W, W]`; `O_h` `[v_head_dim, hidden]`."""
    projection = output_projection(module)
    if projection is None:
        raise UserError(
            f"{type(module).__name__} has no output projection of a known name ({', '.join(OUTPUT_PROJECTIONS)}); "
            "use --error-metric gradient"
        )
    parameter = next(model_parameter for model_parameter in projection.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    # Where the queries are: weights that accelerate offloaded are on no device until their module is called.
    unit = torch.eye(queries.shape[1] * v_head_dim, device=queries.device, dtype=dtype)
    # Through the module itself, so that it does not matter how its weights are laid out or quantized.
    rows = (projection(unit) - projection(torch.zeros_like(unit[:1]))).float().unflatten(0, (kv_heads, -1, v_head_dim))
    return torch.block_diag(*torch.einsum("kgih,kgjh->kij", rows, rows).cpu())


@contextmanager
def _watched(model: Any, watch: Watch) -> Iterator[None]:
    """While this lasts, `watch` is shown the module and the queries `[B, heads, T, head_dim]` of every attention.

    Raises:
        UserError: the model has no attention that can be exchanged (those that learn sinks have none).
    """
    AttentionInterface.register(WATCHED, _watched_attention)
    AttentionMaskInterface.register(WATCHED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(WATCHED)
    except ValueError as error:
        raise UserError(
            f"the queries of {model.config.model_type} models cannot be watched, as they have no attention of the "
            "kind sdpa; use --error-metric gradient"
        ) from error
    _watch.append(watch)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _watch.clear()


def _watched_attention(module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    _watch[-1](module, query)
    return sdpa_attention_forward(module, query, *args, **kwargs)

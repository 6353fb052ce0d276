"""Caches that decode each vector once show what caches show that decode all at every step."""

from typing import Any

import pytest
import torch

from leankv.cache.lean_cache import LeanCache
from leankv.cache.part_store import UNBOUNDED
from leankv.cache.plan import Plan, PlanSpec
from leankv.codecs import FitData, TrainingSettings
from leankv.models.geometry import find_geometry
from leankv.models.observers import RecordingCache
from leankv.models.rope import find_rotation
from tests import tiny

pytestmark = pytest.mark.whole_runs

SPECS = ("identity", "int:4", "nuq:3+5", "transform:s0.2", "resid(share:-2,transform:s0.2)", "resid(pca:4,int:4)")
TOKENS = 40


def fitted(model: Any, spec: PlanSpec) -> Plan:
    """A plan fitted to random text, each site by itself; what predicts is given exact vectors."""
    layers = find_geometry(model).layers
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def record(layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        for part, rows in (("k", k), ("v", v)):
            seen[layer, part] = rows.transpose(1, 2).flatten(2).flatten(0, 1)

    with torch.no_grad():
        model(input_ids=tiny.tokens(8, TOKENS), past_key_values=RecordingCache(model.config, record), use_cache=True)
    windows = [layer.sliding_window for layer in layers]
    plan = {}
    for site, recipe in spec.sites(len(layers)).items():
        same = [number for number in range(site.layer) if windows[number] == windows[site.layer]][::-1]
        sources = [(number, part) for number in same[: recipe.n_context_layers] for part in ("k", "v")]
        sources += [(site.layer, "k")] if site.part == "v" and recipe.n_context_layers else []
        x = seen[site][None]
        context = torch.cat([seen[source] for source in sources], dim=1)[None].half() if sources else x[..., :0]
        split = x.shape[1] * 3 // 4
        data = FitData(
            x[:, :split],
            x[:, split:],
            context=context[:, :split],
            heldout_context=context[:, split:],
            training=TrainingSettings(1, 32, 1e-2, 0),
        )
        (plan[site],) = recipe.fit(data)
    return plan


@pytest.mark.parametrize(("architecture", "spec"), tiny.with_each(SPECS, SPECS[4]))
def test_every_chunk_reads_the_same(model: Any, spec: str) -> None:
    plan = fitted(model, PlanSpec.uniform(spec).with_layers([2], v="none"))
    tokens = tiny.tokens(2, TOKENS, seed=1)
    rotation = find_rotation(model, False, lambda reason: None)
    caches = [
        LeanCache(model.config, plan, sinks=2, window=3, rotation=rotation, decode_once=once) for once in (False, True)
    ]
    with torch.no_grad():
        for piece in tokens.split(7, dim=1):
            plain, once = (model(input_ids=piece, past_key_values=cache, use_cache=True).logits for cache in caches)
            torch.testing.assert_close(once, plain, atol=1e-4, rtol=1e-4)


def test_a_prefix_coded_whole_reads_the_same(model: Any) -> None:
    plan = fitted(model, PlanSpec.uniform("resid(share:-1,transform:s0.2)"))
    tokens = tiny.tokens(1, TOKENS, seed=1)
    caches = [LeanCache(model.config, plan, sinks=2, window=UNBOUNDED, decode_once=once) for once in (False, True)]
    with torch.no_grad():
        for cache in caches:
            model(input_ids=tokens[:, :25], past_key_values=cache, use_cache=True)
            cache.encode_all()
        for piece in tokens[:, 25:].split(5, dim=1):
            plain, once = (model(input_ids=piece, past_key_values=cache, use_cache=True).logits for cache in caches)
            torch.testing.assert_close(once, plain, atol=1e-4, rtol=1e-4)


def test_rows_that_are_dropped_or_reordered_are_decoded_anew(model: Any) -> None:
    plan = fitted(model, PlanSpec.uniform("int:4"))
    tokens = tiny.tokens(2, TOKENS, seed=1)
    order = torch.tensor([1, 0, 1])
    caches = [LeanCache(model.config, plan, sinks=2, window=3, decode_once=once) for once in (False, True)]
    with torch.no_grad():
        for cache in caches:
            model(input_ids=tokens[:, :20], past_key_values=cache, use_cache=True)
            cache.batch_select_indices(order)
        plain, once = (model(input_ids=tokens[order, 20:30], past_key_values=c, use_cache=True).logits for c in caches)
    torch.testing.assert_close(once, plain, atol=1e-4, rtol=1e-4)

"""Error metrics: moments of gradients, queries and output projections, against the model's own modules."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from leankv.calibration import gradients
from leankv.calibration.error_metrics import ErrorMetrics, fit_error_metrics, shrunk
from leankv.calibration.metric_sample import MetricSample
from leankv.config.plan_table import PARTS
from leankv.data.blocks import Blocks
from leankv.errors import UserError
from leankv.models.geometry import find_geometry
from leankv.models.loading import LoadedModel
from leankv.models.rope import KeyRotation
from leankv.progress import Silent
from leankv.studies import metric_store
from tests import tiny
from tests.run_folders import evaluator_of, folder_of
from tests.test_fingerprint import offloaded

BLOCKS = Blocks(tiny.tokens(3, 24, seed=2), "calibration", "random")
LAYERS = [0, 2, 3]


def metrics_of(
    kind: str, model: Any, rotation: KeyRotation | None, sinks: int = 0, layers: Sequence[int] = LAYERS
) -> ErrorMetrics:
    loaded = LoadedModel(model, tiny.tokenizer(), "tiny", find_geometry(model), "", {})
    return fit_error_metrics(kind, loaded, MetricSample(BLOCKS, layers, rotation, sinks, 0), Silent())


def second_moment(g: torch.Tensor) -> torch.Tensor:
    return g.T @ g / len(g)


@pytest.mark.parametrize("sinks", [0, 3])
def test_gradients_are_those_of_the_projections_before_the_rotary_embedding(sinks: int) -> None:
    """In a Llama, keys pre-RoPE are what `k_proj` gives."""
    model = tiny.build("llama")
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}
    outputs: dict[tuple[int, str], torch.Tensor] = {}

    def keep(key: tuple[int, str]) -> Any:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            outputs[key] = output

        return hook

    hooks = [
        getattr(model.model.layers[layer].self_attn, f"{part}_proj").register_forward_hook(keep((layer, part)))
        for layer in LAYERS
        for part in PARTS
    ]
    for tokens in BLOCKS.tokens:
        logits = model(tokens[None]).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], tokens[1:], reduction="sum").backward()
        for key, output in outputs.items():
            assert output.grad is not None
            seen.setdefault(key, []).append(output.grad[0, sinks:])
    for hook in hooks:
        hook.remove()
    for key, metric in metrics_of("gradient", model, KeyRotation(model), sinks).items():
        torch.testing.assert_close(metric, shrunk(second_moment(torch.cat(seen[key]))), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("kind", ["gradient", "attention"])
def test_metrics_are_positive_definite_and_of_the_cache_s_width(name: str, kind: str) -> None:
    model = tiny.build(name)
    implementation = model.config._attn_implementation
    metrics = metrics_of(kind, model, None if name == "gpt2" else KeyRotation(model))
    assert set(metrics) == {(layer, part) for layer in LAYERS for part in PARTS}
    for (layer, _), metric in metrics.items():
        assert metric.shape == (find_geometry(model).layers[layer].width,) * 2
        assert torch.linalg.eigvalsh(metric.double()).min() > 0
    assert model.config._attn_implementation == implementation


@torch.no_grad()
def test_attention_counts_keys_by_queries_and_values_by_the_output_projection() -> None:
    model = tiny.build("llama")
    layer = model.model.layers[2].self_attn
    queries: list[torch.Tensor] = []
    hook = layer.q_proj.register_forward_hook(lambda module, inputs, output: queries.append(output))
    for tokens in BLOCKS.tokens:
        model(tokens[None])
    hook.remove()
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(24)[None])
    q = torch.cat(queries).unflatten(2, (4, 16)).transpose(1, 2)
    q, _ = apply_rotary_pos_emb(q, q, cos, sin)
    by_head = [q[:, 2 * head : 2 * head + 2].flatten(0, 2) for head in range(2)]
    expected = torch.block_diag(*(2 * second_moment(rows) for rows in by_head))
    metrics = metrics_of("attention", model, None)
    torch.testing.assert_close(metrics[2, "k"], shrunk(expected), rtol=1e-4, atol=1e-5)
    columns = layer.o_proj.weight.unflatten(1, (4, 16))
    grams = [sum(columns[:, h].T @ columns[:, h] for h in (2 * head, 2 * head + 1)) for head in range(2)]
    torch.testing.assert_close(metrics[2, "v"], shrunk(torch.block_diag(*grams)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gradient", "attention"])
def test_a_layer_s_metric_does_not_depend_on_which_layers_are_asked_for(kind: str) -> None:
    model = tiny.build("llama")
    rotation = KeyRotation(model)
    together, alone = metrics_of(kind, model, rotation), metrics_of(kind, model, rotation, layers=[2])
    for part in PARTS:
        assert torch.equal(alone[2, part], together[2, part])


def test_without_gradients_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:

    class NoGradients(gradients.GradientCache):
        def states_and_gradients(self, layer: int, part: str) -> tuple[torch.Tensor, None]:
            return super().states_and_gradients(layer, part)[0], None

    monkeypatch.setattr(gradients, "GradientCache", NoGradients)
    with pytest.raises(UserError, match="--error-metric none"):
        metrics_of("gradient", tiny.build("llama"), None)


def test_shrinking_keeps_the_trace_and_gives_the_identity_where_nothing_was_seen() -> None:
    metric = second_moment(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    assert shrunk(metric).trace().item() == pytest.approx(metric.trace().item(), rel=1e-5)
    assert torch.equal(shrunk(torch.zeros(4, 4)), torch.eye(4))


@pytest.mark.parametrize("kind", ["gradient", "attention"])
def test_metrics_are_estimated_once_a_folder(
    kind: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process finds them for the layers that were asked for; those of others are estimated then."""
    asked: list[list[int]] = []

    def watched(kind: str, loaded: Any, sample: MetricSample, progress: Any) -> ErrorMetrics:
        asked.append(list(sample.layers))
        return fit_error_metrics(kind, loaded, sample, progress)

    monkeypatch.setattr(metric_store, "fit_error_metrics", watched)

    def metrics(layers: Sequence[int], folder: str = "run") -> ErrorMetrics:
        evaluator = evaluator_of({**settings, "fit.error_metric": kind}, tmp_path / folder)
        return evaluator.codecs.metrics.of(layers)

    first, again, more = metrics([0, 1]), metrics([0, 1]), metrics([1, 2])
    assert asked == [[0, 1], [2]]
    assert first.keys() == again.keys() == {(layer, part) for layer in (0, 1) for part in PARTS}
    assert all(torch.equal(again[site], metric) for site, metric in first.items())
    alone = metrics([0, 1, 2], "other")
    assert all(torch.equal(alone[site], metric) for site, metric in more.items()), "those of other layers do not matter"


def test_a_damaged_file_of_metrics_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    changed = {**settings, "fit.error_metric": "gradient"}
    evaluator = evaluator_of(changed, tmp_path / "run")
    evaluator.codecs.metrics.of([0])
    (path,) = (folder_of(evaluator) / "metrics").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"metrics.*damaged.*delete it"):
        evaluator_of(changed, tmp_path / "run").codecs.metrics.of([0])


def test_attention_weights_come_from_offloaded_projections_too(tmp_path: Path) -> None:
    """On `meta` until their module is called."""
    expected = metrics_of("attention", tiny.build("llama"), None)
    found = metrics_of("attention", offloaded(tiny.build("llama"), "a device map", tmp_path), None)
    for site, metric in expected.items():
        torch.testing.assert_close(found[site], metric)

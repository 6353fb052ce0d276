"""Captured keys and values against those that a stock cache holds after a plain forward pass."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from leankv import UserError
from leankv.calibration.activations import StoredActivations, find_activations
from leankv.calibration.capture import capture, vectors_in_memory
from leankv.data.blocks import Blocks
from leankv.models.fingerprint import fingerprint
from leankv.models.geometry import find_geometry
from leankv.models.loading import LoadedModel, numerics
from leankv.progress import Silent
from tests import tiny
from tests.run_folders import evaluator_of


def loaded(model: Any) -> LoadedModel:
    return LoadedModel(model, tiny.tokenizer(), "tiny", find_geometry(model), fingerprint(model), numerics(model))


def blocks(length: int, count: int = 5) -> Blocks:
    return Blocks(tiny.tokens(count, length), "calibration", "random tokens")


def captured(
    model: Any, text: Blocks, folder: Path, layers: tuple[int, ...] = (0, 1, 2, 3), batch_size: int = 1
) -> StoredActivations:
    return capture(loaded(model), text, folder, layers, batch_size, {"about": "a test"}, Silent())


def vectors(states: torch.Tensor) -> torch.Tensor:
    """`[B, heads, T, head_dim]` -> `[B T, heads head_dim]`, written out token by token."""
    return torch.stack([states[b, :, t].flatten() for b in range(states.shape[0]) for t in range(states.shape[2])])


class KeepsAll(DynamicCache):
    """A stock cache that also keeps, per layer, every key and value that was ever handed to it."""

    def __init__(self, config: Any):
        super().__init__(config=config)
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.seen[layer_idx] = (k, v)
        return super().update(k, v, layer_idx)


@torch.no_grad()
def test_captured_vectors_are_those_of_the_stock_cache(model: Any, tmp_path: Path) -> None:
    """Sequences shorter than the sliding window, so that the stock cache holds them whole."""
    text = blocks(length=11)
    captured(model, text, tmp_path / "activations")
    expected: dict[tuple[int, str], list[torch.Tensor]] = {}
    for tokens in text.tokens:
        cache = DynamicCache(config=model.config)
        model(tokens[None], past_key_values=cache)
        for layer, held in enumerate(cache.layers):
            expected.setdefault((layer, "k"), []).append(vectors(held.keys))
            expected.setdefault((layer, "v"), []).append(vectors(held.values))
    for layer in range(4):
        tensors = load_file(tmp_path / "activations" / f"layer-{layer:03d}.safetensors")
        assert set(tensors) == {"k", "v"}
        for part, tensor in tensors.items():
            assert torch.equal(tensor, torch.cat(expected[layer, part]))


@torch.no_grad()
def test_tokens_beyond_the_sliding_window_are_captured_too(model: Any, tmp_path: Path) -> None:
    text = blocks(length=30, count=3)
    activations = captured(model, text, tmp_path / "activations")
    for number, tokens in enumerate(text.tokens):
        cache = KeepsAll(model.config)
        model(tokens[None], past_key_values=cache)
        own = slice(30 * number, 30 * (number + 1))
        for layer, (k, v) in cache.seen.items():
            assert torch.equal(activations.read(layer, "k")[own], vectors(k))
            assert torch.equal(activations.read(layer, "v")[own], vectors(v))


def test_batches_of_blocks_are_written_in_the_same_order(model: Any, tmp_path: Path) -> None:
    """Also a last batch that is not full."""
    one = captured(model, blocks(20), tmp_path / "one")
    two = captured(model, blocks(20), tmp_path / "two", batch_size=2)
    for layer in range(4):
        for part in ("k", "v"):
            torch.testing.assert_close(two.read(layer, part), one.read(layer, part), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_capture_in_memory_is_the_one_on_disk(model: Any, tmp_path: Path, batch_size: int) -> None:
    """Vectors, and all that a manifest says but what is of the clock and of the folder."""
    text, layers = blocks(20), (1, 3)
    stored = captured(model, text, tmp_path / "activations", layers, batch_size)
    held = vectors_in_memory(loaded(model), text, layers, batch_size, Silent())
    for layer in layers:
        for part in ("k", "v"):
            assert torch.equal(held.read(layer, part), stored.read(layer, part))
    for name in ("layers", "widths", "parts", "blocks", "block_length", "dtype"):
        assert held.manifest[name] == stored.manifest[name]


def test_bfloat16_activations_stay_bfloat16(tmp_path: Path) -> None:
    model = tiny.build("llama").to(torch.bfloat16)
    text = blocks(9, count=2)
    captured(model, text, tmp_path / "activations")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(text.tokens[:1], past_key_values=cache)
    k = load_file(tmp_path / "activations" / "layer-002.safetensors")["k"]
    assert k.dtype == torch.bfloat16
    assert torch.equal(k[:9], vectors(cache.layers[2].keys))


def test_only_the_layers_asked_for_are_written(model: Any, tmp_path: Path) -> None:
    activations = captured(model, blocks(10), tmp_path / "some", layers=(1, 3))
    assert {path.name for path in activations.folder.iterdir()} == {
        "layer-001.safetensors",
        "layer-003.safetensors",
        "manifest.json",
    }
    everything = captured(model, blocks(10), tmp_path / "all")
    for layer in (1, 3):
        assert torch.equal(activations.read(layer, "v"), everything.read(layer, "v"))
    assert activations.manifest["layers"] == [1, 3]
    assert activations.manifest["blocks"] == 5
    assert activations.manifest["block_length"] == 10
    assert activations.manifest["dtype"] == "float32"
    assert activations.manifest["depends_on"] == {"about": "a test"}


@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_named_with_layer_and_part(tmp_path: Path, part: str, value: float) -> None:
    model = tiny.build("llama")
    model.get_parameter(f"model.layers.2.self_attn.{part}_proj.weight").data[3] = value
    with pytest.raises(UserError, match="layer 2 .*part " + part) as caught:
        captured(model, blocks(10), tmp_path / "activations")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="layer 2 .*part " + part):
        vectors_in_memory(loaded(model), blocks(10), (0, 1, 2, 3), 1, Silent())
    assert find_activations(tmp_path / "activations") is None


def test_layers_that_were_not_asked_for_may_be_broken(tmp_path: Path) -> None:
    model = tiny.build("llama")
    model.get_parameter("model.layers.2.self_attn.v_proj.weight").data[3] = math.nan
    assert captured(model, blocks(10), tmp_path / "activations", layers=(0, 1)).manifest["layers"] == [0, 1]


def test_an_unfinished_capture_is_not_found(tmp_path: Path) -> None:
    """Without its manifest a folder of activations may be cut anywhere; the next capture begins again."""
    model, folder = tiny.build("llama"), tmp_path / "activations"
    whole = captured(model, blocks(10), folder)
    assert find_activations(folder) == whole
    expected = whole.read(1, "k").clone()  # what is read is mapped from the file
    (folder / "manifest.json").unlink()
    (folder / "layer-001.safetensors").write_bytes(b"cut")
    assert find_activations(folder) is None
    assert torch.equal(captured(model, blocks(10), folder).read(1, "k"), expected)


def test_a_capture_that_is_half_deleted_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may be killed while it deletes; what is left must not pass for a capture."""
    activations = captured(tiny.build("llama"), blocks(10), tmp_path / "activations")

    def killed_after_one_file(folder: Path) -> None:
        (folder / "layer-000.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed_after_one_file)
    with pytest.raises(KeyboardInterrupt):
        activations.delete()
    assert find_activations(activations.folder) is None


def test_a_stopped_runs_capture_is_used_again(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capturing costs a pass over the model, fitting may be stopped."""
    first = evaluator_of(settings, tmp_path).codecs.activations.of([0, 1, 2, 3])
    monkeypatch.setattr("leankv.studies.activation_store.capture", pytest.fail)
    assert evaluator_of(settings, tmp_path).codecs.activations.of([1, 2]) == first


def test_files_are_closed_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full while a later layer's file is begun: those before it and the one under way are closed."""
    opened: list[Any] = []
    open_path: Callable[..., Any] = Path.open

    class Full:
        def __init__(self, file: Any):
            self.file = file

        def write(self, data: bytes) -> int:
            if len(opened) == 3:
                raise OSError(28, "No space left on device")
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

    def watched(path: Path, *args: Any, **kwargs: Any) -> Any:
        file = open_path(path, *args, **kwargs)
        if path.suffix != ".safetensors":
            return file
        opened.append(file)
        return Full(file)

    monkeypatch.setattr(Path, "open", watched)
    with pytest.raises(UserError, match="No space left on device"):
        captured(tiny.build("llama"), blocks(10), tmp_path / "activations")
    still_open = [not file.closed for file in opened]
    for file in opened:
        file.close()
    assert len(opened) == 3
    assert not any(still_open)

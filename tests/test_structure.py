"""What is known of the inside of models, and running them from one of their layers on."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import leankv
from leankv.models.observers import attention_windows, layer_inputs
from leankv.models.skipping import skipping
from leankv.models.structure import (
    attention_heads,
    find_decoder_layers,
    has_latent_attention,
    max_positions,
    output_projection,
    rope_types,
    rotary_modules,
)
from tests import tiny

ROTARY = {"llama": 1, "mistral": 1, "qwen3": 1, "gemma3": 1, "gpt2": 0}
WINDOWS = {"mistral": [12] * 4, "gemma3": [12, 12, None, 12]}


def test_every_architecture_answers(architecture: str, model: Any) -> None:
    layers = find_decoder_layers(model)
    assert layers is not None
    assert len(layers) == 4
    assert len(rotary_modules(model)) == ROTARY[architecture]
    assert attention_windows(model.config) == WINDOWS.get(architecture, [None] * 4)
    assert attention_heads(model.config) == (2 if architecture == "gpt2" else 4)
    assert max_positions(model.config) == 512
    assert not has_latent_attention(model.config)
    attention = layers[0].attn if architecture == "gpt2" else layers[0].self_attn
    assert output_projection(attention) is (attention.c_proj if architecture == "gpt2" else attention.o_proj)


def test_what_is_not_known_is_said() -> None:
    """Of a model without decoder layers, rotary modules, output projection or positions."""

    class Config(SimpleNamespace):
        def get_text_config(self, decoder: bool) -> "Config":
            return self

    model = torch.nn.Linear(2, 2)
    model.config = Config(num_hidden_layers=3)
    assert find_decoder_layers(model) is None
    assert rotary_modules(model) == []
    assert output_projection(model) is None
    assert max_positions(model.config) is None
    assert attention_heads(model.config) is None
    assert rope_types(model.config) == set()


def test_kinds_of_scaling_are_found_for_each_kind_of_layer() -> None:
    rope = {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {"rope_type": "default"}}
    config = tiny.build("llama").config
    config.rope_parameters = rope
    assert rope_types(config) == {"yarn", "default"}


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_pass_from_a_later_layer_on_ends_alike(model: Any, first: int) -> None:
    tokens = tiny.tokens(2, 20)
    layers = find_decoder_layers(model)
    assert layers is not None
    before, seen = list(layers), {}
    with layer_inputs(layers, range(4), seen.__setitem__):
        expected = model(tokens).logits
    assert list(seen) == [0, 1, 2, 3]
    reads = []

    def read(like: torch.Tensor) -> torch.Tensor:
        reads.append(like.shape)
        return seen[first]

    with skipping(layers, first, read):
        assert torch.equal(model(tokens).logits, expected)
    assert len(reads) == (first > 0)
    assert list(layers) == before
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_search_knows_no_model() -> None:
    """Numbers only: nothing of it waits for torch."""
    code = "import leankv.search.greedy, leankv.search.successive_halving, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_cache_and_the_observers_know_transformers_cache_classes() -> None:
    root = Path(leankv.__file__).parent
    knowing = {path.relative_to(root) for path in root.rglob("*.py") if "transformers.cache_utils" in path.read_text()}
    assert {path for path in knowing if path.parts[0] != "cache"} == {Path("models/observers.py")}

"""Loading models, the geometry of their caches, fingerprints, and the convention of rotary keys."""

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from leankv import LeanCache, ModelConfig, UserError, load_model
from leankv.models.fingerprint import fingerprint
from leankv.models.geometry import LayerGeometry, find_geometry
from leankv.models.loading import describe, look_at
from leankv.models.observers import RecordingCache
from leankv.models.rope import CONVENTIONS, find_conventions, rotate, unrotate
from tests import tiny

GEOMETRIES = {
    "llama": (LayerGeometry(2, 16, None),) * 4,
    "mistral": (LayerGeometry(2, 16, 12),) * 4,
    "qwen3": (LayerGeometry(2, 16, None),) * 4,
    "gemma3": tuple(LayerGeometry(2, 16, window) for window in (12, 12, None, 12)),
    "gpt2": (LayerGeometry(2, 16, None),) * 4,
}
REFUSED = {
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4),
    "jamba": lambda: transformers.JambaConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        num_experts=2,
        mamba_d_state=4,
    ),
}


def refusal(config: ModelConfig) -> str:
    """The sentence that refuses to load a model."""
    with pytest.raises(UserError) as caught:
        load_model(config)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 500
    return sentence


# -- geometry ----------------------------------------------------------------------------------------------------------


def test_geometry(architecture: str, model: Any) -> None:
    geometry = find_geometry(model)
    assert geometry.layers == GEOMETRIES[architecture]
    assert geometry.width == 32
    assert geometry.bytes_per_token == 4 * 2 * 32 * 2  # layers, K and V, width, 16 bits


def test_bundles_know_layers_by_names_that_stay() -> None:
    layer = {"kv_heads": 2, "head_dim": 16, "window": 12}
    assert describe(look_at(tiny.build("mistral"), None))["layers"] == [layer] * 4
    sliding = {"kv_heads": 4, "head_dim": 16, "window": 12, "v_head_dim": 12}
    assert describe(look_at(tiny.build("mimo"), None))["layers"][1] == sliding


def test_geometry_says_what_the_stock_cache_holds(model: Any) -> None:
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(tiny.tokens(1, 30), past_key_values=cache)
    for layer, geometry in zip(cache.layers, find_geometry(model).layers, strict=True):
        assert layer.keys.shape == (1, geometry.kv_heads, geometry.tokens_held(30), geometry.head_dim)


@pytest.mark.parametrize("kind", list(REFUSED))
def test_models_without_a_plain_attention_cache_are_refused_by_name(kind: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(REFUSED[kind]()).eval()
    with pytest.raises(UserError, match=kind) as caught:
        find_geometry(model)
    assert "\n" not in str(caught.value)


def test_latent_attention_is_named_as_the_reason() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(REFUSED["deepseek_v3"]()).eval()
    with pytest.raises(UserError, match="latent attention"):
        find_geometry(model)


def test_more_heads_of_keys_than_of_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")

    def forward(input_ids: torch.Tensor, past_key_values: Any) -> None:
        for layer in range(4):
            past_key_values.update(torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 2, 16), layer)

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(UserError, match=r"keys of 4 x 8 and values of 2 x 16 numbers.* as many heads"):
        find_geometry(model)


# -- loading -----------------------------------------------------------------------------------------------------------


def test_a_saved_folder_loads_as_it_was(llama_folder: Path) -> None:
    loaded = load_model(ModelConfig(str(llama_folder), device="cpu", dtype="float32"))
    model, tokens = tiny.build("llama"), tiny.tokens(1, 20)
    assert loaded.name == str(llama_folder)
    assert loaded.geometry == find_geometry(model)
    assert loaded.fingerprint == fingerprint(model)
    assert loaded.numerics["dtype"] == "float32"
    assert loaded.numerics["device"] == "cpu"
    assert not loaded.model.training
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, model(tokens).logits)
    assert loaded.tokenizer.decode(loaded.tokenizer("a city")["input_ids"]) == "a city"


def test_a_device_map_is_followed(llama_folder: Path) -> None:
    loaded = load_model(ModelConfig(str(llama_folder), device_map="auto", dtype="float32"))
    assert loaded.fingerprint == fingerprint(tiny.build("llama"))
    tokens = tiny.tokens(1, 20)
    with torch.no_grad():
        assert torch.equal(
            loaded.model(tokens, past_key_values=LeanCache(loaded.model.config, {}, sinks=0, window=0)).logits,
            tiny.build("llama")(tokens).logits,
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_asked_for_is_used(llama_folder: Path, dtype: str) -> None:
    loaded = load_model(ModelConfig(str(llama_folder), device="cpu", dtype=dtype))
    assert loaded.model.dtype == getattr(torch, dtype)
    assert loaded.numerics["dtype"] == dtype


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama whose widths are multiples of 64, as NF4 on the CPU wants them."""
    return tiny.save(tmp_path_factory.mktemp("wide"), tiny.build("llama", hidden_size=64))


@pytest.mark.parametrize("placement", [{"device": "cpu"}, {"device_map": "auto"}], ids=["device", "device map"])
def test_nf4_on_the_cpu(wide_folder: Path, tmp_path: Path, placement: dict[str, str]) -> None:
    loaded = load_model(ModelConfig(str(wide_folder), dtype="bfloat16", load_in_4bit=True, **placement))
    weight = loaded.model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.uint8
    assert weight.numel() == 64 * 64 // 2  # two weights a byte
    assert weight.quant_state.quant_type == "nf4"
    assert loaded.geometry.layers == GEOMETRIES["llama"]
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(ModelConfig(str(tmp_path), device="cpu"))
    assert again.geometry == loaded.geometry
    assert again.model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8


def test_looking_at_an_nf4_model_does_not_change_it(wide_folder: Path) -> None:
    """Its fingerprint is the same before and after it ran, and taking it leaves every logit as it was."""
    loaded = load_model(ModelConfig(str(wide_folder), device="cpu", dtype="bfloat16", load_in_4bit=True))
    tokens = tiny.tokens(2, 20)
    with torch.no_grad():
        before = loaded.model(tokens).logits
        for _ in range(2):
            assert fingerprint(loaded.model) == loaded.fingerprint
            assert torch.equal(loaded.model(tokens).logits, before)


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_one_checkpoint_has_one_fingerprint_in_any_dtype(architecture: str) -> None:
    """A bfloat16 checkpoint loaded in float32 is the same model."""
    model = tiny.build(architecture).to(torch.bfloat16)
    before = fingerprint(model)
    assert before == fingerprint(model.float())


def test_a_fingerprint_depends_on_the_seed(architecture: str) -> None:
    assert fingerprint(tiny.build(architecture)) != fingerprint(tiny.build(architecture, seed=1))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.self_attn.k_proj.weight"])
@pytest.mark.parametrize("row", [0, 1, 13, -1])
def test_a_fingerprint_depends_on_every_row(name: str, row: int) -> None:
    """An edit of a single row, as when one token's embedding is tuned, makes another model."""
    model = tiny.build("llama")
    before = fingerprint(model)
    model.get_parameter(name).data[row] += 0.5
    assert fingerprint(model) != before


def test_a_quantized_model_has_a_fingerprint_of_its_own(wide_folder: Path) -> None:
    plain, quantized, other = (
        load_model(ModelConfig(str(folder), device="cpu", dtype="bfloat16", load_in_4bit=in_4bit))
        for folder, in_4bit in ((wide_folder, False), (wide_folder, True), (wide_folder, True))
    )
    assert plain.fingerprint != quantized.fingerprint
    assert quantized.fingerprint == other.fingerprint


# -- what cannot be loaded ---------------------------------------------------------------------------------------------


def test_an_unknown_hub_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries where there is no network
    sentence = refusal(ModelConfig("nobody/no-such-model-anywhere", device="cpu"))
    assert "nobody/no-such-model-anywhere" in sentence
    assert "network" in sentence


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal(ModelConfig(str(tmp_path / "none")))


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    sentence = refusal(ModelConfig(str(tmp_path), device="cpu"))
    assert str(tmp_path) in sentence
    assert "config.json" in sentence


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny.save(tmp_path, tiny.build("llama"))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    sentence = refusal(ModelConfig(str(tmp_path), device="cpu"))
    assert str(tmp_path) in sentence
    assert "damaged" in sentence


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    tiny.save(tmp_path, tiny.build("llama"))
    (tmp_path / "model.safetensors").unlink()
    assert str(tmp_path) in refusal(ModelConfig(str(tmp_path), device="cpu"))


def test_weights_that_lack_a_layer_are_refused(tmp_path: Path) -> None:
    """transformers would go on with random weights in their place."""
    from safetensors.torch import load_file, save_file

    tiny.save(tmp_path, tiny.build("llama"))
    weights = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if ".layers.2." not in k}, weights, {"format": "pt"})
    assert str(tmp_path) in refusal(ModelConfig(str(tmp_path), device="cpu"))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path)
    assert str(tmp_path) in refusal(ModelConfig(str(tmp_path), device="cpu"))


@pytest.mark.skipif(find_spec("gguf") is None, reason="the package gguf is not installed")
def test_a_corrupt_gguf_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 100)
    sentence = refusal(ModelConfig(str(path), device="cpu"))
    assert str(path) in sentence
    assert "damaged" in sentence


def test_a_missing_gguf_file_is_refused(tmp_path: Path) -> None:
    sentence = refusal(ModelConfig(str(tmp_path / "model.gguf")))
    assert str(tmp_path / "model.gguf") in sentence
    assert "does not exist" in sentence


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "", "mps"])
@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has an mps device")
def test_a_device_that_is_not_there_is_refused(llama_folder: Path, device: str) -> None:
    assert "--device" in refusal(ModelConfig(str(llama_folder), device=device))


# -- rotary keys -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3"])
def test_halves_are_rotated_in_the_llama_family(name: str) -> None:
    assert find_conventions(tiny.build(name)) == ["half"] * 4


def test_pairs_are_rotated_in_cohere() -> None:
    torch.manual_seed(0)
    config = transformers.CohereConfig(**{key: value for key, value in tiny.COMMON.items() if key != "head_dim"})
    assert find_conventions(transformers.AutoModelForCausalLM.from_config(config).eval()) == ["interleaved"] * 4


def test_rotation_without_tables_is_not_recognised() -> None:
    """GPT-J computes its sines inside attention, where nothing shows them."""
    torch.manual_seed(0)
    config = transformers.GPTJConfig(
        vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, initializer_range=0.2
    )
    assert find_conventions(transformers.AutoModelForCausalLM.from_config(config).eval()) == [None] * 2


def test_learned_positions_match_no_convention() -> None:
    assert find_conventions(tiny.build("gpt2")) == [None] * 4


def test_scaled_rotary_embeddings_are_recognised() -> None:
    """Under yarn cos and sin are longer than a circle's."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
    assert find_conventions(tiny.build("llama", rope_parameters=rope)) == ["half"] * 4


def test_a_model_keeps_answering_as_before_after_the_probe(model: Any) -> None:
    tokens = tiny.tokens(1, 20)
    with torch.no_grad():
        before = model(tokens).logits
        find_conventions(model)
        assert torch.equal(model(tokens).logits, before)
    assert not any(module._forward_hooks for module in model.modules())


def by_half(x: torch.Tensor) -> torch.Tensor:
    """As transformers' Llama writes it."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def by_pair(x: torch.Tensor) -> torch.Tensor:
    """As transformers' GPT-J writes it."""
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


@pytest.mark.parametrize(("convention", "rotated"), [("half", by_half), ("interleaved", by_pair)])
def test_unrotate_undoes_rotate(convention: str, rotated: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Also of scaled tables, and of keys that are rotated in their first dimensions only."""
    pairing, generator = CONVENTIONS[convention], torch.Generator().manual_seed(0)
    k = torch.randn(2, 3, 5, 16, generator=generator)
    angles = torch.rand(2, 5, 4, generator=generator) * 2 * math.pi
    doubled = torch.cat([angles, angles], dim=-1) if convention == "half" else angles.repeat_interleave(2, dim=-1)
    cos, sin = 1.3 * doubled.cos(), 1.3 * doubled.sin()
    expected_keys = k.clone()
    expected_keys[..., :8] = k[..., :8] * cos[:, None] + rotated(k[..., :8]) * sin[:, None]
    assert not torch.allclose(expected_keys, k, atol=0.1)
    torch.testing.assert_close(rotate(k, cos, sin, pairing), expected_keys)
    torch.testing.assert_close(unrotate(expected_keys, cos, sin, pairing), k, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_keys_pre_rope_do_not_depend_on_the_position() -> None:
    """The same token anywhere in a sequence of its own kind has the same first-layer key before rotation."""
    model = tiny.build("llama")
    keys: dict[int, torch.Tensor] = {}
    tokens = torch.full((1, 9), 65)
    model(tokens, past_key_values=RecordingCache(model.config, lambda layer, k, v: keys.setdefault(layer, k)))
    cos, sin = model.model.rotary_emb(keys[0], torch.arange(9)[None])
    before = unrotate(keys[0], cos, sin, CONVENTIONS["half"])
    assert not torch.allclose(keys[0][:, :, 1:], keys[0][:, :, :1], atol=0.1)
    torch.testing.assert_close(before, before[:, :, :1].expand_as(before), atol=1e-5, rtol=1e-5)

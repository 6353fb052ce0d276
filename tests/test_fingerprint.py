"""Two models have one fingerprint exactly when they compute the same, wherever their weights lie."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import accelerate
import numpy
import pytest
import torch
import transformers

from leankv import ModelConfig, UserError, load_model
from leankv.models.fingerprint import fingerprint
from tests import tiny


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"rms_norm_eps": 1e-2}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("mistral", {"sliding_window": 8}),
        ("mistral", {"sliding_window": None}),
        ("gemma3", {"query_pre_attn_scalar": 4}),
        ("gemma3", {"final_logit_softcapping": 0.5}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ],
    ids=str,
)
def test_a_setting_that_changes_the_logits_changes_the_fingerprint(name: str, change: dict[str, Any]) -> None:
    """The weights are the same; only the configuration differs."""
    plain, changed = tiny.build(name), tiny.build(name, **change)
    tokens = tiny.tokens(1, 40)
    with torch.no_grad():
        assert not torch.equal(plain(tokens).logits, changed(tokens).logits)
    assert fingerprint(plain) != fingerprint(changed)


def test_a_setting_that_is_not_known_counts() -> None:
    """Remote code brings settings of its own."""
    assert fingerprint(tiny.build("llama")) != fingerprint(tiny.build("llama", its_own_scale=2))


@pytest.mark.parametrize(
    "change",
    [
        {"_name_or_path": "elsewhere"},
        {"eos_token_id": 3, "bos_token_id": 4},
        {"use_cache": False, "output_attentions": False},
        {"attention_dropout": 0.5, "initializer_range": 0.2},
        {"architectures": ["LlamaForCausalLM"]},
        {"nobody_set_this": None},
    ],
    ids=str,
)
def test_names_generation_and_training_do_not_count(change: dict[str, Any]) -> None:
    assert fingerprint(tiny.build("llama")) == fingerprint(tiny.build("llama", **change))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saving_and_reloading_keeps_it(architecture: str, tmp_path: Path, dtype: str) -> None:
    """Of a bfloat16 checkpoint, read in either dtype, with a device map, and after a forward pass."""
    model = tiny.build(architecture).to(torch.bfloat16)
    expected = fingerprint(model)
    tiny.save(tmp_path, model)
    for placement in ({"device": "cpu"}, {"device_map": "auto"}):
        assert load_model(ModelConfig(str(tmp_path), dtype=dtype, **placement)).fingerprint == expected


def test_the_attention_implementation_is_none_of_its_business() -> None:
    """It is among a run's numerics."""
    model = tiny.build("llama")
    before = fingerprint(model)
    model.set_attn_implementation("eager")
    assert fingerprint(model) == before


def write_gguf(path: Path) -> None:
    """A tiny Llama of one layer with random weights, as llama.cpp names them."""
    import gguf

    writer, random = gguf.GGUFWriter(path, "llama"), numpy.random.default_rng(0)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(tiny.VOCABULARY)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32), "attn_norm": (32,)}
    shapes |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48), "ffn_norm": (32,)}
    outside = {"token_embd": (tiny.VOCABULARY, 32), "output": (tiny.VOCABULARY, 32), "output_norm": (32,)}
    for name, shape in [*outside.items(), *((f"blk.0.{name}", shape) for name, shape in shapes.items())]:
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(find_spec("gguf") is None, reason="the package gguf is not installed")
def test_a_gguf_file_and_the_folder_it_is_saved_to_are_one_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model = load(
        tmp_path,
        gguf_file="model.gguf",
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    expected = fingerprint(model)
    model.save_pretrained(tmp_path / "folder")
    assert fingerprint(load(tmp_path / "folder", dtype=torch.bfloat16)) == expected


# -- offloaded weights -------------------------------------------------------------------------------------------------


def offloaded(model: Any, how: str, folder: Path) -> Any:
    if how == "cpu":
        return accelerate.cpu_offload(model)
    if how == "disk":
        return accelerate.disk_offload(model, folder)
    if how == "cpu, whole layers at once":
        return accelerate.cpu_offload(model, preload_module_classes=["LlamaDecoderLayer"])
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "disk"}
    return accelerate.dispatch_model(model, {**device_map, "model.rotary_emb": "cpu"}, offload_dir=folder)


@pytest.mark.parametrize("how", ["cpu", "disk", "cpu, whole layers at once", "a device map"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_offloading_changes_nothing(tmp_path: Path, how: str, tied: bool) -> None:
    expected = fingerprint(tiny.build("llama", tie_word_embeddings=tied))
    model = offloaded(tiny.build("llama", tie_word_embeddings=tied), how, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert fingerprint(model) == expected


def test_offloaded_fine_tunes_differ(tmp_path: Path) -> None:
    """By one row of one weight, which is on the disk in both."""
    tuned = tiny.build("llama")
    tuned.get_parameter("model.layers.2.self_attn.k_proj.weight").data[3] += 0.5
    models = [offloaded(tiny.build("llama"), "disk", tmp_path / "one"), offloaded(tuned, "disk", tmp_path / "other")]
    assert len({fingerprint(model) for model in models}) == 2


def test_weights_that_are_nowhere_are_named() -> None:
    with torch.device("meta"):
        model = tiny.build("llama")
    with pytest.raises(UserError, match=r"embed_tokens\.weight"):
        fingerprint(model)

"""Keys encoded pre-RoPE: the rotation and its way back, in caches, in a run and in a bundle."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from leankv.cache.bundle import load_bundle, read_bundle_config
from leankv.cache.lean_cache import LeanCache
from leankv.codecs.identity import Identity
from leankv.config.loading import load_experiment
from leankv.errors import UserError
from leankv.evaluation.perplexity import measure_nats
from leankv.models.rope import KeyRotation
from leankv.progress import Silent
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.select import select
from leankv.studies.sweep import sweep
from leankv.studies.workspace import Workspace
from tests import tiny
from tests.oracles import Rounding, identity_plan, plan_of, recorded

ROTARY = [name for name in tiny.ARCHITECTURES if name != "gpt2"]
SCALED: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 1e4,
    },
}


def as_cached(vectors: torch.Tensor, heads: int = 2) -> torch.Tensor:
    """`[T, W]` -> `[1, heads, T, head_dim]`."""
    return vectors.unflatten(1, (heads, -1)).transpose(0, 1)[None]


def built(name: str) -> Any:
    return tiny.build("llama", rope_parameters=SCALED[name]) if name in SCALED else tiny.build(name)


@pytest.mark.parametrize("name", [*ROTARY, *SCALED])
def test_what_is_taken_off_keys_is_put_back(name: str) -> None:
    model = built(name)
    rotation = KeyRotation(model)
    tokens = tiny.tokens(1, 60)
    positions = torch.arange(60)[None]
    for (layer, part), vectors in recorded(model, tokens).items():
        if part == "k":
            keys = as_cached(vectors)
            back = rotation.restore(layer, rotation.remove(layer, keys, positions), positions)
            torch.testing.assert_close(back, keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*ROTARY, *SCALED])
def test_keys_of_the_first_layer_pre_rope_know_nothing_of_their_place(name: str) -> None:
    """The same token everywhere has one key pre-RoPE, and as many cached ones as places."""
    model = built(name)
    keys = as_cached(recorded(model, torch.full((1, 30), 7))[0, "k"])
    plain = KeyRotation(model).remove(0, keys, torch.arange(30)[None])
    assert (plain - plain[:, :, :1]).norm() < 1e-4 * plain.norm()
    assert (keys - keys[:, :, :1]).norm() > 0.1 * keys.norm()


def test_gradients_rotate_as_the_chain_rule_says() -> None:
    """Also under yarn, where the tables are no pure rotation."""
    model = built("yarn")
    rotation, positions = KeyRotation(model), torch.arange(9)[None]
    weights = torch.randn(1, 2, 9, 16)
    gradient = rotation.remove_from_gradient(1, weights, positions)
    for _ in range(5):  # restoring is linear, so `sum(restore(x) w)` is `sum(x gradient)` for every x
        plain = torch.randn(1, 2, 9, 16)
        restored = rotation.restore(1, plain, positions)
        torch.testing.assert_close((restored * weights).sum(), (plain * gradient).sum(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=["greedy", "beams", "chunks"]
)
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_lossless_codecs_generate_as_the_stock_cache(name: str, options: dict[str, Any], padded: bool) -> None:
    """Rows with and without left padding, whose keys stand at other positions than places."""
    model = tiny.build(name)
    tokens, mask = tiny.tokens(2, 11), torch.ones(2, 11, dtype=torch.int64)
    if padded:
        tokens[0, :4], mask[0, :4] = 0, 0
    lean = LeanCache(
        model.config, identity_plan(model), sinks=1, window=2, attention_mask=mask, rotation=KeyRotation(model)
    )
    settings = {"attention_mask": mask, "max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, **options}
    expected = model.generate(tokens, past_key_values=DynamicCache(config=model.config), **settings)
    assert torch.equal(model.generate(tokens, past_key_values=lean, **settings), expected)


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@torch.no_grad()
def test_identity_costs_nothing_in_any_dtype(name: str, dtype: torch.dtype) -> None:
    """Not one bit, though keys round when they are rotated back and forth; and it holds what the stock cache does."""
    model = tiny.build(name).to(dtype)
    stock = DynamicCache(config=model.config)
    lean = LeanCache(model.config, identity_plan(model), sinks=1, window=2, rotation=KeyRotation(model))
    for chunk in tiny.tokens(2, 20).split([11, 1, 8], dim=1):
        expected = model(chunk, past_key_values=stock).logits
        assert torch.equal(model(chunk, past_key_values=lean).logits, expected)
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in stock.layers)
    assert lean.nbytes() == numbers * dtype.itemsize


def test_a_copied_cache_shares_the_model_s_modules() -> None:
    """Copies of one rotation stay one, which tables are made with once a pass."""
    model = built("llama")
    cache = LeanCache(model.config, identity_plan(model), sinks=1, window=2, rotation=KeyRotation(model))
    spaces = [layer.parts["k"].space for layer in copy.deepcopy(cache).layers]
    rotations = {id(space._rotation): space._rotation for space in spaces}
    assert len(rotations) == 1
    (rotation,) = rotations.values()
    assert rotation is not cache.layers[0].parts["k"].space._rotation
    assert {id(found.call.module) for found in rotation._found} == {id(model.model.rotary_emb)}


@pytest.mark.parametrize("name", ROTARY)
def test_a_padded_beam_search_through_values_only(name: str) -> None:
    model = tiny.build(name)
    tokens, mask = tiny.tokens(2, 11), torch.ones(2, 11, dtype=torch.int64)
    tokens[0, :4], mask[0, :4] = 0, 0
    plan = plan_of(model, lambda width: Identity(width, model.dtype), parts=["v"])
    settings = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3}
    expected = model.generate(tokens, past_key_values=DynamicCache(config=model.config), **settings)
    lean = LeanCache(model.config, plan, sinks=1, window=2, attention_mask=mask, rotation=KeyRotation(model))
    assert torch.equal(model.generate(tokens, past_key_values=lean, **settings), expected)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("window", [0, 3])
def test_a_pass_outside_no_grad_gives_the_same_numbers(name: str, window: int) -> None:
    model = tiny.build(name)
    rotation = None if name == "gpt2" else KeyRotation(model)
    chunks = tiny.tokens(2, 12).split([9, 3], dim=1)
    plain, graded = (
        LeanCache(model.config, plan_of(model, Rounding), sinks=1, window=window, rotation=rotation) for _ in range(2)
    )
    for chunk in chunks:
        with torch.no_grad():
            expected = model(chunk, past_key_values=plain).logits
        got = model(chunk, past_key_values=graded).logits
        assert got.requires_grad
        assert torch.equal(got, expected)
    assert graded.nbytes() == plain.nbytes()


def test_keys_rotate_alike_in_pieces_and_in_rows_of_their_own() -> None:
    """Tables are made for what is asked: the same bits, whatever stands beside it."""
    rotation = KeyRotation(tiny.build("gemma3"))
    keys = torch.randn(2, 2, 50, 16)
    positions = torch.stack([torch.arange(50), torch.arange(50) + 7])
    for layer in (0, 2):
        whole = rotation.restore(layer, keys, positions)
        for row in range(2):
            for piece in (slice(0, 1), slice(3, 20), slice(49, 50)):
                own = rotation.restore(layer, keys[[row], :, piece], positions[[row], piece])
                assert torch.equal(own, whole[[row], :, piece])


def test_a_padded_row_is_read_as_it_is_alone() -> None:
    """A lossy codec meets the same keys pre-RoPE whatever padding stands before them."""
    model = tiny.build("llama")
    plan, rotation = plan_of(model, Rounding), KeyRotation(model)
    tokens, padding = tiny.tokens(1, 12), 5
    padded = torch.cat([torch.zeros(1, padding, dtype=torch.int64), tokens], dim=1)
    mask = (torch.arange(padding + 12) >= padding).long()[None]
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    with torch.no_grad():
        cache = LeanCache(model.config, plan, sinks=2, window=0, attention_mask=mask, rotation=rotation)
        got = model(padded, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, padding:]
        expected = model(
            tokens, past_key_values=LeanCache(model.config, plan, sinks=2, window=0, rotation=rotation)
        ).logits
    assert (got - expected).abs().median() < 1e-4


def test_a_rotation_that_changes_with_the_text_is_refused() -> None:
    model = tiny.build("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UserError, match=r"dynamic.*--key-space post-rope"):
        KeyRotation(model)


def test_an_unknown_convention_is_refused_by_layer() -> None:
    with pytest.raises(UserError, match=r"layers 0, 1, 2, 3 of this model was not found.*--key-space post-rope"):
        KeyRotation(tiny.build("gpt2"))


class Told(Silent):
    """Remembers what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def test_auto_stays_post_rope_where_it_must_and_says_so(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["model.name"] = str(tiny.save(tmp_path / "gpt2", tiny.build("gpt2")))
    told = Told()
    workspace = Workspace.open(load_experiment(None, {**settings, "codec.key_space": "auto"}), told)
    assert workspace.key_space == "post-rope"
    assert any("post-rope" in line for line in told.lines)
    changes = {"codec.key_space": "pre-rope", "output_dir": str(tmp_path / "b")}
    demanded = Workspace.open(load_experiment(None, {**settings, **changes}), Silent())
    with pytest.raises(UserError, match="not found"):
        _ = demanded.rotation


@pytest.mark.whole_runs
def test_a_run_in_pre_rope_space_ends_in_a_bundle_that_reads_the_same(settings: dict[str, Any]) -> None:
    changes = {"plan": "resid(share:-1,transform:s0.2)", "codec.key_space": "auto", "protocol.kind": "stream"}
    changes |= {"protocol.sinks": 2, "protocol.window": 8, "protocol.chunk": 16}
    workspace = Workspace.open(load_experiment(None, {**settings, **changes}), Silent())
    evaluator, folder = PlanEvaluator(workspace), workspace.folder
    assert folder is not None
    table = sweep(evaluator)
    assert set(table["key_space"]) == {"pre-rope"}
    summary = select(evaluator)
    assert (summary.key_space, summary.selected_layers) == ("pre-rope", summary.selected_layers)
    assert summary.selected_layers
    assert read_bundle_config(folder / "bundle")["key_space"] == "pre-rope"
    model = workspace.loaded.model
    bundle = load_bundle(folder / "bundle", model)
    assert bundle.key_space == "pre-rope"
    measured = measure_nats(
        model, workspace.blocks("report"), evaluator.protocol, bundle.new_cache(encode_every=1).fresh
    )
    assert measured.nats == evaluator.nats(workspace.plan.only(summary.selected_layers), "report").nats
    assert not list(folder.glob("activations-*"))


def test_a_partly_rotary_model_is_rotated_in_part() -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        rotary_pct=0.25,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    keys = as_cached(recorded(model, torch.full((1, 20), 7))[0, "k"])
    plain = KeyRotation(model).remove(0, keys, torch.arange(20)[None])
    assert (plain - plain[:, :, :1]).norm() < 1e-4 * plain.norm()

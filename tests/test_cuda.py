"""On a GPU the same is said as on the CPU: codecs, caches, attention over codes, saved caches, whole commands.

Without one these tests are left out. `LEANKV_TEST_DEVICE=cpu` runs them on the CPU, against itself.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from leankv.cache.code_attention import NAME, code_attention
from leankv.cache.lean_cache import LeanCache
from leankv.cache.on_device import codec_on
from leankv.cache.plan import PlanSpec
from leankv.evaluation.step_peak import peak_bytes
from leankv.models.rope import find_rotation
from tests import tiny
from tests.codec_vectors import fit, fvu, vectors
from tests.run_folders import invoke, succeed, succeed_json
from tests.test_code_attention import PREDICTING, suits
from tests.test_codecs import SPECS
from tests.test_decoded_once import fitted
from tests.test_encode_all import bundle_of
from tests.test_saved_cache import goes_on_alike

DEVICE = torch.device(os.environ.get("LEANKV_TEST_DEVICE", "cuda"))
CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.whole_runs,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]

every_spec = pytest.mark.parametrize("spec", SPECS)
some_specs = pytest.mark.parametrize("spec", ["int:4", "nuq:4+1", "rot:4", "transform:s0.2", PREDICTING])


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Length of the difference, beside what is expected."""
    difference = found.detach().cpu().float() - expected.detach().float()
    return float(difference.norm() / expected.detach().float().norm().clamp_min(1e-30))


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the processor waits for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


# -- codecs ------------------------------------------------------------------------------------------------------------


@every_spec
def test_a_code_says_the_same_on_either_device(spec: str) -> None:
    codec, x = fit(spec, vectors())[0], vectors(seed=1)[0]
    code, there = codec.encode(x), codec_on(codec, DEVICE)
    expected = codec.decode(code)
    assert apart(there.decode(code.to(DEVICE)), expected) < 1e-5
    assert there.serialize(code.to(DEVICE)) == codec.serialize(code)
    back = there.deserialize(codec.serialize(code), len(x))
    if codec.state_dict():  # else it is nowhere
        assert {tensor.device.type for tensor in back.tensors()} == {DEVICE.type}
    assert apart(there.decode(back.to(DEVICE)), expected) < 1e-5
    made_there = there.encode(x.to(DEVICE))
    assert made_there.shape == code.shape
    # A last bit of a product may take a number to the next step, of a few numbers.
    assert apart(there.decode(made_there), expected) < 0.02
    assert made_there.nbytes == pytest.approx(code.nbytes, rel=0.01)


@every_spec
def test_a_codec_fitted_there_does_what_one_fitted_here_does(spec: str) -> None:
    own = vectors()
    here, there = fit(spec, own)[0], fit(spec, own.to(DEVICE))[0]
    x = vectors(seed=1)[0]
    assert fvu(there.to(CPU), x) == pytest.approx(fvu(here, x), rel=0.25, abs=0.02)
    assert there.bits_per_token == pytest.approx(here.bits_per_token, rel=0.1)


# -- caches ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fed(model: Any, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits, a few tokens at a time and then one by one."""
    pieces = (*tokens[:, :-3].split(9, dim=1), *tokens[:, -3:].split(1, dim=1))
    return torch.cat([model(piece.to(model.device), past_key_values=cache).logits for piece in pieces], dim=1)


@some_specs
@pytest.mark.parametrize("attention", ["sdpa", NAME])
def test_a_model_says_the_same_on_either_device(model: Any, spec: str, attention: str) -> None:
    """But for codes that a last bit takes to the next step."""
    model.set_attn_implementation(attention)
    plan, tokens = fitted(model, PlanSpec.uniform(spec)), tiny.tokens(2, 40, seed=3)
    elsewhere = copy.deepcopy(model).to(DEVICE)
    logits = []
    for each in (model, elsewhere):
        cache = LeanCache(
            each.config, plan, sinks=2, window=3, rotation=find_rotation(each, False, lambda reason: None)
        )
        logits.append(fed(each, cache, tokens))
    assert logits[1].device.type == DEVICE.type
    assert apart(logits[1], logits[0]) < 0.02
    assert apart(logits[1][:, :5], logits[0][:, :5]) < 1e-4  # nothing is a code yet


@some_specs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_over_codes_there_is_that_over_what_they_stand_for(spec: str, dtype: torch.dtype) -> None:
    """One layer, given the same keys and values twice, in the dtypes in which models run on a GPU."""
    model = tiny.build("llama").to(dtype)
    model.set_attn_implementation(NAME)
    plan = fitted(model, PlanSpec.uniform(spec))
    model = model.to(DEVICE)
    rotation = find_rotation(model, False, lambda reason: None)
    generator = torch.Generator().manual_seed(5)
    keys, values = (torch.randn(4, 2, 1, 2, 60, 16, generator=generator)).to(DEVICE, dtype).unbind(1)
    query = (3 * torch.randn(4, 1, 4, 1, 16, generator=generator)).to(DEVICE, dtype)
    results = []
    for hands_out in (False, True):
        cache, attended = LeanCache(model.config, plan, sinks=2, window=3, rotation=rotation), []
        for first, last in ((0, 50), (50, 59), (59, 60)):
            for number in range(4):
                layer: Any = cache.layers[number]
                layer.hands_out_codes = hands_out
                read = layer.update(keys[number, :, :, first:last], values[number, :, :, first:last])
                if last == 60:
                    module = model.model.layers[number].self_attn
                    attended.append(code_attention(module, query[number], *read, None)[0])
                elif hands_out:
                    for _ in read[0].pieces(1):
                        pass
        results.append(torch.cat(attended))
    tolerance = {torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}[dtype]
    # What is predicted from is seen in 16 bits, where a last bit may round another way.
    tolerance = max(tolerance, 1e-2) if spec == PREDICTING else tolerance
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("attention", ["sdpa", NAME])
def test_padded_batches_are_continued_there(model: Any, attention: str, how: dict[str, Any]) -> None:
    """And a cache follows beams and padding: exact codecs say what the stock cache says."""
    tokens, mask = tiny.tokens(2, 20, seed=3), torch.ones(2, 20, dtype=torch.long)
    tokens[0, :7] = mask[0, :7] = 0
    tokens, mask = tokens.to(DEVICE), mask.to(DEVICE)
    plan = fitted(model, PlanSpec.uniform("identity"))
    model = model.to(DEVICE)
    model.set_attn_implementation(attention)
    given = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, **how}
    rotation = find_rotation(model, False, lambda reason: None)
    cache = LeanCache(model.config, plan, sinks=2, window=3, attention_mask=mask, rotation=rotation)
    assert torch.equal(model.generate(past_key_values=cache, **given), model.generate(**given))


@pytest.mark.parametrize("recipe", ["int:4", "transform:s0.3", "resid(share:-2,transform:s0.3)"])
@pytest.mark.parametrize("window", [0, 3])
def test_a_cache_saved_there_goes_on_there(
    architecture: str, tmp_path: Path, recipe: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stock = tiny.build(architecture), tiny.tokens
    bundle = bundle_of(model, recipe)
    model = model.to(DEVICE)
    monkeypatch.setattr(tiny, "tokens", lambda *given, **named: stock(*given, **named).to(DEVICE))
    cache = bundle.new_cache(window=window)
    fed(model, cache, tiny.tokens(2, 30))
    goes_on_alike(model, bundle, cache, tmp_path / "cache.safetensors")


@pytest.mark.parametrize("spec", [spec for spec in SPECS if suits(spec, 32)])
def test_a_step_holds_and_reads_codes_of_every_codec(spec: str) -> None:
    model = tiny.build("llama")
    plan = fitted(model, PlanSpec.uniform(spec))
    model = model.to(DEVICE)
    model.set_attn_implementation(NAME)
    cache = LeanCache(model.config, plan, sinks=1, window=4)
    logits = fed(model, cache, tiny.tokens(1, 50))
    assert bool(logits.isfinite().all())
    assert cache.get_seq_length() == 50


@pytest.mark.parametrize("spec", ["int:4", "nuq:4+1", "rot:4"])
def test_a_step_does_not_wait_for_the_device(spec: str) -> None:
    """With codes that take the same room for each token; where they do not, as with escapes, it has to look."""
    model = tiny.build("llama")
    plan, model = fitted(model, PlanSpec.uniform(spec)), model.to(DEVICE)
    rotation = find_rotation(model, False, lambda reason: None)
    model.set_attn_implementation(NAME)
    cache = LeanCache(model.config, plan, sinks=1, window=4, rotation=rotation)
    fed(model, cache, tiny.tokens(1, 50))
    positions = torch.tensor([[50]], device=DEVICE)
    with torch.no_grad(), no_waiting():
        token = torch.full((1, 1), 5, device=DEVICE)
        embedded = model.model.embed_tokens(token)
        table = model.model.rotary_emb(embedded, positions)
        for layer in model.model.layers:
            embedded = layer(embedded, position_embeddings=table, past_key_values=cache)
            embedded = embedded[0] if isinstance(embedded, tuple) else embedded


@pytest.mark.parametrize("spec", ["int:4", "transform:s0.2"])
def test_the_peak_of_a_step_is_seen(spec: str) -> None:
    """Rebuilding a layer takes its keys and values; reading its codes takes less, but is slower on a GPU."""
    model = tiny.build("llama", max_position_embeddings=8192)
    plan = fitted(model, PlanSpec.uniform(spec))
    model = model.to(DEVICE)
    peaks = {}
    for attention in ("sdpa", NAME):
        model.set_attn_implementation(attention)
        cache = LeanCache(model.config, plan, sinks=1, window=4)
        with torch.no_grad():
            model(tiny.tokens(1, 8000).to(DEVICE), past_key_values=cache)
            step = lambda own=cache: model(tiny.tokens(1, 1).to(DEVICE), past_key_values=own)  # noqa: E731
            peaks[attention] = peak_bytes(step, DEVICE)
    assert peaks["sdpa"] >= 8000 * 2 * 32 * 4  # keys and values of a layer, float32
    assert peaks[NAME] < peaks["sdpa"] if DEVICE.type == "cpu" else peaks[NAME] == peaks["sdpa"]


# -- commands ----------------------------------------------------------------------------------------------------------


def test_a_run_there_says_what_a_run_here_says(experiment: Path, tmp_path: Path) -> None:
    """Capture, fit, sweep, selection, report and bundle; and a text from the bundle."""
    tables = []
    for device in (CPU, DEVICE):
        folder = tmp_path / f"on-{len(tables)}"
        options = ("--set", "plan=pca:4", "--device", device.type, "--prompt", "once there was")
        succeed("run", experiment, "-o", folder, *options)
        tables.append(pd.read_csv(folder / "sweep.csv").drop(columns="seconds"))
    pd.testing.assert_frame_equal(tables[1], tables[0], rtol=2e-3, atol=2e-3)
    said = succeed("generate", "--bundle", folder / "bundle", "--device", DEVICE.type, "once there was")
    assert said.stdout.strip()


@pytest.mark.parametrize(
    "options",
    [
        ("--protocol", "stream"),
        ("--protocol", "prefix", "--window", "0", "--prefix-length", "24", "--continuation", "16"),
        ("--protocol", "strict", "--window", "0", "--recipes", "transform", "--refit", "distill"),
    ],
    ids=lambda options: options[1],
)
def test_a_search_there_is_certified(search_config: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Sensitivities, waterfilling, refinement, certificate, bundle; and codecs that are trained together."""
    command = ("select", "--config", search_config, "--budget", "20%", "-o", tmp_path / "run", "--device", DEVICE.type)
    (summary,) = succeed_json(*command, *options)
    assert summary["certificate"]["certified"]
    assert summary["cache_ratio"] > 1
    said = succeed("generate", "--bundle", tmp_path / "run" / "bundle", "--device", DEVICE.type, "once there was")
    assert said.stdout.strip()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="NF4 on the CPU has tests of its own")
def test_nf4_is_swept_there(experiment: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tiny.save(tmp_path / "wide", tiny.build("llama", hidden_size=64, intermediate_size=128))
    options = ("--model", folder, "--dtype", "bfloat16", "--load-in-4bit", "--device", "cuda", "--set", "plan=pca:4")
    succeed("sweep", "--config", experiment, "-o", tmp_path / "run", *options)
    table = pd.read_csv(tmp_path / "run" / "sweep.csv")
    assert len(table) == 4
    assert table["delta_ppl"].notna().all()


def test_the_doctor_finds_nothing_wrong(llama_folder: Path) -> None:
    done = invoke("doctor")
    assert done.exit_code == 0, done.stdout


def test_an_experiment_is_begun_and_timed_there(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    told = succeed_json(
        "init", llama_folder, "--dataset", text_file, "--to", tmp_path / "e.yaml", "--device", DEVICE.type
    )
    assert all(part["seconds"] > 0 for part in told["parts"])

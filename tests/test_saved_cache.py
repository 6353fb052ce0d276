"""Caches on disk: what is read back goes on as what was saved."""

import contextlib
import copy
import dataclasses
import errno
import functools
import hashlib
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicSlidingWindowLayer

import leankv
from leankv import UserError
from leankv.cache.bundle import Bundle
from leankv.cache.contents import Held, tensors_of
from leankv.cache.lean_cache import LeanCache
from leankv.cache.part_store import UNBOUNDED
from leankv.cache.plan import PlanSpec
from leankv.cache.saved_cache import load_cache
from leankv.cache.tensor_file import ABOUT, read_tensors, update_with, write_tensors
from leankv.codecs import Code, parse_recipe
from tests import tiny
from tests.test_codecs import SPECS as CODECS
from tests.test_encode_all import bundle_of

RECIPES = ["int:4", "transform:s0.3", "resid(share:-2,transform:s0.3)", "k=none v=resid(share:-1,int:3)"]


pytestmark = pytest.mark.whole_runs


@functools.cache
def fitted(architecture: str, recipe: str) -> tuple[Any, Bundle]:
    """A model and a bundle of it."""
    model = tiny.build(architecture)
    return model, bundle_of(model, recipe)


@torch.no_grad()
def test_a_cache_suits_the_same_model_in_another_dtype(tmp_path: Path) -> None:
    """Fingerprints are the same, and a layer that is left exact has the numbers that it was saved with."""
    model = tiny.build("llama")
    ids = tiny.tokens(1, 20)
    bundle = leankv.fit(
        PlanSpec().with_layers([1], k="int:4"), model, None, tiny.tokens(8, 40, seed=1), sinks=2, window=0
    )
    cache = bundle.new_cache()
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "cache")
    other = copy.deepcopy(model).bfloat16()
    back = load_cache(tmp_path / "cache", bundle)
    logits = other(ids[:, :3], past_key_values=back).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert back.layers[0].keys.dtype == torch.bfloat16


@torch.no_grad()
def fed(model: Any, cache: Any, tokens: torch.Tensor, **given: Any) -> torch.Tensor:
    """Logits of all tokens but the first, some at a time, after these."""
    pieces = [model(piece, past_key_values=cache, **given).logits for piece in tokens.split(5, dim=1)]
    return torch.cat(pieces, dim=1)


def goes_on_alike(model: Any, bundle: Bundle, cache: LeanCache, path: Path, **given: Any) -> None:
    """Saved, and read back: the same bytes, the same logits, and the same codes of what comes next."""
    cache.save(path)
    back = load_cache(path, bundle)
    assert back.get_seq_length() == cache.get_seq_length()
    if DynamicSlidingWindowLayer not in map(type, cache.layers):  # those hold views of what they were given
        assert back.nbytes() == cache.nbytes()
    more = tiny.tokens(2, 9, seed=3)[: given.pop("batch", 2)]
    assert torch.equal(fed(model, back, more, **given), fed(model, cache, more, **given))
    assert back.serialized_nbytes() == cache.serialized_nbytes()


@pytest.mark.parametrize(("architecture", "recipe"), tiny.with_each(RECIPES, RECIPES[2]))
@pytest.mark.parametrize("window", [0, 3, UNBOUNDED])
def test_what_is_read_back_goes_on_alike(architecture: str, tmp_path: Path, recipe: str, window: int) -> None:
    """On every architecture, rows of two, and also when all was coded whole."""
    model, bundle = fitted(architecture, recipe)
    cache = bundle.new_cache(window=window)
    fed(model, cache, tiny.tokens(2, 30))
    if window == UNBOUNDED:
        cache.encode_all()
    goes_on_alike(model, bundle, cache, tmp_path / "cache.safetensors")


@pytest.mark.parametrize("spec", CODECS)
def test_of_every_codec(tmp_path: Path, spec: str) -> None:
    model = tiny.build("llama")
    spec = (
        spec.replace("g12", "g8").replace("pq:6x", "pq:4x").replace("pq:24x", "pq:32x").replace("-4r", "-3r")
    )  # 32 wide
    bundle = bundle_of(model, spec, "post-rope")
    cache = bundle.new_cache(window=2)
    fed(model, cache, tiny.tokens(2, 12))
    goes_on_alike(model, bundle, cache, tmp_path / "cache")


@pytest.mark.parametrize("recipe", ["int:4", "resid(share:-2,transform:s0.3)"])
def test_with_left_padding_and_rows_in_another_order(architecture: str, tmp_path: Path, recipe: str) -> None:
    model, bundle = fitted(architecture, recipe)
    padding = torch.tensor([4, 0])
    mask = (torch.arange(20) >= padding[:, None]).long()
    cache = bundle.new_cache(mask, window=3)
    with torch.no_grad():
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        model(tiny.tokens(2, 20), attention_mask=mask, position_ids=positions, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    goes_on_alike(model, bundle, cache, tmp_path / "cache")


def test_layers_without_a_codec_and_an_empty_cache(model: Any, tmp_path: Path) -> None:
    text = tiny.tokens(8, 40, seed=1)
    plan = PlanSpec.uniform("int:4").only([1])
    bundle = leankv.fit(plan, model, None, text, sinks=2, window=3, error_metric="none")
    goes_on_alike(model, bundle, bundle.new_cache(), tmp_path / "empty")
    cache = bundle.new_cache()
    fed(model, cache, tiny.tokens(2, 30))
    goes_on_alike(model, bundle, cache, tmp_path / "cache")


def test_generation_goes_on_where_it_ended(tmp_path: Path) -> None:
    model = tiny.build("llama")
    bundle = bundle_of(model, "transform:s0.3")
    prompt = tiny.tokens(1, 20)
    cache = bundle.new_cache(window=4)
    first = model.generate(prompt, past_key_values=cache, max_new_tokens=5, do_sample=False)
    cache.save(tmp_path / "cache", first)
    back = leankv.load_cache(tmp_path / "cache", bundle, first)
    expected = model.generate(first, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(first, past_key_values=back, max_new_tokens=5, do_sample=False), expected)


def test_a_file_is_hardly_larger_than_what_is_stored(tmp_path: Path) -> None:
    model = tiny.build("llama")
    bundle = bundle_of(model, "transform:s0.01")
    cache = bundle.new_cache(window=0)
    with torch.no_grad():
        for _ in range(8):
            model(tiny.tokens(1, 500), past_key_values=cache)
    cache.save(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_size < 1.02 * cache.serialized_nbytes()


def test_codes_are_copied_once_to_be_written_and_never_to_be_hashed() -> None:
    """Python's own memory is traced here, and not that of tensors."""
    code, size = Code({name: torch.ones(2**14, 32, dtype=torch.uint8) for name in "ab"}), 2**20
    peaks = {}

    def traced(name: str, work: Callable[[], Any]) -> Any:
        tracemalloc.start()
        result = work()
        peaks[name] = tracemalloc.get_traced_memory()[1] / size
        tracemalloc.stop()
        return result

    data = traced("written", code.to_bytes)
    traced("read", lambda: code.read(data, 2**14))
    traced("hashed", lambda: update_with(hashlib.sha256(), {name: code[name] for name in "ab"}))
    row = code.unflatten(1)
    held = {"0.k": Held(code=row.narrow(0, 2**13)), "0.v": Held(code=row.narrow(2**13, 2**14))}
    traced("joined", lambda: tensors_of(held, dict.fromkeys(held, parse_recipe("int:4").unfitted(32))))
    assert {name: round(peak) for name, peak in peaks.items()} == {"written": 1, "read": 1, "hashed": 0, "joined": 2}


# -- what is no saved cache of this bundle -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return bundle_of(tiny.build("llama"), "transform:s0.3")


@pytest.fixture(scope="module")
def saved(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = bundle.new_cache(window=3, encode_every=1)
    fed(tiny.build("llama"), cache, tiny.tokens(1, 40))
    path = tmp_path_factory.mktemp("saved") / "cache"
    cache.save(path, tiny.tokens(1, 40))
    return path


def refused(path: Path, bundle: Bundle, tokens: torch.Tensor | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_cache(path, bundle, tokens)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 500
    return sentence


def test_another_model_another_bundle_and_other_tokens_are_refused(saved: Path, bundle: Bundle, tmp_path: Path) -> None:
    other = dataclasses.replace(bundle, made_for={**bundle.made_for, "fingerprint": "0" * 64})
    assert "of another model" in refused(saved, other)
    assert "other codecs" in refused(saved, bundle_of(tiny.build("llama"), "transform:s0.2"))
    assert "other codecs" in refused(saved, dataclasses.replace(bundle, rotation=None))
    assert "not made of these tokens" in refused(saved, bundle, tiny.tokens(1, 40, seed=8))
    assert load_cache(saved, bundle, tiny.tokens(1, 40)).get_seq_length() == 40
    assert "does not exist" in refused(tmp_path / "none", bundle)
    cache = leankv.Cache(tiny.build("llama"), "int:4")
    with pytest.raises(UserError, match="not made of a bundle"):
        cache.save(tmp_path / "cache")


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (tiny.tokens(1, 39), "took in 40 tokens in each of 1 rows, and the tokens given are [1, 39]"),
        (tiny.tokens(2, 40), "the tokens given are [2, 40]"),
        (tiny.tokens(1, 40)[0], "whole numbers [rows, tokens]"),
        (tiny.tokens(1, 40).float(), "whole numbers [rows, tokens]"),
        (tiny.tokens(1, 40).tolist(), "whole numbers [rows, tokens]"),
    ],
)
def test_tokens_that_are_not_what_a_cache_holds_are_refused(
    saved: Path, bundle: Bundle, tmp_path: Path, tokens: Any, words: str
) -> None:
    assert words in refused(saved, bundle, tokens)
    with pytest.raises(UserError) as caught:
        load_cache(saved, bundle).save(tmp_path / "cache", tokens)
    assert words in str(caught.value)
    assert not (tmp_path / "cache").exists()


Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def put(name: str, value: Any) -> Edit:
    def edit(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        about[name] = value

    return edit


def stream(place: int, value: Any) -> Edit:
    def edit(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        about["streams"]["0.k"][place] = value

    return edit


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return edit


LIES: dict[str, tuple[Edit, str]] = {
    "another version": (put("format", 99), "format 99"),
    "seen more": (put("seen", 41), "holds 40 tokens of 41"),
    "seen less": (put("seen", 39), "holds 40 tokens of 39"),
    "seen text": (put("seen", "40"), "seen is '40'"),
    "seen true": (put("seen", True), "seen is True"),
    "seen none": (put("seen", None), "seen is None"),
    "two rows": (put("batch", 2), "cannot be"),
    "10^12 rows": (put("batch", 10**12), "batch is 1000000000000"),
    "sinks less": (put("sinks", 1), "2 sinks, more than 1"),
    "sinks negative": (put("sinks", -1), "sinks is -1"),
    "encoded never": (put("encode_every", -1), "encode_every is -1"),
    "no streams": (put("streams", []), "lacks tokens or streams"),
    "tokens a list": (put("tokens", [1]), "lacks tokens or streams"),
    "a store of nobody": (put("streams", {"99.k": [1, 1]}), "belongs to no codec"),
    "a token more": (stream(0, 36), "holds 41 tokens of 40"),
    "10^9 tokens": (stream(0, 10**9), "more tokens than its"),
    "10^12 tokens": (stream(0, 10**12), "cannot be"),
    "no tokens": (stream(0, 0), "cannot be"),
    "a fraction": (stream(0, 1.5), "cannot be"),
    "a longer stream": (stream(1, 10**6), "other lengths"),
    "a negative stream": (stream(1, -1), "cannot be"),
    "wide sinks": (tensor("0.k.sinks", lambda t: t[..., :8].contiguous()), "has shape"),
    "sinks of integers": (tensor("0.k.sinks", lambda t: t.long()), "no exact vectors"),
    "flat sinks": (tensor("0.k.sinks", lambda t: t.flatten()), "no exact vectors"),
    "streams of numbers": (tensor("streams", lambda t: t.float()), "no streams"),
}


@pytest.mark.parametrize(("edit", "words"), LIES.values(), ids=list(LIES))
def test_lies_under_a_right_checksum_are_refused(
    saved: Path, bundle: Bundle, tmp_path: Path, edit: Edit, words: str
) -> None:
    tensors, about = read_tensors(saved, "it", "nothing")
    edit(about, tensors)
    write_tensors(tmp_path / "cache", tensors, about)
    assert words in refused(tmp_path / "cache", bundle)


def test_a_claim_of_much_padding_takes_no_memory(saved: Path, bundle: Bundle, tmp_path: Path) -> None:
    """A gigabyte more than now is not to be had; a mask of what is claimed would take twice that."""
    tensors, about = read_tensors(saved, "it", "nothing")
    about["seen"] = 2**27
    tensors["padding"] = torch.tensor([2**27])
    write_tensors(tmp_path / "cache", tensors, about)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    try:
        assert "holds 40 tokens of 134217728" in refused(tmp_path / "cache", bundle)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_what_an_earlier_version_saved_encodes_each_token(saved: Path, bundle: Bundle, tmp_path: Path) -> None:
    tensors, about = read_tensors(saved, "it", "nothing")
    del about["encode_every"]
    write_tensors(tmp_path / "cache", tensors, about)
    assert load_cache(tmp_path / "cache", bundle).encode_every == 1


def test_a_stream_of_other_bytes_is_read_as_something_or_refused(saved: Path, bundle: Bundle, tmp_path: Path) -> None:
    """Under a right checksum; never more than that."""
    for seed in range(20):
        tensors, about = read_tensors(saved, "it", "nothing")
        generator = torch.Generator().manual_seed(seed)
        tensors["streams"] = torch.randint(256, tensors["streams"].shape, generator=generator).to(torch.uint8)
        write_tensors(tmp_path / "cache", tensors, about)
        with contextlib.suppress(UserError):
            assert load_cache(tmp_path / "cache", bundle).get_seq_length() == 40


@given(place=st.floats(0, 1), bit=st.integers(0, 7))
@settings(max_examples=60)
def test_a_flipped_bit_is_noticed(
    place: float, bit: int, saved: Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(saved.read_bytes())
    data[min(int(place * len(data)), len(data) - 1)] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(data)
    assert "damaged" in (sentence := refused(path, bundle)) or "was changed" in sentence


@given(data=st.binary(max_size=300))
@settings(max_examples=60)
def test_random_bytes_are_refused(data: bytes, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random"
    path.write_bytes(data)
    assert "damaged" in refused(path, bundle)


def test_a_file_that_is_cut_off_is_refused(saved: Path, bundle: Bundle, tmp_path: Path) -> None:
    data = saved.read_bytes()
    for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cache").write_bytes(data[:length])
        assert "damaged" in refused(tmp_path / "cache", bundle)


def test_a_table_nested_too_deep_is_refused(saved: Path, bundle: Bundle, tmp_path: Path) -> None:
    with safetensors.safe_open(saved, framework="pt") as file:
        metadata = dict(file.metadata())
    deep = {**metadata, ABOUT: "[" * 10**5 + "]" * 10**5}
    safetensors.torch.save_file(safetensors.torch.load_file(saved), tmp_path / "cache", deep)
    assert "damaged" in refused(tmp_path / "cache", bundle)


def test_a_full_disk_leaves_what_was_there(saved: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="No space left"):
            load_cache(saved, bundle).save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_copy_that_was_read_back_gives_the_same_file(saved: Path, bundle: Bundle, tmp_path: Path) -> None:
    copy.deepcopy(load_cache(saved, bundle)).save(tmp_path / "again", tiny.tokens(1, 40))
    (tensors, about), (others, other) = (read_tensors(path, "it", "") for path in (saved, tmp_path / "again"))
    assert about == other
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)

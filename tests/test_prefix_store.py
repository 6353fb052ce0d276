"""A prefix store: prompts on disk as codes."""

import dataclasses
import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import leankv
from leankv import PrefixStore, UserError
from leankv.cache.bundle import Bundle
from leankv.cache.pages import PAGE
from leankv.cache.plan import PlanSpec
from leankv.cache.tensor_file import read_tensors, write_tensors
from leankv.config.experiment import ProtocolConfig
from leankv.data.blocks import Blocks
from leankv.evaluation.perplexity import exact_window, measure_nats
from leankv.storage.page_folder import PageFolder
from tests import tiny
from tests.forked import FORK
from tests.test_encode_all import bundle_of

pytestmark = pytest.mark.whole_runs

RECIPES = ["int:4", "resid(share:-2,transform:s0.3)", "k=none v=resid(share:-1,int:3)"]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.build("llama", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def bundle(llama: Any) -> Bundle:
    return bundle_of(llama, "transform:s0.3")


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return tiny.tokens(1, length, seed=seed)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.page"))


@torch.no_grad()
def next_logits(model: Any, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of what a cache does not hold yet."""
    return model(tokens[:, cache.get_seq_length() :], past_key_values=cache).logits


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stored_prefix_costs_what_the_protocol_measures(architecture: str, tmp_path: Path, recipe: str) -> None:
    """The same nats as without a disk in between, on every architecture."""
    model = tiny.build(architecture, max_position_embeddings=2048)
    bundle = dataclasses.replace(bundle_of(model, recipe), window=10**6)  # what follows stays exact, as in the protocol
    protocol = ProtocolConfig("prefix", sinks=bundle.sinks, prefix_length=2 * PAGE, continuation=20)
    text = prompt(2 * PAGE + 20)
    measured = measure_nats(
        model, Blocks(text, "report", "random"), protocol, lambda: bundle.new_cache(window=exact_window(protocol))
    )
    store = PrefixStore(tmp_path, bundle, model)
    assert store.add(text) == 2
    cache = store.cache_for(text)
    assert cache.get_seq_length() == 2 * PAGE
    log_p = next_logits(model, cache, text)[0, :-1].float().log_softmax(dim=1)
    nats = -log_p.gather(1, text[0, 2 * PAGE + 1 :, None]).sum(dtype=torch.float64)
    assert abs(float(nats) - measured.nats[0]) / measured.tokens_per_block < 1e-6


def test_prompts_that_begin_alike_share_pages(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, bundle, llama)
    system = prompt(2 * PAGE)
    one, other = (torch.cat([system, prompt(PAGE, seed)], dim=1) for seed in (1, 2))
    assert store.add(one, "one") == 3
    assert store.add(one) == 0
    assert store.add(other, "other") == 1
    assert len(files(tmp_path)) == 4
    assert store.stored_tokens(torch.cat([system, prompt(9, 5)], dim=1)) == 2 * PAGE
    assert {(own.title, own.tokens, own.shared) for own in store.prefixes()} == {
        ("one", 3 * PAGE, 2 * PAGE),
        ("other", 3 * PAGE, 2 * PAGE),
    }
    freed = store.drop(one)
    assert freed > 0
    assert store.stored_tokens(other) == 3 * PAGE
    assert [own.title for own in store.prefixes()] == ["other"]
    assert store.drop() > 0
    assert not files(tmp_path)


def test_generation_from_a_store_is_generation_from_a_cache(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    """A whole prompt that is stored leaves its last token to compute; pages come from another process's folder too."""
    text = prompt(PAGE)
    PrefixStore(tmp_path, bundle, llama).add(text)
    cache = PrefixStore(tmp_path, bundle, llama).cache_for(text)
    assert cache.get_seq_length() == PAGE - 1
    said = llama.generate(text, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert said.shape[1] == PAGE + 8
    empty = PrefixStore(tmp_path, bundle, llama).cache_for(prompt(PAGE, seed=4))
    assert empty.get_seq_length() == 0


def test_what_a_cache_holds_in_codes_can_be_put(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    """Until the prompt is computed exactly: then those pages are made anew."""
    bundle = dataclasses.replace(bundle, window=30)
    text = prompt(3 * PAGE + 10)
    cache = bundle.new_cache()
    with torch.no_grad():
        for piece in text.split(100, dim=1):
            llama(piece, past_key_values=cache)
    store = PrefixStore(tmp_path, bundle, llama)
    assert store.put(cache, text) == 2  # of three pages, the exact window lies in the last
    assert store.put(cache, text) == 0
    assert store.cache_for(text).get_seq_length() == 2 * PAGE
    before = {path: path.read_bytes() for path in files(tmp_path)}
    assert store.add(text) == 3
    assert any(path.read_bytes() != before[path] for path in before)
    assert store.put(cache, text) == 0
    with pytest.raises(UserError, match="one row"):
        store.put(cache, text[:, :5])


def test_a_sliding_window_has_dropped_what_could_be_put(tmp_path: Path) -> None:
    model = tiny.build("mistral", max_position_embeddings=2048)
    bundle = bundle_of(model, "int:4")
    cache, text = bundle.new_cache(), prompt(2 * PAGE)
    with torch.no_grad():
        model(text, past_key_values=cache)
    assert PrefixStore(tmp_path, bundle, model).put(cache, text) == 0


def test_what_was_used_longest_ago_goes_first(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, bundle, llama)
    first, second, third = (prompt(2 * PAGE, seed) for seed in (1, 2, 3))
    store.add(first)
    size = sum(path.stat().st_size for path in files(tmp_path))
    store = PrefixStore(tmp_path, bundle, llama, max_bytes=int(2.1 * size))
    store.add(second)
    store.cache_for(first)
    store.add(third)
    kept = [store.stored_tokens(text) for text in (first, second, third)]
    assert kept == [2 * PAGE, 0, 2 * PAGE]
    tight = PrefixStore(tmp_path, bundle, llama, max_bytes=size // 2)
    with pytest.raises(UserError, match="raise max_bytes"):
        tight.add(prompt(2 * PAGE, 9))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= size // 2


def test_what_does_not_fit_takes_no_others_with_it(tmp_path: Path) -> None:
    """Neither pages that could make no room for it, nor the one that it was to replace."""
    pages = PageFolder(tmp_path, max_bytes=1000)
    for key in ("a", "b"):
        pages.add(key, lambda path: path.write_bytes(bytes(200)))
    pages.add("first", lambda path: path.write_bytes(bytes(500)))
    with pytest.raises(UserError, match="raise max_bytes"):
        pages.add("next", lambda path: path.write_bytes(bytes(600)), kept=["first", "next"])
    with pytest.raises(UserError, match="raise max_bytes"):
        pages.add("first", lambda path: path.write_bytes(bytes(1001)), replace=True)
    assert sorted(pages.keys()) == ["a", "b", "first"]


def test_bundles_do_not_see_each_others_pages(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    other = leankv.fit(PlanSpec.uniform("int:3"), llama, None, tiny.tokens(8, 40, seed=1), sinks=2, error_metric="none")
    text = prompt(PAGE + 5)
    PrefixStore(tmp_path, bundle, llama).add(text)
    store = PrefixStore(tmp_path, other, llama)
    assert store.stored_tokens(text) == 0
    assert store.prefixes() == []
    more_sinks = PrefixStore(tmp_path, dataclasses.replace(bundle, sinks=9), llama)
    assert more_sinks.stored_tokens(text) == 0


# -- faults ------------------------------------------------------------------------------------------------------------


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def lying(name: str, value: Any) -> Callable[[Path], None]:
    def lie(path: Path) -> None:
        tensors, about = read_tensors(path, "it", "")
        about[name] = value
        write_tensors(path, tensors, about)

    return lie


def of_other_codecs(path: Path) -> None:
    lying("codecs", "0" * 64)(path)


def of_many_tokens(path: Path) -> None:
    tensors, about = read_tensors(path, "it", "")
    about["streams"]["0.k"][0] = 10**12
    write_tensors(path, tensors, about)


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        cut,
        emptied,
        of_other_codecs,
        of_many_tokens,
        lying("number", 5),
        lying("parent", "x"),
        lying("title", 1),
    ],
)
def test_a_damaged_page_is_told_left_out_and_computed_again(
    llama: Any, bundle: Bundle, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    told: list[str] = []
    store = PrefixStore(tmp_path, bundle, llama, on_damage=told.append)
    text = prompt(3 * PAGE + 1)
    store.add(text)
    expected = next_logits(llama, store.cache_for(text), text)
    second = store.pages.path(store._names(text)[2])
    damage(second)
    cache = store.cache_for(text)
    assert cache.get_seq_length() == PAGE
    (sentence,) = told
    assert str(second) in sentence
    assert "\n" not in sentence
    assert not second.exists()
    assert store.add(text) == 1
    assert torch.equal(next_logits(llama, store.cache_for(text), text), expected)
    assert len(told) == 1


def test_a_page_that_is_cut_off_hides_no_other(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    told: list[str] = []
    store = PrefixStore(tmp_path, bundle, llama, on_damage=told.append)
    one, other = prompt(2 * PAGE), prompt(PAGE, 5)
    store.add(one, "one")
    store.add(other, "other")
    cut(store.pages.path(store._names(one)[2]))
    assert {each.title for each in store.prefixes()} == {"one", "other"}
    assert store.drop(other) > 0
    assert [each.tokens for each in store.prefixes()] == [PAGE]
    assert told
    assert all("cut" in sentence or "damaged" in sentence for sentence in told)


def test_a_prompt_that_the_model_does_not_allow_is_refused(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, bundle, llama)
    with pytest.raises(UserError, match="5000 tokens is longer than the model's 4096 positions"):
        store.add(prompt(5000))
    with pytest.raises(UserError, match="one prompt at a time"):
        store.add(tiny.tokens(2, 300))
    assert store.add(prompt(PAGE - 1)) == 0


def test_a_folder_that_cannot_be_written_is_refused(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        PrefixStore(tmp_path / "file", bundle, llama)


def test_a_full_disk_leaves_a_store_that_works(
    llama: Any, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, text, written = PrefixStore(tmp_path, bundle, llama), prompt(3 * PAGE), Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if len(files(tmp_path)) == 1:
            written(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="No space left"):
            store.add(text)
    assert store.stored_tokens(text) == PAGE
    assert not list(tmp_path.glob("*.tmp"))
    assert store.add(text) == 2


def add_slowly(folder: Path, seed: int, lines: Any) -> None:
    """Add a prompt in a process of its own; tell of each page that is written."""
    torch.set_num_threads(1)
    model = tiny.build("llama", max_position_embeddings=4096)
    store = PrefixStore(folder, bundle_of(model, "transform:s0.3"), model)
    add = store.pages.add

    def telling(*arguments: Any, **given: Any) -> bool:
        written = add(*arguments, **given)
        lines.put(written)
        time.sleep(0.3)
        return written

    store.pages.add = telling  # type: ignore[method-assign]
    store.add(prompt(6 * PAGE, seed))
    lines.put("done")


def started(folder: Path, seed: int) -> tuple[Any, Any]:
    lines = FORK.Queue()
    process = FORK.Process(target=add_slowly, args=(folder, seed, lines))
    process.start()
    return process, lines


def test_a_killed_writer_leaves_a_store_that_works(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    process, lines = started(tmp_path, 0)
    assert [lines.get(timeout=120) for _ in range(2)] == [True, True]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    store, text = PrefixStore(tmp_path, bundle, llama), prompt(6 * PAGE)
    there = store.stored_tokens(text)
    assert 2 * PAGE <= there < 6 * PAGE
    assert store.add(text) == 6 - there // PAGE
    fresh = PrefixStore(tmp_path / "fresh", bundle, llama)
    fresh.add(text)
    more = torch.cat([text, prompt(5, 1)], dim=1)
    assert torch.equal(next_logits(llama, store.cache_for(more), more), next_logits(llama, fresh.cache_for(more), more))


def test_two_processes_that_add_the_same_prompt_compute_it_once(tmp_path: Path) -> None:
    both = [started(tmp_path, 0) for _ in range(2)]
    told: list[Any] = []
    for process, lines in both:
        while (line := lines.get(timeout=120)) != "done":
            told.append(line)
        process.join()
    assert told == [True] * 6
    assert len(files(tmp_path)) == 6

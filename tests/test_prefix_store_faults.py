"""Prefix stores when something goes wrong: damaged pages, full disks, killed writers."""

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from leankv import PrefixStore, UserError
from leankv.cache.bundle import Bundle
from leankv.cache.pages import PAGE
from leankv.cache.tensor_file import read_tensors, write_tensors
from leankv.codecs.transform import Transform
from tests import tiny
from tests.forked import FORK
from tests.test_encode_all import bundle_of
from tests.test_prefix_store import files, next_logits, prompt

pytestmark = pytest.mark.whole_runs


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.build("llama", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def bundle(llama: Any) -> Bundle:
    return bundle_of(llama, "transform:s0.3")


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


def test_a_page_that_cannot_be_read_is_left_out_and_stays(
    llama: Any, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    store, text = PrefixStore(tmp_path, bundle, llama, on_damage=told.append), prompt(2 * PAGE + 1)
    store.add(text)
    second, open_ = store.pages.path(store._names(text)[2]), safetensors.safe_open

    def refusing(path: Path, **given: Any) -> Any:
        if path == second:
            raise OSError(errno.EMFILE, "Too many open files")
        return open_(path, **given)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "safe_open", refusing)
        assert store.cache_for(text).get_seq_length() == PAGE
    assert "cannot be read" in told[0]
    assert store.cache_for(text).get_seq_length() == 2 * PAGE


def test_pages_of_another_user_are_read(
    llama: Any, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, text = PrefixStore(tmp_path, bundle, llama), prompt(PAGE + 1)
    store.add(text)

    def refusing(path: Path, **given: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refusing)
    assert store.cache_for(text).get_seq_length() == PAGE
    assert store.add(text) == 0


@pytest.mark.parametrize("short", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_pages_for_which_memory_is_short_stay(
    llama: Any, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: Exception
) -> None:
    store, text = PrefixStore(tmp_path, bundle, llama), prompt(PAGE + 1)
    store.add(text)

    def refusing(*given: Any) -> Any:
        raise short

    with monkeypatch.context() as patch:
        patch.setattr(Transform, "deserialize_all", refusing)
        with pytest.raises(type(short)):
            store.cache_for(text)
    assert store.cache_for(text).get_seq_length() == PAGE


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


@pytest.mark.parametrize("damage", [flipped, cut, lying("parent", "x"), lying("number", -3)])
def test_a_prompt_whose_last_page_is_damaged_is_dropped_whole(
    llama: Any, bundle: Bundle, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    store, text = PrefixStore(tmp_path, bundle, llama), prompt(2 * PAGE)
    store.add(text)
    damage(store.pages.path(store._names(text)[2]))
    assert store.drop(text) > 0
    assert not files(tmp_path)


def test_a_page_that_says_it_follows_itself_ends_no_list(llama: Any, bundle: Bundle, tmp_path: Path) -> None:
    store, text = PrefixStore(tmp_path, bundle, llama), prompt(3 * PAGE)
    store.add(text)
    second = store._names(text)[2]
    lying("parent", second)(store.pages.path(second))
    assert [each.tokens for each in store.prefixes()] == [PAGE]
    assert store.drop(text) > 0
    assert not files(tmp_path)


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

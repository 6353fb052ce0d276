"""Result files: whole or not there, and found again."""

import errno
import functools
import itertools
import json
import math
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leankv.errors import UserError
from leankv.storage.cells import Cells, StoredCells
from leankv.storage.files import (
    check_output_dir,
    hash_of,
    hash_of_file,
    read_json,
    write_atomically,
    write_json,
    write_text,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def reversed_keys(value: Any) -> Any:
    """The same value with every dictionary written the other way round."""
    if isinstance(value, dict):
        return {key: reversed_keys(own) for key, own in reversed(value.items())}
    return [reversed_keys(own) for own in value] if isinstance(value, list) else value


# -- hashes ----------------------------------------------------------------------------------------------------------


@given(json_values)
def test_a_hash_does_not_depend_on_the_order_of_keys(value: Any) -> None:
    assert hash_of(reversed_keys(value)) == hash_of(value)


@given(json_values, json_values)
def test_different_values_have_different_hashes(one: Any, other: Any) -> None:
    assert (hash_of(one) == hash_of(other)) == (json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_have_no_hash(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        hash_of({"x": [number]})


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert hash_of_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# -- atomic writes ---------------------------------------------------------------------------------------------------


def test_text_is_written_and_the_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_text(path, "naïve 日本\n")
    assert path.read_bytes() == "naïve 日本\n".encode()
    assert list(path.parent.iterdir()) == [path]


@given(value=json_values)
def test_json_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_results_may_be_read_by_whoever_may_read_the_folders_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the umask is left alone: it is all threads'."""
    (tmp_path / "plain").touch()
    monkeypatch.delattr(os, "umask")
    write_text(tmp_path / "result", "")
    assert stat.S_IMODE((tmp_path / "result").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize(
    "failure", [RuntimeError("bug"), KeyboardInterrupt(), OSError(errno.EIO, "bad disk")], ids=repr
)
def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "result.json"
    write_text(path, "old")

    def write(temporary: Path) -> None:
        temporary.write_text("ne")
        raise failure

    with pytest.raises(UserError if isinstance(failure, OSError) else type(failure)):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError) as refused:
        write_atomically(tmp_path / "result.json", write)
    sentence = str(refused.value)
    assert str(tmp_path / "result.json") in sentence
    assert "No space left on device" in sentence
    assert "run the same command again" in sentence
    assert "\n" not in sentence
    assert not list(tmp_path.iterdir())


def test_a_folder_or_a_file_in_the_way_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", tmp_path / "file" / "result.json"):
        with pytest.raises(UserError, match=str(path)):
            write_text(path, "text")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, math.nan)
    assert read_json(path) == 1


WRITE_FOREVER = """
import itertools, pathlib, sys
from leankv.storage.files import write_json

for number in itertools.count():
    write_json(pathlib.Path(sys.argv[1]), {"digits": str(number % 10) * 2_000_000})
    if number == 0:
        print("ready", flush=True)
"""


def test_a_process_killed_while_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for attempt in range(8):
        with subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.01 + 0.0037 * attempt)  # another instant each time
            process.send_signal(signal.SIGKILL)
        digits = json.loads(path.read_text())["digits"]
        assert len(digits) == 2_000_000
        assert len(set(digits)) == 1
    cells = StoredCells(tmp_path)
    assert cells.get_or_compute("nats", {"x": 1}, lambda: {"y": 2}) == {"y": 2}


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": 1', b"\xff\xfe"])
def test_a_damaged_file_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "cell.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"cell\.json"):
        read_json(path)


# -- cells -----------------------------------------------------------------------------------------------------------


class Counter:
    """Gives another result each time it is asked."""

    def __init__(self) -> None:
        self.calls = itertools.count(1)

    def __call__(self) -> dict[str, Any]:
        return {"call": next(self.calls)}


@pytest.fixture(params=["in memory", "stored"])
def cells(request: pytest.FixtureRequest, tmp_path: Path) -> Cells:
    """No cells yet, where a sweep without a folder has them and where one with a folder has."""
    return Cells() if request.param == "in memory" else StoredCells(tmp_path)


def test_those_who_ask_for_the_same_cells_share_the_work(tmp_path: Path) -> None:
    """Each is computed once; while one is at a cell, the other is at a later one; both get all, in order."""
    computed: list[tuple[int, str]] = []

    def compute(number: int) -> dict[str, Any]:
        computed.append((number, threading.current_thread().name))
        time.sleep(0.02)
        return {"number": number}

    def ask(found: list[Any]) -> None:
        asked = [({"number": number}, functools.partial(compute, number)) for number in range(12)]
        found += StoredCells(tmp_path).in_order("nats", asked)

    results: list[list[Any]] = [[], []]
    askers = [threading.Thread(target=ask, args=(own,), name=str(name)) for name, own in enumerate(results)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert results == [[{"number": number} for number in range(12)]] * 2
    assert sorted(number for number, _ in computed) == list(range(12))
    assert {name for _, name in computed} == {"0", "1"}


def test_cells_asked_for_in_order_are_computed_when_they_are_taken(tmp_path: Path) -> None:
    for cells in (Cells(), StoredCells(tmp_path)):
        computed: list[int] = []

        def compute(number: int, into: list[int] = computed) -> dict[str, Any]:
            into.append(number)
            return {"number": number}

        asked = [({"number": number}, functools.partial(compute, number)) for number in range(4)]
        taken = list(itertools.islice(cells.in_order("nats", asked), 2))
        assert taken == [{"number": 0}, {"number": 1}]
        assert computed == [0, 1]


def test_a_cell_is_computed_once(tmp_path: Path) -> None:
    compute = Counter()
    for _ in range(3):
        assert StoredCells(tmp_path).get_or_compute("nats", {"seed": 1, "layers": [1, 2]}, compute) == {"call": 1}
    assert StoredCells(tmp_path).get_or_compute("nats", {"layers": [1, 2], "seed": 1}, compute) == {"call": 1}


def test_a_cell_is_computed_again_when_what_it_depends_on_changes(cells: Cells) -> None:
    compute = Counter()
    assert cells.get_or_compute("nats", {"seed": 1}, compute) == {"call": 1}
    assert cells.get_or_compute("nats", {"seed": 2}, compute) == {"call": 2}
    assert cells.get_or_compute("other", {"seed": 1}, compute) == {"call": 3}
    assert cells.get_or_compute("nats", {"seed": 1}, compute) == {"call": 1}


def test_a_cell_explains_itself(tmp_path: Path) -> None:
    StoredCells(tmp_path).get_or_compute("nats", {"seed": 1}, lambda: {"ppl": 2.5})
    (path,) = tmp_path.glob("[!.]*")
    assert path.name.startswith("nats-")
    assert read_json(path) == {"kind": "nats", "depends_on": {"seed": 1}, "result": {"ppl": 2.5}}


def test_a_cell_is_there_once_it_is_computed(cells: Cells) -> None:
    assert not cells.has("nats", {"seed": 1})
    cells.get_or_compute("nats", {"seed": 1}, Counter())
    assert cells.has("nats", {"seed": 1})
    assert not cells.has("nats", {"seed": 2})
    assert not cells.has("other", {"seed": 1})


def test_a_computation_that_fails_stores_nothing(cells: Cells) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError):
        cells.get_or_compute("nats", {"seed": 1}, fail)
    assert cells.get_or_compute("nats", {"seed": 1}, lambda: {"ppl": 1.0}) == {"ppl": 1.0}


def test_leftovers_of_a_killed_run_are_ignored(tmp_path: Path) -> None:
    cells = StoredCells(tmp_path)
    cells.get_or_compute("nats", {"seed": 1}, lambda: {"ppl": 1.0})
    (path,) = tmp_path.glob("[!.]*")
    path.rename(tmp_path / f".{path.name}.abc123.tmp")
    (tmp_path / f".{path.name}.xyz.tmp").write_bytes(b'{"kind": "nats", "resu')
    assert cells.get_or_compute("nats", {"seed": 1}, lambda: {"ppl": 2.0}) == {"ppl": 2.0}
    assert cells.get_or_compute("nats", {"seed": 1}, lambda: {"ppl": 3.0}) == {"ppl": 2.0}


# -- the output folder -----------------------------------------------------------------------------------------------


def test_the_output_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    check_output_dir(folder)
    check_output_dir(folder)
    assert not list(folder.iterdir())


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(UserError, match="is a file"):
        check_output_dir(path)
    with pytest.raises(UserError, match=str(path)):
        check_output_dir(path / "inside")

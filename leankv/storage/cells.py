"""Cells: results looked up by the hash of all that they depend on."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from leankv.storage.files import hash_of, read_json, write_json
from leankv.storage.locks import locked

Asked = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
"""All that a cell depends on, and what computes it."""


class Cells:
    """Small measurements in memory, one a key."""

    def __init__(self) -> None:
        self._results: dict[str, Any] = {}

    def has(self, kind: str, depends_on: dict[str, Any]) -> bool:
        """Whether a cell is there."""
        return cell_name(kind, depends_on) in self._results

    def get_or_compute(self, kind: str, depends_on: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> Any:
        """The result of this cell, or what `compute()` returns, which is kept."""
        name = cell_name(kind, depends_on)
        if name not in self._results:
            self._results[name] = compute()
        return self._results[name]

    def in_order(self, kind: str, asked: Sequence[Asked]) -> Iterator[Any]:
        """The results of several cells, each when it is asked for."""
        for depends_on, compute in asked:
            yield self.get_or_compute(kind, depends_on, compute)


class StoredCells(Cells):
    """A folder of small JSON measurements, one file a key.

    A cell's name is `KIND-HASH.json`, where HASH covers `depends_on`: everything the measurement depends on. The file
    holds both, so a cell explains itself.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def path(self, kind: str, depends_on: dict[str, Any]) -> Path:
        """The file of a cell, whether it is there or not."""
        return self.folder / f"{cell_name(kind, depends_on)}.json"

    def has(self, kind: str, depends_on: dict[str, Any]) -> bool:
        """Whether a cell is there."""
        return self.path(kind, depends_on).exists()

    def get_or_compute(self, kind: str, depends_on: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> Any:
        """The stored result of this cell, or `compute()` after storing what it returns.

        Of several processes that ask at once, one computes and the others wait for it.
        """
        path = self.path(kind, depends_on)
        if path.exists():
            return read_json(path)["result"]
        with locked(self.folder, path.stem):
            if path.exists():  # another process stored it while this one waited
                return read_json(path)["result"]
            return _stored(path, kind, depends_on, compute)

    def in_order(self, kind: str, asked: Sequence[Asked]) -> Iterator[Any]:
        """The results of several cells, each when it is asked for.

        Of several processes that ask for the same ones, each computes some: while another is at the next one, a later
        one is computed here.
        """
        for place, (depends_on, compute) in enumerate(asked):
            path = self.path(kind, depends_on)
            while not path.exists() and not self._computed_here(kind, asked[place]):
                if not any(self._computed_here(kind, later) for later in asked[place + 1 :]):
                    break  # nothing is left but to wait
            yield self.get_or_compute(kind, depends_on, compute)

    def _computed_here(self, kind: str, asked: Asked) -> bool:
        """Compute a cell that is missing, unless another process is at it."""
        path = self.path(kind, asked[0])
        if path.exists():
            return False
        with locked(self.folder, path.stem, wait=False) as mine:
            if not mine or path.exists():
                return False
            _stored(path, kind, *asked)
            return True


def _stored(path: Path, kind: str, depends_on: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> Any:
    result = compute()
    write_json(path, {"kind": kind, "depends_on": depends_on, "result": result})
    return result


def cell_name(kind: str, depends_on: dict[str, Any]) -> str:
    """`KIND-HASH`, by which a cell is found."""
    return f"{kind}-{hash_of(depends_on)[:24]}"

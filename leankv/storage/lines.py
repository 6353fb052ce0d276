"""A file of JSON lines that grows by whole entries: what a long command finds out bit by bit, and finds again."""

import json
import os
from pathlib import Path
from typing import Any

from leankv.storage.files import cannot_write, hash_of


class Lines:
    """Entries by a key, in memory and on disk.

    Each is on the disk before `put` returns. A line that a killed run left unfinished is cut off when the file is
    opened again, so that its entry is computed anew and nothing else is lost. One process writes at a time.
    """

    def __init__(self, path: Path):
        """
        Args:
            path: of the file; made where it is missing.

        Raises:
            UserError: it cannot be written.
        """
        self.path = path
        self._entries: dict[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                file.seek(0)
                whole = 0
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    try:
                        entry = json.loads(line)
                        self._entries[entry["key"]] = entry["value"]
                    except (ValueError, KeyError, TypeError):
                        break
                    whole += len(line)
                file.truncate(whole)
        except OSError as error:
            raise cannot_write(path, error) from error

    def __contains__(self, asked: Any) -> bool:
        return hash_of(asked) in self._entries

    def get(self, asked: Any) -> Any:
        """The value of an entry.

        Args:
            asked: all that it depends on, as JSON.

        Raises:
            KeyError: there is none.
        """
        return self._entries[hash_of(asked)]

    def put(self, asked: Any, value: Any) -> None:
        """Keep a value; of one that is there already nothing is written.

        Raises:
            UserError: the disk is full.
        """
        key = hash_of(asked)
        if key in self._entries:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._entries[key] = value

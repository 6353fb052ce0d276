"""Progress of long stages: a bar with time left on a terminal, sparse plain lines when the output is piped.

Everything goes to standard error, so that standard output holds results only.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PLAIN_LINE_EVERY_SECONDS = 20.0  # assumption: often enough to see that a run is alive, sparse enough for a log file


class Stage(Protocol):
    """One running stage; call it after each finished step, with a few words on how it goes."""

    def __call__(self, note: str = "") -> None: ...


class Progress:
    """Shows stages on `console` (standard error unless given)."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)

    def say(self, message: str) -> None:
        """Print one line that stays."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, steps: int) -> Iterator[Stage]:
        """Follow `steps` steps called `title`; yields a callable to be called once a step."""
        if self.console.is_terminal:
            yield from self._bar(title, steps)
        else:
            yield from self._lines(title, steps)

    def _bar(self, title: str, steps: int) -> Iterator[Stage]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with RichProgress(*columns, console=self.console) as bars:
            task = bars.add_task(title, total=steps, note="")

            def step(note: str = "") -> None:
                bars.update(task, advance=1, note=note)

            yield step

    def _lines(self, title: str, steps: int) -> Iterator[Stage]:
        started = last = time.monotonic()
        done = 0
        self.say(f"{title}: {steps} steps")

        def step(note: str = "") -> None:
            nonlocal done, last
            done += 1
            now = time.monotonic()
            if now - last >= PLAIN_LINE_EVERY_SECONDS and done < steps:
                last = now
                left = (now - started) / done * (steps - done)
                self.say(f"{title}: {done}/{steps}, about {left:.0f} s left {note}".rstrip())

        yield step
        self.say(f"{title}: done in {time.monotonic() - started:.1f} s")


class Silent(Progress):
    """Shows nothing; for use from Python and in tests."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))

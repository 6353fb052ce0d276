"""Two ways of doing the same, timed in turn in one run; what is quoted is their ratio and its spread.

Absolute times drift on shared machines, ratios of neighbours do not.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent.parent / "results" / "bench"


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one way is as another.

    Attributes:
        what, against: the two ways, in words.
        ratio: median over the repeats; low and high are the extremes.
        required: what it should at least be.
        repeats: pairs timed.
        seconds, seconds_against: medians, for proportion.
        notes: what else a reader must know.
    """

    what: str
    against: str
    ratio: float
    ratio_low: float
    ratio_high: float
    required: float
    repeats: int
    seconds: float
    seconds_against: float
    notes: dict[str, Any]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def side_by_side(
    what: str,
    against: str,
    fast: Callable[[], float],
    slow: Callable[[], float],
    required: float,
    repeats: int = 3,
    notes: dict[str, Any] | None = None,
) -> Ratio:
    """Time `slow` and `fast` in turn; each returns the seconds that count."""
    pairs = []
    for number in range(repeats):
        pair = slow(), fast()
        pairs.append(pair)
        say(f"{number + 1}/{repeats}: {pair[0]:.2f} s against {pair[1]:.2f} s, {pair[0] / pair[1]:.2f} times as fast")
    ratios = [slow_seconds / fast_seconds for slow_seconds, fast_seconds in pairs]
    return Ratio(
        what=what,
        against=against,
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        required=required,
        repeats=repeats,
        seconds=statistics.median(pair[1] for pair in pairs),
        seconds_against=statistics.median(pair[0] for pair in pairs),
        notes=notes or {},
    )


def report(name: str, ratio: Ratio) -> None:
    """Print a ratio and write `results/bench/NAME.json`."""
    verdict = "reached" if ratio.ratio >= ratio.required else "MISSED"
    say(
        f"{ratio.what}, against {ratio.against}: {ratio.ratio:.2f} ({ratio.ratio_low:.2f} to {ratio.ratio_high:.2f}), "
        f"{ratio.required:g} required: {verdict}"
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**asdict(ratio), "machine": machine()}, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201 - a benchmark's output

"""The most memory that a piece of work takes while it runs: what a decoding step needs on top of the cache it reads.

On CUDA the allocator keeps a peak. On CPUs it reports every block it hands out or takes back to a profiler, and the
running sum of those is followed.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The profiler writes two lines to stderr for each session unless its log is set above all of its levels.
QUIET = ("KINETO_LOG_LEVEL", "99")


@contextmanager
def watched(device: torch.device) -> Iterator[None]:
    """Let the allocator remember the sizes of what is allocated meanwhile, so that `peak_bytes` sees it freed.

    A CPU allocator knows the size of a block it takes back only if the block was handed out under a profiler. What was
    allocated elsewhere and is freed in the work that `peak_bytes` measures counts as if it stayed: the peak is then too
    high, never too low.
    """
    if device.type == "cuda":
        yield
        return
    with _session():
        yield


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The most bytes alive at once of what `function()` allocates on `device` (all GPUs, where that is one), over what
    was alive before it.

    What it frees of earlier allocations (made under `watched`, on CPUs) makes room. Temporaries inside of operations
    count. Work of other threads on the same device counts too, so there should be none.
    """
    if device.type == "cuda":
        # A model may lie on several: each one's peak counts, as if they came at the same time.
        devices = range(torch.cuda.device_count())
        before = 0
        for each in devices:
            torch.cuda.synchronize(each)
            before += torch.cuda.memory_allocated(each)
            torch.cuda.reset_peak_memory_stats(each)
        function()
        for each in devices:
            torch.cuda.synchronize(each)
        return sum(torch.cuda.max_memory_allocated(each) for each in devices) - before
    with _session() as profiler:
        result = function()  # held until the session ends: what is handed out is alive after the work
    del result
    alive = peak = 0
    for change in _changes(profiler):
        alive += change
        peak = max(peak, alive)
    return peak


def _session() -> Any:
    os.environ.setdefault(*QUIET)
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def _changes(profiler: Any) -> list[int]:
    """Bytes handed out (above 0) or taken back (below), in order of time."""
    found = profiler.profiler.kineto_results.events()
    events = [event for event in found if event.name() == "[memory]" and event.device_type().name == "CPU"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]

"""Measuring calls fairly: in turns within one run, with their spread, and the memory that they take.

Shared machines get faster and slower while one looks at them. Contestants that take turns, call by call, meet the same
machine; the median of their calls is compared, and the 20th and 80th percentiles say how much it was to be trusted.
"""

import gc
import random
import time
from typing import NamedTuple

import numpy as np
import torch
from gpu_timer import GpuTimer
from torch.profiler import ProfilerActivity, profile

LEAST_ROUNDS, MOST_ROUNDS = 3, 200
TURN_SECONDS, MOST_CALLS_A_TURN = 0.02, 10  # short calls have several a turn


class Spread(NamedTuple):
    """Seconds of one call: median, 20th and 80th percentile, and of how many calls.

    On a GPU these are the device's, and host is the median time until the call returns to Python; if it is behind,
    the device's may include some of it (`GpuTimer`). On a CPU, and from a timer of one's own, host is None.
    """

    median: float
    p20: float
    p80: float
    calls: int
    host: float | None = None
    behind: bool = False

    @property
    def pace(self):
        """Seconds a call in a loop that waits for nothing: the slower of device and host."""
        return max(self.median, self.host or 0)

    def as_dict(self):
        """For a row of a document, in milliseconds."""
        return {
            "median_ms": self.median * 1e3,
            "p20_ms": self.p20 * 1e3,
            "p80_ms": self.p80 * 1e3,
            "calls": self.calls,
        } | ({} if self.host is None else {"host_ms": self.host * 1e3, "host_behind": self.behind})


def spread(seconds):
    """The `Spread` of a list of times; percentiles are interpolated linearly."""
    p20, median, p80 = np.percentile(seconds, [20, 50, 80])
    return Spread(float(median), float(p20), float(p80), len(seconds))


def three_digits(x):
    """A positive number with three digits and no exponent: "0.123", "1.23", "12.3", "123", "12300"."""
    decimals = max(0, 2 - int(np.floor(np.log10(x)))) if x > 0 else 0
    return f"{x:.{min(decimals, 6)}f}"


def alternate(calls, device, seconds, least=LEAST_ROUNDS, most=MOST_ROUNDS, timer=None, turn_seconds=TURN_SECONDS):
    """Time the values of `calls` {name: function} in turns; {name: Spread}.

    In a round each has a turn, of one call or as many as fit into turn_seconds, in an order that is drawn anew: nobody
    always finds the caches as the same one left them. There are at least `least` rounds, then as many as fit into
    `seconds`, at most `most`. timer(function) calls it and says how many seconds it took. The caller has called each of
    them before: nothing warms up here.
    """
    timer = timer or (GpuTimer(device) if torch.device(device).type == "cuda" else _seconds_of)
    names, times, dice = list(calls), {name: [] for name in calls}, random.Random(0)
    started = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()  # a collection would be charged to whoever's turn it is
    try:
        for turn in range(most if names else 0):
            dice.shuffle(names)
            for name in names:
                for _ in range(MOST_CALLS_A_TURN):
                    times[name].append(timer(calls[name]))
                    if sum(times[name][-MOST_CALLS_A_TURN:]) >= turn_seconds:
                        break
            used = time.perf_counter() - started
            if turn + 1 >= least and used + used / (turn + 1) > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    spreads = {name: spread(seconds) for name, seconds in times.items()}
    if isinstance(timer, GpuTimer):
        hosts = {name: timer.host[call] for name, call in calls.items()}
        return {
            name: each._replace(host=hosts[name].median, behind=hosts[name].behind) for name, each in spreads.items()
        }
    return spreads


def _seconds_of(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def shown(row):
    """The time of a row that has `Spread.as_dict`, in milliseconds: "12.3 (12.1-12.9)"."""
    median, p20, p80 = (three_digits(row[key]) for key in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median} ({p20}-{p80})"


def with_host_times(table, rows):
    """A table whose lines are of the timed `rows`, with "host ms" behind its milliseconds where rows have it: on a GPU.

    A star marks a call that the GPU caught up with.
    """
    rows = [row for row in rows if "median_ms" in row]
    if not any("host_ms" in row for row in rows):
        return table
    after = 1 + next(i for i, column in enumerate(table["columns"]) if column in ("ms", "ms a step"))
    cells = [three_digits(row["host_ms"]) + "*" * row["host_behind"] for row in rows]
    notes = ["host ms: until the call returns to Python, the GPU not waited for; ms is the GPU's alone"]
    if any(row["host_behind"] for row in rows):
        notes.append("*: waits for the GPU itself or overfills its queue; its ms may include time of the host")
    return table | {
        "columns": [*table["columns"][:after], "host ms", *table["columns"][after:]],
        "rows": [[*line[:after], cell, *line[after:]] for line, cell in zip(table["rows"], cells, strict=True)],
        "notes": [*table["notes"], *notes],
    }


def peak_memory(call, device):
    """Bytes that a call takes at its peak, its result included.

    On a GPU what PyTorch's allocator reports; on a CPU the same, summed over the allocations that PyTorch's profiler
    records. Memory that an operator gets elsewhere (a BLAS library's workspace) is in neither.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _, taken = _with_allocations(call)
    return max(0, int(np.cumsum(taken).max())) if taken else 0


def with_memory_held(make, device):
    """(what make() returns, the bytes that are still held by it), such as a mask; counted as in `peak_memory`."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        made = make()
        return made, torch.cuda.memory_allocated(device) - before
    made, taken = _with_allocations(make)
    return made, max(0, sum(taken))


def _with_allocations(function):
    """(result, [bytes]): each allocation while it runs, in order, and each release as a negative number."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return result, [event.nbytes() for event in events]


def large_matmul(device, dtype):
    """(call, FLOPs) of a product of two matrices that are large for the device: what it can reach at best."""
    n = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * n**3

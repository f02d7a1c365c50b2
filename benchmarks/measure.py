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
from torch.profiler import ProfilerActivity, profile

LEAST_ROUNDS, MOST_ROUNDS = 3, 200
TURN_SECONDS, MOST_CALLS_A_TURN = 0.02, 10  # short calls have several a turn
L2_FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any card


class Spread(NamedTuple):
    """Seconds of one call: median, 20th and 80th percentile, and of how many calls."""

    median: float
    p20: float
    p80: float
    calls: int

    def as_dict(self):
        """For a row of a document, in milliseconds."""
        return {
            "median_ms": self.median * 1e3,
            "p20_ms": self.p20 * 1e3,
            "p80_ms": self.p80 * 1e3,
            "calls": self.calls,
        }


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
    timer = timer or (_GpuTimer(device) if torch.device(device).type == "cuda" else _seconds_of)
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
    return {name: spread(seconds) for name, seconds in times.items()}


def _seconds_of(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def shown(row):
    """The time of a row that has `Spread.as_dict`, in milliseconds: "12.3 (12.1-12.9)"."""
    median, p20, p80 = (three_digits(row[key]) for key in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median} ({p20}-{p80})"


class _GpuTimer:
    """Seconds that a call keeps the GPU busy, its inputs not in the L2 cache."""

    def __init__(self, device):
        self.device = device
        self.rubbish = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, call):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # clearing this takes the GPU longer than the launches that follow take the host, which are then not timed
        self.rubbish.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


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

"""Time and memory of calls: contestants take turns in one run, and each time is given with its spread.

The speed of a shared machine changes during a run. Contestants that take turns, call by call, meet the same machine. We
compare the medians; the 20th and 80th percentiles say how far to trust them.

On a GPU, events around the launches measure the slower of host and device. A small call takes Python longer to launch
than the GPU to run: then the GPU idles between its kernels, and the events report the time of Python. So `GpuTimer`
makes the GPU wait until the whole call is in its queue:

    host      clear  wait  begin  [launches of the call]  end
    device    [clear][wait ........................... ][begin][the call][end]      begin to end: the device alone

The wait is twice the longest host time seen. After every call we check it: if the GPU passed `begin` before the host
queued `end`, the call is timed again behind a longer wait. The host time is measured apart, from an empty queue and
without a synchronisation after the call.

Other timers: triton.testing.do_bench clears the cache and records events, without a wait. torch.utils.benchmark gives
the larger of host and device, with a warm cache. do_bench_cudagraph replays a CUDA graph, which hides the host; it
cannot time calls that synchronise, and gives each contestant a memory pool that it does not have in use.
"""

import gc
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import harness  # first: it puts the root of the repository on the path, so that `train` is ours
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from train.metrics import peak_of

try:
    from resource import RUSAGE_SELF, getrusage
except ImportError:  # Windows does not count page faults for a process
    getrusage = None

LEAST_ROUNDS, MOST_ROUNDS = 3, 200
TURN_SECONDS, MOST_CALLS_A_TURN = 0.02, 10  # short calls have several a turn
L2_FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any card
HOST_CALLS = 5
MARGIN = 2  # the wait over the longest host time seen: the host may stall, and the clock rise, after that was measured
TRIES = 3  # each behind a wait of twice the length
SETTLE_SECONDS, BUSY_SECONDS = 0.7, 0.7  # beside a neighbour: until `SharedCores` has seen it, and of measuring
CLOCK_CYCLES, CLOCK_TRIES = 2_000_000, 3  # about a millisecond each


class Spread(NamedTuple):
    """Seconds of one call: median, 20th and 80th percentile, and the number of calls.

    On a GPU these are the device's, host is the median time until the call returns to Python, and behind says that the
    device's time may include some of the host's (`GpuTimer`). On a CPU, and with a timer of the caller, host is None.
    On a CPU without such a timer, faults is the mean number of page faults a call: pages that the system had to map and
    to clear, because memory was new or had been given back after an earlier call.
    """

    median: float
    p20: float
    p80: float
    calls: int
    host: float | None = None
    behind: bool = False
    faults: float | None = None

    @property
    def pace(self):
        """Seconds a call in a loop that never synchronises: the slower of device and host."""
        return max(self.median, self.host or 0)

    def as_dict(self):
        """For a row of a document, in milliseconds."""
        row = {
            "median_ms": self.median * 1e3,
            "p20_ms": self.p20 * 1e3,
            "p80_ms": self.p80 * 1e3,
            "calls": self.calls,
        }
        row |= {} if self.faults is None else {"faults": self.faults}
        return row if self.host is None else row | {"host_ms": self.host * 1e3, "host_behind": self.behind}


def spread(seconds):
    """The `Spread` of a list of times; percentiles are interpolated linearly."""
    p20, median, p80 = np.percentile(seconds, [20, 50, 80])
    return Spread(float(median), float(p20), float(p80), len(seconds))


def alternate(
    calls, device, seconds, least=LEAST_ROUNDS, most=MOST_ROUNDS, timer=None, turn_seconds=TURN_SECONDS, deadline=None
):
    """Time the values of `calls` {name: function} in turns; {name: Spread}.

    In a round each has one turn: one call, or as many as fit into turn_seconds. Every round draws a new order, so that
    nobody always runs after the same contestant. There are at least `least` and at most `most` rounds, in between as
    many as fit into `seconds`. timer(function) calls it and returns seconds. No turn begins after `deadline` seconds:
    a name that had none is missing from the result. There is no warm-up here: the caller has called each function
    before.
    """
    count_faults = timer is None and torch.device(device).type == "cpu" and getrusage is not None
    timer = timer or (GpuTimer(device) if torch.device(device).type == "cuda" else _seconds_of)
    names, times, generator = list(calls), {name: [] for name in calls}, random.Random(0)
    faults = dict.fromkeys(calls, 0)
    started = perf_counter()
    collecting = gc.isenabled()
    gc.disable()  # a collection would count as time of the current contestant
    try:
        for turn in range(most if names else 0):
            generator.shuffle(names)
            for name in names:
                if deadline is not None and perf_counter() - started > deadline:
                    break
                faults_before = _faults() if count_faults else 0
                for _ in range(MOST_CALLS_A_TURN):
                    times[name].append(timer(calls[name]))
                    if sum(times[name][-MOST_CALLS_A_TURN:]) >= turn_seconds:
                        break
                faults[name] += _faults() - faults_before if count_faults else 0
            used = perf_counter() - started
            late = deadline is not None and used > deadline
            if late or (turn + 1 >= least and used + used / (turn + 1) > seconds):
                break
    finally:
        if collecting:
            gc.enable()
    spreads = {name: spread(seconds) for name, seconds in times.items() if seconds}
    if isinstance(timer, GpuTimer):
        hosts = {name: timer.host[calls[name]] for name in spreads}
        return {
            name: each._replace(host=hosts[name].median, behind=hosts[name].behind) for name, each in spreads.items()
        }
    if count_faults:
        return {name: each._replace(faults=faults[name] / each.calls) for name, each in spreads.items()}
    return spreads


def _faults():
    """Page faults of this process so far that needed no disk."""
    return getrusage(RUSAGE_SELF).ru_minflt


def add_busy(rows, calls, device, key=lambda row: row["contestant"], **options):
    """Time the calls of ours again while another process keeps a core busy, and add row["busy"]; nothing on a GPU.

    calls {key(row): function}; options: those of `alternate`.
    """
    ours = {key(row): row for row in rows if row["contestant"].startswith("ours") and key(row) in calls}
    if torch.device(device).type != "cpu" or not ours:
        return
    calls = {name: calls[name] for name in ours}
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        try:
            alternate(calls, device, SETTLE_SECONDS, **options)
            times = alternate(calls, device, BUSY_SECONDS * len(calls), **options)
        finally:
            neighbour.kill()
    for name, row in ours.items():
        row["busy"] = times[name].as_dict()


def _seconds_of(call):
    started = perf_counter()
    call()
    return perf_counter() - started


@dataclass
class Host:
    """Host time of a call in seconds, the median and the longest of a few calls; behind: see `GpuTimer`."""

    median: float
    longest: float
    behind: bool = False


class GpuTimer:
    """timer(call): seconds that a call keeps the GPU, with a cold L2 cache. timer.host[call]: its `Host`.

    A call that synchronises, or has more launches than a queue holds (about a thousand), cannot be queued while the
    GPU waits. Its time may include time of the host, and its `Host` is marked `behind`.
    """

    def __init__(self, device):
        self.rubbish = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)
        self.cycles_per_second = self._clock()
        self.host = {}

    def __call__(self, call):
        if call not in self.host:
            self.host[call] = _host_of(call)
        host = self.host[call]
        for attempt in range(1 if host.behind else TRIES):
            seconds, ahead = self._timed(call, MARGIN * host.longest * 2**attempt)
            if ahead:
                return seconds
        host.behind = True
        return seconds

    def _timed(self, call, wait):
        """(seconds from begin to end, whether all was queued before the GPU reached begin)."""
        begin, end = _two_events()
        self.rubbish.zero_()
        torch.cuda._sleep(int(wait * self.cycles_per_second) + 1)
        begin.record()
        call()
        end.record()
        ahead = not begin.query()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, ahead

    def _clock(self):
        """Cycles of the wait in a second. The highest of a few: an idle card raises its clock only under load."""
        rates = []
        for _ in range(CLOCK_TRIES):
            begin, end = _two_events()
            self.rubbish.zero_()  # takes longer than to queue the next three
            begin.record()
            torch.cuda._sleep(CLOCK_CYCLES)
            end.record()
            end.synchronize()
            rates.append(CLOCK_CYCLES * 1e3 / begin.elapsed_time(end))
        return max(rates)


def _host_of(call):
    """Each call starts with an empty queue and ends when it returns to Python."""
    seconds = []
    for _ in range(HOST_CALLS):
        torch.cuda.synchronize()
        started = perf_counter()
        call()
        seconds.append(perf_counter() - started)
    torch.cuda.synchronize()
    return Host(statistics.median(seconds), max(seconds))


def _two_events():
    return (torch.cuda.Event(enable_timing=True) for _ in range(2))


def peak_of_device(device):
    """The `Peak` of a GPU by its data sheet; None on a CPU, and for a card that the table does not have."""
    return peak_of(torch.cuda.get_device_name(device)) if torch.device(device).type == "cuda" else None


def three_digits(x):
    """A positive number with three digits and no exponent: "0.123", "1.23", "12.3", "123", "12300"."""
    decimals = max(0, 2 - int(np.floor(np.log10(x)))) if x > 0 else 0
    return f"{x:.{min(decimals, 6)}f}"


def shown(row):
    """The time of a row that has `Spread.as_dict`, in milliseconds: "12.3 (12.1-12.9)"."""
    median, p20, p80 = (three_digits(row[key]) for key in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median} ({p20}-{p80})"


def table(title, rows, columns, notes=()):
    """The table of the timed rows. columns: {heading: function of a row}, which returns text.

    Rows that have them get columns after their milliseconds: "host ms" on a GPU; on a CPU "busy ms" of `add_busy`, and
    "faults". Notes name the rows that were not timed, and why.
    """
    timed = [row for row in rows if "median_ms" in row]
    notes = [*notes, *harness.not_timed(rows)]
    more = {}
    if any("host_ms" in row for row in timed):
        more["host ms"] = lambda row: three_digits(row["host_ms"]) + "*" * row["host_behind"]
        notes.append("host ms: until the call returns to Python, without waiting for the GPU; ms is the GPU's alone")
        if any(row["host_behind"] for row in timed):
            notes.append("*: waits for the GPU itself or overfills its queue; its ms may include time of the host")
    if any("busy" in row for row in timed):
        more["busy ms"] = lambda row: shown(row["busy"]) if "busy" in row else ""
        notes.append("busy ms: while another process keeps a core busy")
    if any("faults" in row for row in timed):
        more["faults"] = lambda row: f"{row['faults']:.0f}" if "faults" in row else ""
        notes.append("faults: page faults a call, each for 4 KB of memory that the system maps and clears")
    after = 1 + next((i for i, name in enumerate(columns) if name in ("ms", "ms a step")), -1)
    names = [*list(columns)[:after], *more, *list(columns)[after:]]
    columns = columns | more
    lines = [[columns[name](row) for name in names] for row in timed]
    return {"title": title, "columns": names, "rows": lines, "notes": notes}


def ratio(key):
    """A column of `table`: the row's number with two decimals, empty where it has none."""
    return lambda row: f"{row[key]:.2f}" if row.get(key) is not None else ""


def peak_memory(call, device):
    """Bytes that a call takes at its peak, its result included.

    On a GPU what PyTorch's allocator reports; on a CPU the sum of the allocations that PyTorch's profiler records. An
    operator's own allocations outside PyTorch (a BLAS library's workspace) are in neither.
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
    """(what make() returns, the bytes that it still holds), such as a mask; counted as in `peak_memory`."""
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
    """(call, FLOPs) of a large matrix product: the most FLOP/s that this device reaches."""
    n = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * n**3


def random_heads(problem, *heads, seed=0):
    """Random tensors (B, H, T, D) for each H, as projections make them: views of (B, T, H, D).

    problem has B, T, D, dtype and device.
    """
    generator = torch.Generator(problem.device).manual_seed(seed)
    shapes = [(problem.B, problem.T, H, problem.D) for H in heads]
    drawn = [torch.randn(shape, generator=generator, device=problem.device) for shape in shapes]
    return [x.to(problem.dtype).transpose(1, 2) for x in drawn]


def call_of(function, inputs, gradients, backward):
    """What is timed: one forward, or one forward and backward, of function(*inputs). It returns all results.

    gradients: those of the outputs, in a tuple. The inputs require a gradient if backward is true.
    """

    def forward():
        with torch.no_grad():
            return _as_tuple(function(*inputs))

    def forward_and_backward():
        out = _as_tuple(function(*inputs))
        return (*out, *torch.autograd.grad(out, inputs, gradients))

    return forward_and_backward if backward else forward


def _as_tuple(out):
    return tuple(out) if isinstance(out, tuple | list) else (out,)

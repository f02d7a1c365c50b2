"""The time that a call keeps a GPU, and the time that it keeps the host, apart.

Events beside the launches time whoever is slower. A call of a few dozen microseconds takes Python longer to launch than
the GPU to run, so the GPU idles between its kernels and the events report Python. Clearing the L2 cache in front of
them hides some of that, not all: 256 MiB take an H100 about 80 us, a Triton forward and backward take the host twice
that. So the GPU is kept waiting until everything is in its queue:

    host      clear  wait  begin  [launches of the call]  end
    device    [clear][wait ........................... ][begin][the call][end]      begin to end: the device alone

The wait is twice the longest of a few host times of the same call, and after every call it is checked: if the GPU is
past `begin` when the host has queued `end`, the call is timed anew behind a longer wait. The host time itself is
measured apart, from an empty queue and without a synchronisation after the call. A loop that waits for nothing takes
the larger of both a call.

What others do: triton.testing.do_bench clears the cache and records events, and has the bias above, which grows with a
contestant's Python; Liger's benchmarks use it. FlashAttention's use torch.utils.benchmark, whose wall clock over many
calls has the larger of host and device and a warm cache. triton.testing.do_bench_cudagraph replays calls captured in a
CUDA graph, which hides the host entirely. It is not for contestants as different as ours: a capture refuses whatever
reads a number back or synchronises, an optimizer would have to be made for it, and each contestant would run from a
memory pool and at addresses that it does not have in use. A wait asks nothing of them. With one, TorchRec saw 0.24 ms
between events on an H100 become 0.09 ms (meta-pytorch/torchrec#4665).
"""

import statistics
from dataclasses import dataclass
from time import perf_counter

import torch

L2_FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any card
HOST_CALLS = 5
MARGIN = 2  # the wait over the longest host time seen: hosts stall, and clocks rise after they were measured
TRIES = 3  # each behind a wait of twice the length
CLOCK_CYCLES, CLOCK_TRIES = 2_000_000, 3  # about a millisecond each


@dataclass
class Host:
    """What a call asks of the host: seconds, the median and the most of a few calls; behind: see `GpuTimer`."""

    median: float
    most: float
    behind: bool = False


class GpuTimer:
    """Seconds that a call keeps the GPU, its inputs not in the L2 cache; `host[call]` says what it asks of the host.

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
            seconds, ahead = self._timed(call, MARGIN * host.most * 2**attempt)
            if ahead:
                return seconds
        host.behind = True
        return seconds

    def _timed(self, call, wait):
        """(seconds from begin to end, whether all was queued before the GPU came to begin)."""
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
        """Cycles of the wait in a second: the most of a few, since a card that idled has yet to raise its clock."""
        rates = []
        for _ in range(CLOCK_TRIES):
            begin, end = _two_events()
            self.rubbish.zero_()  # longer than it takes to queue these three
            begin.record()
            torch.cuda._sleep(CLOCK_CYCLES)
            end.record()
            end.synchronize()
            rates.append(CLOCK_CYCLES * 1e3 / begin.elapsed_time(end))
        return max(rates)


def _host_of(call):
    """Each call meets an empty queue, and is over for the host when it returns, whatever the GPU still has to do."""
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

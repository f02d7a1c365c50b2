"""On a CPU that other programs use too: PyTorch's threads wait for each other asleep, elsewhere they spin.

GNU OpenMP's threads spin for milliseconds while they wait for each other, which is fastest on a quiet machine. If
another program takes a core, the other threads spin until the thread there has its turn again, at each of some hundred
operations: a training step took 4 times as long. Threads that never spin take nearly twice as long on a quiet machine.
GOMP_SPINCOUNT chooses between them once, when torch is loaded. docs/banded.md has the figures.

libgomp hardly spins while the process has more OpenMP threads than cores. So while others use the cores, `SharedCores`
keeps some threads that do nothing but count. Results do not change by a bit: the work is cut for as many threads as
before.
"""

import contextlib
import math
import os
import threading
import time
from pathlib import Path

import torch

PERIOD_SECONDS = 0.25
WAITED = Path("/proc/self/schedstat")
# Share of the time that threads waited for a core: on two cores 1.5 % on a quiet machine, 23 % beside a busy process
BUSY = 0.08


class SharedCores:
    """A context: inside it, threads sleep instead of spinning for as long as other programs want this process's cores.

    device: nothing happens unless it is a CPU, nor with one thread, on systems other than Linux, or if GOMP_SPINCOUNT
    or OMP_WAIT_POLICY says how to wait. `asleep` is whether threads sleep now.
    """

    def __init__(self, device):
        chosen = "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ
        self._threads = torch.get_num_threads()
        watch = torch.device(device).type == "cpu" and self._threads > 1 and not chosen and WAITED.exists()
        self._watcher = threading.Thread(target=self._watch, daemon=True) if watch else None
        self._ended, self._idle = threading.Event(), []

    @property
    def asleep(self):
        return bool(self._idle)

    def __enter__(self):
        if self._watcher is not None:
            self._watcher.start()
        return self

    def __exit__(self, *error):
        self._ended.set()
        if self._watcher is not None:
            self._watcher.join()

    def _watch(self):
        then, waited = time.perf_counter(), _seconds_waited()
        while not self._ended.wait(PERIOD_SECONDS):
            before, waited_before = then, waited
            then, waited = time.perf_counter(), _seconds_waited()
            busy = waited - waited_before > BUSY * self._threads * (then - before)
            if busy != self.asleep:
                self._sleep() if busy else self._spin()
        self._spin()

    def _sleep(self):
        """Start as many threads, each with its OpenMP threads, as make more of these than there are cores."""
        missing = len(os.sched_getaffinity(0)) + 1 - self._threads
        self._idle = [_Idle(self._threads) for _ in range(max(1, math.ceil(missing / (self._threads - 1))))]

    def _spin(self):
        for idle in self._idle:
            idle.end.set()
            idle.join()
        self._idle = []


class _Idle(threading.Thread):
    """A thread that has OpenMP threads and does nothing."""

    def __init__(self, threads):
        super().__init__(daemon=True)
        self.end, self.elements = threading.Event(), threads * 2**16
        self.start()

    def run(self):
        torch.empty(self.elements, dtype=torch.int8).fill_(0)  # large enough for all threads: it makes them
        self.end.wait()


def _seconds_waited():
    """Seconds that the threads of this process have waited for a core in all; those of a thread that ends are lost."""
    total = 0
    for file in WAITED.parent.glob("task/*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has just ended
            total += int(file.read_text().split()[1])
    return total / 1e9

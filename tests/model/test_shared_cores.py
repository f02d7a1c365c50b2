import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from model import shared_cores
from model.shared_cores import SharedCores

pytestmark = pytest.mark.skipif(not shared_cores.WAITED.exists(), reason="the system does not count waiting threads")

# A child of two threads keeps itself busy for some seconds and prints whether its threads slept, and its results' bits
CHILD = """
import sys, time, torch
from model.shared_cores import SharedCores
torch.set_num_threads(2)
x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
results, slept, ended = set(), False, time.monotonic() + float(sys.argv[1])
with SharedCores("cpu") as shared:
    while time.monotonic() < ended and not slept:
        results.add(((x @ x).sum() + x.exp().sum()).item())
        slept = shared.asleep
    for _ in range(20):
        results.add(((x @ x).sum() + x.exp().sum()).item())
print(slept, len(results), shared.asleep)
"""


def child(seconds=60, **environment):
    plain = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", CHILD, str(seconds)]
    done = subprocess.run(command, env=plain | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def neighbours():
    """Two busy processes for each core."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * os.cpu_count())]
    yield
    for process in busy:
        process.kill()
        process.wait()


def test_threads_sleep_beside_busy_neighbours_and_results_keep_their_bits(neighbours):
    assert child() == "True 1 False"


def test_nothing_happens_where_the_caller_chose_how_to_wait(neighbours):
    assert child(2, GOMP_SPINCOUNT="1000") == "False 1 False"


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def wait_until(condition):
    ended = time.monotonic() + 30
    while not condition() and time.monotonic() < ended:
        time.sleep(0.01)
    return condition()


def test_threads_spin_again_when_the_neighbours_leave(monkeypatch, two_threads):
    seconds = [0.0]

    def waited():
        seconds[0] += rate * shared_cores.PERIOD_SECONDS
        return seconds[0]

    monkeypatch.setattr(shared_cores, "_seconds_waited", waited)
    before, rate = threading.active_count(), 1.0
    with SharedCores("cpu") as shared:
        assert wait_until(lambda: shared.asleep) and threading.active_count() > before + 1
        rate = 0.02
        assert wait_until(lambda: not shared.asleep) and threading.active_count() == before + 1  # the watcher
    assert threading.active_count() == before


def test_nothing_is_watched_with_one_thread_or_on_a_gpu(two_threads):
    before = threading.active_count()
    with SharedCores("cuda"):
        assert threading.active_count() == before
    torch.set_num_threads(1)
    with SharedCores("cpu"):
        assert threading.active_count() == before


def test_an_error_inside_ends_the_watch(two_threads):
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), SharedCores("cpu"):
        raise ZeroDivisionError
    assert threading.active_count() == before

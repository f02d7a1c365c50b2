import gc
import mmap
import subprocess
import time

import measure
import pytest
import torch
from measure import peak_of


def test_percentiles_of_known_times():
    assert measure.spread([11, 2, 9, 4, 7, 6, 5, 8, 3, 10, 1]) == measure.Spread(median=6, p20=3, p80=9, calls=11)
    assert measure.spread([1.0, 2.0]) == pytest.approx(measure.Spread(1.5, 1.2, 1.8, 2))


def test_contestants_take_turns_in_an_order_that_changes():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = measure.alternate(calls, "cpu", seconds=0, least=8, turn_seconds=0)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert {each[0] for each in rounds} == {"a", "b", "c"}
    assert [time.calls for time in times.values()] == [8, 8, 8]


def test_times_go_to_whom_they_belong():
    calls = {"slow": lambda: time.sleep(0.03), "fast": lambda: time.sleep(0.001)}
    times = measure.alternate(calls, "cpu", seconds=0)
    assert times["slow"].p20 >= 0.03 > times["fast"].median >= 0.001
    assert times["slow"].calls == measure.LEAST_ROUNDS < times["fast"].calls  # short calls have several a turn


def test_rounds_end_when_the_time_is_used():
    started = time.perf_counter()
    times = measure.alternate({"": lambda: time.sleep(0.02)}, "cpu", seconds=0.3)
    assert measure.LEAST_ROUNDS < times[""].calls <= 15
    assert time.perf_counter() - started < 3


def test_a_timer_of_ones_own_says_what_a_call_took():
    times = measure.alternate({"a": 1.0, "b": 2.0}, "cpu", 0, timer=lambda value: value, turn_seconds=0)
    assert {name: spread.median for name, spread in times.items()} == {"a": 1.0, "b": 2.0}


def test_the_garbage_collector_rests_while_measuring_and_works_again_after_a_failure():
    seen = []
    measure.alternate({"": lambda: seen.append(gc.isenabled())}, "cpu", 0)
    assert not any(seen) and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        measure.alternate({"": lambda: 1 / 0}, "cpu", 0)
    assert gc.isenabled()


MEGABYTE = 2**20


def test_peak_memory_is_the_most_at_any_time():
    def call():
        result = torch.ones(4 * MEGABYTE, dtype=torch.int8)
        for _ in range(3):  # one after the other: not 24
            scratch = torch.ones(8 * MEGABYTE, dtype=torch.int8)
            del scratch
        return result

    assert measure.peak_memory(call, "cpu") == pytest.approx(12 * MEGABYTE, rel=0.01)


def test_memory_held_is_what_outlives_the_making():
    def make():
        scratch = torch.ones(8 * MEGABYTE, dtype=torch.int8)
        return scratch[:10].clone(), torch.ones(2 * MEGABYTE, dtype=torch.int8)

    (small, large), held = measure.with_memory_held(make, "cpu")
    assert len(small) == 10 and held == pytest.approx(large.nbytes, rel=0.01)


def test_peak_memory_counts_what_an_operator_needs_inside():
    x = torch.randn(1024, 1024)
    inside = measure.peak_memory(lambda: torch.linalg.solve(x, x), "cpu")
    assert inside > 1.9 * x.nbytes  # the result, and a copy of the matrix to be factorised


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.00012345, "0.000123"),
        (0.5, "0.500"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (12345.6, "12346"),
        (0, "0"),
    ],
)
def test_three_digits(number, text):
    assert measure.three_digits(number) == text


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_cards_are_known_by_their_drivers_name(name, tflops):
    peak = peak_of(name)
    assert (peak and peak.tflops) == tflops


def test_the_40_gb_a100_has_slower_memory():
    assert peak_of("NVIDIA A100-SXM4-40GB").gb_per_second < peak_of("NVIDIA A100-SXM4-80GB").gb_per_second


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_clock_and_memory_by_its_allocator():
    x = torch.randn(4096, 4096, device="cuda")
    times = measure.alternate({"one": lambda: x @ x, "four": lambda: [x @ x for _ in range(4)]}, "cuda", 1)
    assert 2.5 < times["four"].median / times["one"].median < 6
    assert measure.peak_memory(lambda: x + 1, "cuda") == x.nbytes
    assert measure.with_memory_held(lambda: x + 1, "cuda")[1] == x.nbytes


# The timer on a simulated GPU, whose times are known: one queue, a clock for it and one for the host
CYCLES_PER_SECOND = 1.5e9
CLEAR = 80e-6  # seconds: 256 MiB on an H100


class SimulatedGpu:
    """Stands in the place of torch.cuda: what is queued starts when the host has queued it and the GPU is free."""

    def __init__(self, monkeypatch, clock=lambda: CYCLES_PER_SECOND):
        self.host = self.free = 0.0
        self.clock, self.log, self.waits = clock, [], []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                gpu.log.append("event")
                self.time = max(gpu.host, gpu.free)

            def query(self):
                return gpu.host >= self.time

            def synchronize(self):
                gpu.host = max(gpu.host, self.time)

            def elapsed_time(self, other):
                return (other.time - self.time) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch, "empty", lambda *shape, **how: self)  # what is cleared
        monkeypatch.setattr(measure, "perf_counter", lambda: self.host)

    def queue(self, seconds):
        self.free = max(self.host, self.free) + seconds

    def zero_(self):
        self.log.append("clear")
        self.queue(CLEAR)

    def sleep(self, cycles):
        self.log.append("wait")
        self.waits.append(cycles / CYCLES_PER_SECOND)
        self.queue(cycles / self.clock())

    def synchronize(self):
        self.log.append("synchronize")
        self.host = max(self.host, self.free)

    def call(self, *, launches=4, host, device, synchronizes=False):
        """A call of `launches` kernels, each `host` seconds of Python and `device` of the GPU."""

        def run():
            self.log.append("call")
            for _ in range(launches):
                self.host += host
                self.queue(device)
                if synchronizes:
                    self.host = max(self.host, self.free)

        return run


@pytest.fixture
def gpu(monkeypatch):
    return SimulatedGpu(monkeypatch)


def test_cleared_then_waited_then_timed(gpu):
    timer, call = measure.GpuTimer("cuda"), gpu.call(host=40e-6, device=5e-6)
    timer(call)
    gpu.log.clear()
    timer(call)
    assert gpu.log == ["clear", "wait", "event", "call", "event"]


def test_a_call_that_the_host_is_slower_at_is_timed_by_the_device(gpu, monkeypatch):
    call = gpu.call(host=43e-6, device=5e-6)  # 172 us of Python for 20 us of kernels
    timer = measure.GpuTimer("cuda")
    assert timer(call) == pytest.approx(20e-6)
    assert timer.host[call].median == pytest.approx(172e-6) and not timer.host[call].behind
    assert gpu.waits[-1] > 172e-6
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)  # the clear alone is too short
    assert timer(call) == pytest.approx(97e-6) and timer.host[call].behind


def test_host_time_is_not_the_devices(gpu):
    timer, call = measure.GpuTimer("cuda"), gpu.call(host=10e-6, device=5e-3)
    assert timer(call) == pytest.approx(20e-3)
    assert timer.host[call].median == pytest.approx(40e-6)


def test_the_wait_is_longer_than_the_longest_host_time_seen(gpu):
    times = iter([1e-4, 9e-4, 1e-4, 1e-4, 1e-4, 1e-4])

    def uneven():
        gpu.host += next(times)
        gpu.queue(1e-6)

    timer = measure.GpuTimer("cuda")
    assert timer(uneven) == pytest.approx(1e-6)
    assert timer.host[uneven].median == pytest.approx(1e-4) and gpu.waits[-1] > 9e-4


def test_a_host_that_stalls_once_is_timed_again_behind_a_longer_wait(gpu):
    times = iter([1e-4] * measure.HOST_CALLS + [3.5e-4, 1e-4, 1e-4])

    def stalling():
        gpu.host += next(times)
        gpu.queue(1e-6)

    timer = measure.GpuTimer("cuda")
    assert timer(stalling) == pytest.approx(1e-6)
    first, second = gpu.waits[-2:]
    assert second == pytest.approx(2 * first, rel=1e-4) and not timer.host[stalling].behind
    timer(stalling)
    assert gpu.waits[-1] == pytest.approx(first)


def test_the_wait_follows_the_clock_of_the_card(monkeypatch):
    """It idles at a third of its clock when it is measured first; later waits are in the cycles of the fastest."""
    clocks = iter([CYCLES_PER_SECOND / 3] + [CYCLES_PER_SECOND] * 10)
    gpu = SimulatedGpu(monkeypatch, lambda: next(clocks))
    timer, call = measure.GpuTimer("cuda"), gpu.call(host=40e-6, device=5e-6)
    assert timer.cycles_per_second == pytest.approx(CYCLES_PER_SECOND)
    timer(call)
    assert gpu.waits[-1] == pytest.approx(measure.MARGIN * 160e-6, rel=1e-4)


def test_a_call_that_waits_for_the_gpu_itself_is_said_to(gpu):
    timer, call = measure.GpuTimer("cuda"), gpu.call(host=40e-6, device=5e-6, synchronizes=True)
    timer(call)
    assert timer.host[call].behind
    gpu.log.clear()
    timer(call)
    assert gpu.log.count("call") == 1  # longer waits are not tried again


def test_contestants_rows_and_table_have_the_host_time(gpu):
    calls = {
        "triton": gpu.call(host=40e-6, device=5e-6),
        "c++": gpu.call(host=4e-6, device=5e-6),
        "waits": gpu.call(host=4e-6, device=5e-6, synchronizes=True),
    }
    times = measure.alternate(calls, "cuda", 0)
    assert times["triton"].median == pytest.approx(times["c++"].median) == pytest.approx(20e-6)
    assert times["triton"].host == pytest.approx(10 * times["c++"].host)
    assert times["triton"].pace == pytest.approx(160e-6) and times["c++"].pace == pytest.approx(20e-6)
    rows = [{"contestant": name} | time.as_dict() for name, time in times.items()] + [{"not_timed": "absent"}]
    assert rows[0]["host_ms"] == pytest.approx(0.16)
    columns = {"": lambda row: row["contestant"], "ms a step": measure.shown, "more": lambda row: "x"}
    for row in rows:
        row |= {"shape": "a", "contestant": row.get("contestant", "absent"), "not_timed": row.get("not_timed")}
    table = measure.table("Steps", rows, columns)
    assert table["columns"] == ["", "ms a step", "host ms", "more"]
    assert [line[2] for line in table["rows"]] == ["0.160", "0.0160", "0.0360*"]
    assert len(table["notes"]) == 3 and table["notes"][0] == "absent was not timed: absent"


def test_a_cpu_has_no_host_time():
    times = measure.alternate({"": lambda: None}, "cpu", 0)
    row = times[""].as_dict()
    assert set(row) == {"median_ms", "p20_ms", "p80_ms", "calls", "faults"} and times[""].pace == times[""].median
    rows = [row | {"shape": "a", "not_timed": None}]
    table = measure.table("Steps", rows, {"": lambda row: "b", "ms": measure.shown})
    assert table["columns"] == ["", "ms", "faults"] and "host ms" not in str(table["notes"])


@pytest.mark.skipif(measure.getrusage is None, reason="the system does not count page faults")
def test_page_faults_go_to_the_call_that_has_them():
    calls = {"new": lambda: mmap.mmap(-1, 100 * mmap.PAGESIZE).write(bytes(100 * mmap.PAGESIZE)), "none": lambda: None}
    times = measure.alternate(calls, "cpu", 0)
    assert 100 <= times["new"].faults < 400 and times["none"].faults < 5
    assert measure.alternate({"": None}, "cpu", 0, timer=lambda call: 1.0)[""].faults is None


def test_ours_is_timed_beside_a_process_that_keeps_a_core_busy(monkeypatch):
    started = []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    alive = []
    calls = {"ours": lambda: alive.append(started[-1].poll() is None), "theirs": None, "ours, failed": None}
    rows = [{"contestant": name, "shape": "a", "not_timed": None, "median_ms": 1.0} for name in ("ours", "theirs")]
    measure.add_busy(rows, calls, "cpu")
    assert alive and all(alive) and started[0].poll() is not None
    assert rows[0]["busy"]["calls"] >= measure.LEAST_ROUNDS and "busy" not in rows[1]
    table = measure.table(
        "Steps", rows, {"": lambda row: row["contestant"], "ms": lambda row: "1", "x": lambda row: "2"}
    )
    assert table["columns"] == ["", "ms", "busy ms", "x"] and table["rows"][1] == ["theirs", "1", "", "2"]

    def failing():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure.add_busy(rows, {"ours": failing}, "cpu")
    assert len(started) == 2 and started[1].poll() is not None  # it ends also then
    measure.add_busy(rows, calls, "cuda")
    measure.add_busy(rows, {"theirs": None}, "cpu")
    assert len(started) == 2


@pytest.mark.gpu
def test_python_between_the_launches_is_not_the_gpus():
    x = torch.randn(1024, 1024, device="cuda")

    def slow_host():
        started = time.perf_counter()
        while time.perf_counter() - started < 1e-3:
            pass
        return x + 1

    times = measure.alternate({"slow": slow_host, "fast": lambda: x + 1}, "cuda", 1)
    assert times["slow"].host > 1e-3 > 10 * times["slow"].median and not times["slow"].behind
    assert times["slow"].median == pytest.approx(times["fast"].median, rel=0.5)

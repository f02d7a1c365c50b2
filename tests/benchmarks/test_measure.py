import gc
import time

import measure
import pytest
import torch
from cards import peak_of


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

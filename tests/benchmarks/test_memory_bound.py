"""The model of decoding and the rotation: latency, bytes under way, programs that take turns."""

import memory_bound
import pytest
from kernels.machine_code import Loop
from memory_bound import bandwidth_share, decode_estimate, decode_ms, rope_estimate, rope_ms
from speed_of_light import CARDS, LATENCY_CYCLES, Shape

H100 = CARDS["sm_90"]
NEEDED = 3350 / 1.83 / 132 * LATENCY_CYCLES  # bytes for each multiprocessor


class Made:
    """A kernel as if compiled."""

    target, matrix = "sm_90", ("HMMA",)

    def __init__(self, tile, instructions=400, blocks=2):
        self.tile, self.instructions, self.blocks_per_multiprocessor = tile, instructions, blocks
        self.loops = (Loop(False, instructions, {"alu": instructions}, {"FMNMX": instructions}, {}),)


def decoding(keys=64, stages=3, blocks=2, instructions=300):
    tile = {"BLOCK_M": 16, "BLOCK_K": keys, "num_warps": 4, "num_stages": stages}
    return Made(tile, instructions, blocks)


def rotation(tokens=16, blocks=8, instructions=500):
    return Made({"BLOCK_T": tokens, "BLOCK_H": 4, "num_warps": 4}, instructions, blocks)


def test_bandwidth_needs_bytes_under_way():
    assert bandwidth_share(NEEDED, H100) == pytest.approx(1)
    assert bandwidth_share(NEEDED / 4, H100) == pytest.approx(1 / 4) and bandwidth_share(9 * NEEDED, H100) == 1


MANY, FEW = Shape(64, 32, 8, 4096, 128, 4096), Shape(1, 32, 8, 256, 128, 256)


def test_a_large_batch_decodes_at_the_memorys_speed():
    best = memory_bound.decode_bytes(MANY, 2) / H100.bytes_per_second * 1e3
    assert decode_estimate(decoding(), MANY, 2).memory_ms == pytest.approx(best)
    assert decode_ms(decoding(), MANY, 2) == pytest.approx(best, rel=0.01)
    # one program with one tile of 16 keys on its way has 8 kB, too few: 4 waves of 256 tiles, each after a latency
    expected = 4 * (256 + memory_bound.STARTING_READS) * LATENCY_CYCLES / 1.83e6
    too_few = decode_ms(decoding(keys=16, stages=2, blocks=1), MANY, 2)
    assert too_few == pytest.approx(expected) and too_few > 1.5 * best
    # and code that takes longer than its tile's bytes
    assert decode_ms(decoding(instructions=30000), MANY, 2) > 3 * best


def test_a_single_sequence_decodes_in_latencies():
    """One program for each KV head and part, far fewer than places: each waits for its reads, one after the other."""
    ms = decode_ms(decoding(), FEW, 2)
    at_least = memory_bound.STARTING_READS * LATENCY_CYCLES / 1.83e6
    assert at_least < ms < 3 * at_least
    assert decode_estimate(decoding(), FEW, 2).memory_ms < ms / 5
    # without a second buffer every tile waits for itself
    assert decode_ms(decoding(stages=1), FEW, 2) > ms


def test_a_loop_that_was_not_found_ranks_last():
    made = decoding()
    made.loops = ()
    assert decode_ms(made, FEW, 2) == float("inf") and decode_estimate(made, FEW, 2) is None


def test_the_rotation_moves_q_and_k_twice():
    shape = Shape(4, 32, 8, 8192, 128, None)
    best = 4 * 8192 * 40 * 128 * 2 * 2 / H100.bytes_per_second * 1e3
    assert rope_estimate(rotation(), shape, 2).memory_ms == pytest.approx(best)
    assert rope_estimate(rotation(), shape, 2).bound_by == "memory"
    assert best < rope_ms(rotation(), shape, 2) < 1.3 * best
    # with one small program a multiprocessor next to nothing is under way
    assert rope_ms(rotation(tokens=1, blocks=1), shape, 2) > 5 * best
    assert rope_estimate(rotation(instructions=50000), shape, 2).bound_by == "issue"

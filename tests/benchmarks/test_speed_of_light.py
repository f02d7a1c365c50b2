"""The model of a kernel's speed: its formulas against counting, hand calculation and published rooflines."""

import published
import pytest
import speed_of_light as model
import torch
import triton
import triton.language as tl
from speed_of_light import CARDS, LATENCY_CYCLES, Shape, bandwidth_share, decode_estimate, decode_ms, rope_estimate

from kernels.backends.triton import tile_configs, tiles
from kernels.band import visible_pairs
from kernels.compiled.machine_code import Loop

ROOFLINE = Shape(4, 32, 8, 8192, 128, 1024)


@pytest.mark.skipif(torch.cuda.is_available(), reason="one program at a time, in the interpreter")
@pytest.mark.parametrize(("T", "W"), [(64, 5), (90, 17), (96, 96), (33, 64)])
def test_tiles_are_counted_as_the_kernels_count_them(T, W):
    @triton.jit
    def count_kernel(out_ptr, first, last, window, length, KEYS: tl.constexpr):
        if KEYS:
            edges, interior = tiles.key_spans(first, last, window, 4, 8)
        else:
            edges, interior = tiles.query_spans(first, last, window, 0, length, 4, 8)
        tl.store(out_ptr, edges[3])
        tl.store(out_ptr + 1, interior[3])

    for keys, own, counted in ((True, 8, model.row_tiles), (False, 16, model.key_tiles)):
        total = torch.zeros(2, dtype=torch.int32)
        for first in range(0, T, own):
            out = torch.zeros(2, dtype=torch.int32)
            count_kernel[(1,)](out, first, min(first + own, T) - 1, W, T, KEYS=keys)
            total += out
        assert counted(T, W, own, 4, 8) == tuple(total.tolist())


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("W", "least"), [(128, 0.80), (256, 0.89), (1024, 0.97)])
def test_the_shipped_band_is_tight(arch, W, least):
    for name in ("forward", "dq"):
        tile = tile_configs.tile_config(name, 128, torch.bfloat16, arch)
        assert round(model.work_efficiency(8192, W, tile.BLOCK_M, tile.EDGE_N, tile.BLOCK_N, pack=4), 2) >= least


def test_work_efficiency_of_a_known_band():
    """Row blocks of 2 queries, key tiles of 2, W = 2, T = 4: 4 tiles of 2 x 2 but the first block, which has one."""
    assert model.row_tiles(4, 2, 2, 2, 2) == (3, 0)
    assert model.work_efficiency(4, 2, 4, 2, 2, pack=2) == pytest.approx(7 / 12)


def test_an_h100_takes_1024_cycles_for_a_tile_of_128_by_64():
    cycles = model.matrix_cycles(128, 64, 128, 2, CARDS["sm_90"], "sm_90", 2, ("HGMMA",))
    assert cycles == pytest.approx(1024, rel=0.01)
    # fp32 as three TF32 products, each at half the rate; and what HMMA does not reach
    assert model.matrix_cycles(128, 64, 128, 2, CARDS["sm_90"], "sm_90", 4, ("HGMMA",)) == pytest.approx(6 * cycles)
    assert model.matrix_cycles(128, 64, 128, 2, CARDS["sm_90"], "sm_90", 2, ("HMMA",)) > 1.5 * cycles


def test_pipes_are_lanes_over_widths():
    opcodes = {"FMNMX": 64, "MUFU.EX2": 16, "FFMA": 20, "FFMA2": 10, "LDSM.16.M88.4": 8, "LDS.64": 4, "SHFL.BFLY": 2}
    pipes = {"alu": 64, "mufu": 16, "fma": 30}
    assert model.pipe_cycles(pipes, opcodes, 8, CARDS["sm_90"]) == {
        "issue": 124 * 8 / 4,
        "alu": 64 * 8 * 32 / 64,
        "mufu": 16 * 8 * 32 / 16,
        "fma": (30 + 10) * 8 * 32 / 128,  # FFMA2 is two
        "shared": (8 * 512 + 4 * 256 + 2 * 128) * 8 / 128,
    }


def test_an_mi300x_multiplies_on_the_lanes_of_its_alu_64_at_a_time():
    opcodes = {"v_max3_f32": 10, "v_fma_f32": 20, "v_exp_f32_e32": 5, "ds_read2st64_b64": 4, "ds_bpermute_b32": 2}
    cycles = model.pipe_cycles({"alu": 10, "fma": 20, "mufu": 5}, opcodes, 4, CARDS["gfx942"])
    assert cycles["alu"] == 30 * 4 and cycles["mufu"] == 5 * 4 * 4
    assert cycles["shared"] == (4 * 64 * 16 + 2 * 64 * 4) * 4 / 128
    # 1307 TFLOP/s in bf16, 163 in fp32
    bf16, fp32 = (
        model.matrix_cycles(64, 64, 64, 1, CARDS["gfx942"], "gfx942", size, ("v_mfma_f32_32x32x8_bf16",))
        for size in (2, 4)
    )
    assert bf16 == pytest.approx(2 * 64**3 / (1307e12 / 304 / 2.1e9)) and fp32 == 8 * bf16


def test_bounds_of_one_tile():
    cycles = {"matrix": 100, "shared": 120, "issue": 70, "alu": 80, "fma": 10, "mufu": 60, "l2": 90}
    assert model.serial_cycles(cycles) == 200 and model.overlapped_cycles(cycles) == 120
    assert model.serial_cycles({**cycles, "l2": 300}) == model.overlapped_cycles({**cycles, "l2": 300}) == 300
    # 64 keys and values of 256 bytes, 5120 bytes a cycle for 132 multiprocessors
    assert model.l2_cycles(64, 128, 2, CARDS["sm_90"]) == pytest.approx(64 * 512 * 132 / 5120)
    assert model.exposed_latency(2) == 0 and model.exposed_latency(1) == model.LATENCY_CYCLES
    assert model.wave_factor(132, 132) == 1 and model.wave_factor(133, 132) == pytest.approx(264 / 133)


@pytest.mark.parametrize(
    ("target", "forward_ms", "rope_ms", "decode_ms"), [("sm_80", 1.65, 0.331, 0.527), ("sm_90", 0.52, 0.202, 0.321)]
)
def test_rooflines(target, forward_ms, rope_ms, decode_ms):
    card = CARDS[target]
    flops = 2 * 2 * ROOFLINE.B * ROOFLINE.Hq * visible_pairs(8192, 8192, 1024) * 128
    assert flops / card.flops * 1e3 == pytest.approx(forward_ms, rel=0.01)
    assert model.attention_bytes("attention_forward", ROOFLINE, 2, rope=False) == pytest.approx(675e6, rel=0.01)
    assert model.rope_bytes(ROOFLINE, 2) / card.bytes_per_second * 1e3 == pytest.approx(rope_ms, rel=0.02)
    step = Shape(64, 32, 8, 4096, 128, 4096)
    assert model.decode_bytes(step, 2) / card.bytes_per_second * 1e3 == pytest.approx(decode_ms, rel=0.01)


class Made:
    """A kernel as if compiled: loops of given opcodes."""

    def __init__(self, kernel, tile, opcodes, target="sm_90", blocks=1):
        self.kernel, self.tile, self.target, self.instructions = kernel, tile, target, 2000
        self.matrix, self.blocks_per_multiprocessor = ("HGMMA",), blocks
        pipes = {"alu": opcodes.get("FMNMX", 0), "mufu": opcodes.get("MUFU.EX2", 0)}
        self.loops = tuple(Loop(masked, sum(opcodes.values()), pipes, opcodes, {}) for masked in (True, False))


FORWARD_TILE = {"PACK": 4, "BLOCK_M": 128, "EDGE_N": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


def test_the_busiest_pipe_bounds():
    busy = Made("attention_forward", FORWARD_TILE, {"FMNMX": 2000})
    estimate = model.attention_estimate(busy, ROOFLINE, 2, rope=False)
    assert estimate.bound_by == "alu" and estimate.serial_ms > estimate.overlapped_ms > estimate.memory_ms
    idle = model.attention_estimate(Made("attention_forward", FORWARD_TILE, {"FMNMX": 1}), ROOFLINE, 2, rope=False)
    assert idle.bound_by == "matrix" and idle.overlapped_ms < estimate.overlapped_ms
    # the matrix unit alone: the roofline over the work efficiency
    programs = ROOFLINE.B * ROOFLINE.Hkv * 8192 // 32
    expected = 0.52 / idle.efficiency * model.wave_factor(programs, 132)
    assert idle.overlapped_ms == pytest.approx(expected, rel=0.01)


def test_every_pipe_has_a_remedy():
    assert set(model.REMEDIES) == {"matrix", "issue", "alu", "fma", "mufu", "shared", "l2", "memory"}


def test_deviation_from_published_figures_is_that_of_the_same_flops():
    made = Made("attention_forward", {**FORWARD_TILE, "PACK": 1}, {"FMNMX": 1})
    estimate = model.attention_estimate(made, published.PUBLISHED_SHAPE, 2, rope=False)
    rows = published.compare_published({("sm_90", "attention_forward"): estimate})
    assert {row["pass"] for row in rows} == {"forward"} and len(rows) == 4
    for row in rows:
        assert row["overlapped_off"] == pytest.approx(row["overlapped_tflops"] / row["published_tflops"] - 1)
        # nothing but the matrix unit: below its peak by the wasted part of the diagonal only
        assert 0.9 * 989 < row["overlapped_tflops"] < 989


# Decoding and the rotation: latency, bytes under way, programs that take turns
H100 = CARDS["sm_90"]
NEEDED = 3350 / 1.83 / 132 * LATENCY_CYCLES  # bytes for each multiprocessor


class MadeWithoutMask:
    """A kernel as if compiled, with one loop."""

    target, matrix, kernel = "sm_90", ("HMMA",), "rope"

    def __init__(self, tile, instructions=400, blocks=2):
        self.tile, self.instructions, self.blocks_per_multiprocessor = tile, instructions, blocks
        self.loops = (Loop(False, instructions, {"alu": instructions}, {"FMNMX": instructions}, {}),)


def decoding(keys=64, stages=3, blocks=2, instructions=300):
    tile = {"BLOCK_M": 16, "BLOCK_N": keys, "num_warps": 4, "num_stages": stages}
    return MadeWithoutMask(tile, instructions, blocks)


def rotation(tokens=16, blocks=8, instructions=500):
    return MadeWithoutMask({"BLOCK_T": tokens, "BLOCK_H": 4, "num_warps": 4}, instructions, blocks)


def test_bandwidth_needs_bytes_under_way():
    assert bandwidth_share(NEEDED, H100) == pytest.approx(1)
    assert bandwidth_share(NEEDED / 4, H100) == pytest.approx(1 / 4) and bandwidth_share(9 * NEEDED, H100) == 1


MANY, FEW = Shape(64, 32, 8, 4096, 128, 4096), Shape(1, 32, 8, 256, 128, 256)


def test_a_large_batch_decodes_at_the_memorys_speed():
    best = model.decode_bytes(MANY, 2) / H100.bytes_per_second * 1e3
    assert decode_estimate(decoding(), MANY, 2).memory_ms == pytest.approx(best)
    assert decode_ms(decoding(), MANY, 2) == pytest.approx(best, rel=0.01)
    # one program with one tile of 16 keys on its way has 8 kB, too few: 4 waves of 256 tiles, each after a latency
    expected = 4 * (256 + model.STARTING_READS) * LATENCY_CYCLES / 1.83e6
    too_few = decode_ms(decoding(keys=16, stages=2, blocks=1), MANY, 2)
    assert too_few == pytest.approx(expected) and too_few > 1.5 * best
    # and code that takes longer than its tile's bytes
    assert decode_ms(decoding(instructions=30000), MANY, 2) > 3 * best


def test_a_single_sequence_decodes_in_latencies():
    """One program for each KV head and part, far fewer than places: each waits for its reads, one after the other."""
    ms = decode_ms(decoding(), FEW, 2)
    at_least = model.STARTING_READS * LATENCY_CYCLES / 1.83e6
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
    assert rope_estimate(rotation(instructions=50000), shape, 2).bound_by == "issue"


def test_with_a_norm_the_backward_also_reads_q_and_k_and_a_row_of_sums_a_program():
    shape, made = Shape(4, 32, 8, 8192, 128, None), rotation()
    made.kernel = "norm_rope"
    forward = rope_estimate(made, shape, 2).memory_ms
    made.kernel = "norm_rope_backward"
    sums = 4 * 8192 // 16 * (8 + 2) * 128 * 8 / H100.bytes_per_second * 1e3
    assert forward == rope_estimate(rotation(), shape, 2).memory_ms
    assert rope_estimate(made, shape, 2).memory_ms == pytest.approx(forward * 3 / 2 + sums)

"""The model of a kernel's speed: its formulas against counting, hand calculation and published rooflines."""

import memory_bound
import published
import pytest
import speed_of_light as model
import torch
import triton
import triton.language as tl
import tune_tiles
from kernels.machine_code import Loop
from kernels.tuning import TileConfig
from speed_of_light import CARDS, Shape
from tile_candidates import candidates

from kernels import tiles, tuning

ROOFLINE = Shape(4, 32, 8, 8192, 128, 1024)


@pytest.mark.parametrize(("T", "W"), [(1, 1), (7, 3), (7, 7), (7, 100), (64, 16)])
def test_visible_pairs_are_those_of_the_definition(T, W):
    seen = sum(1 for query in range(T) for key in range(T) if query - W < key <= query)
    assert model.visible_pairs(T, W) == seen


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
        tile = tuning.tile_config(name, 128, torch.bfloat16, arch)
        assert round(model.work_efficiency(8192, W, tile.own, tile.edge, tile.step, pack=4), 2) >= least


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
    flops = 2 * 2 * ROOFLINE.B * ROOFLINE.Hq * model.visible_pairs(8192, 1024) * 128
    assert flops / card.flops * 1e3 == pytest.approx(forward_ms, rel=0.01)
    assert model.attention_bytes("attention_forward", ROOFLINE, 2, rope=False) == pytest.approx(675e6, rel=0.01)
    assert memory_bound.rope_bytes(ROOFLINE, 2) / card.bytes_per_second * 1e3 == pytest.approx(rope_ms, rel=0.02)
    step = Shape(64, 32, 8, 4096, 128, 4096)
    assert memory_bound.decode_bytes(step, 2) / card.bytes_per_second * 1e3 == pytest.approx(decode_ms, rel=0.01)


class Made:
    """A kernel as if compiled: loops of given opcodes."""

    def __init__(self, kernel, tile, opcodes, target="sm_90", blocks=1):
        self.kernel, self.tile, self.target, self.instructions = kernel, tile, target, 2000
        self.matrix, self.blocks_per_multiprocessor = ("HGMMA",), blocks
        pipes = {"alu": opcodes.get("FMNMX", 0), "mufu": opcodes.get("MUFU.EX2", 0)}
        self.loops = tuple(Loop(masked, sum(opcodes.values()), pipes, opcodes, {}) for masked in (True, False))


FORWARD_TILE = {"PACK": 4, "BLOCK_M": 128, "EDGE_K": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}


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
    estimate = model.attention_estimate(made, published.SHAPE, 2, rope=False)
    rows = published.compare({("sm_90", "attention_forward"): estimate})
    assert {row["pass"] for row in rows} == {"forward"} and len(rows) == 4
    for row in rows:
        assert row["overlapped_off"] == pytest.approx(row["overlapped_tflops"] / row["published_tflops"] - 1)
        # nothing but the matrix unit: below its peak by the wasted part of the diagonal only
        assert 0.9 * 989 < row["overlapped_tflops"] < 989


CELL = tune_tiles.Cell("sm_90", "forward", torch.bfloat16, 128)


def test_the_search_takes_the_best_of_those_that_do_not_spill(monkeypatch):
    fast, good, slow = (TileConfig(128, 32, step, 8, 2) for step in (128, 64, 32))
    ms = {fast: 1.0, good: 2.0, slow: 3.0}

    def spilled(config, features):  # the fastest spills only where there is everything
        return 40 if config == fast and features.get("softcap") else 0

    class Compiled:
        def __init__(self, config, features):
            self.spilled_bytes, self.stack_bytes, self.blocks_per_multiprocessor = spilled(config, features), 0, 1

    monkeypatch.setattr(tune_tiles, "candidates", lambda *cell: [fast, good])
    monkeypatch.setattr(tune_tiles, "tile_config", lambda *cell: slow)  # what the table has
    monkeypatch.setattr(tune_tiles, "weigh", lambda cell, config: tune_tiles.Candidate(config, 0, True, ms[config]))
    monkeypatch.setattr(tune_tiles, "compiled", lambda cell, config, features: Compiled(config, features))
    chosen, tried = tune_tiles.choose(CELL)
    assert chosen.config == good and [one.config for one in tried] == [slow, fast, good]
    ms[slow] = 2.4  # not a quarter worse: it stays
    assert tune_tiles.choose(CELL)[0].config == slow
    monkeypatch.setattr(tune_tiles, "weigh", lambda cell, config: tune_tiles.Candidate(config, 0, False, 1.0))
    with pytest.raises(ValueError, match="no candidate fits Cell"):
        tune_tiles.choose(CELL)


def test_several_programs_on_a_multiprocessor_come_nearer_to_the_overlapped_bound():
    one, four = (Made("attention_forward", FORWARD_TILE, {"FMNMX": 300}, blocks=blocks) for blocks in (1, 4))
    assert tune_tiles.expected_ms(four, CELL) < tune_tiles.expected_ms(one, CELL)


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_candidates_can_be_tiles(head_dim, element_bytes):
    for name in tune_tiles.KERNELS:
        found = candidates(name, head_dim, element_bytes)
        assert len(found) == len(set(found)) > 3
        for config in found:
            assert all(number & (number - 1) == 0 for number in config[:4]) and config.step % config.edge == 0
            assert name == "rotary" or min(config.own, config.edge) >= 16  # what a matrix product takes


def test_bad_entries_are_named():
    with pytest.raises(ValueError, match="head size 257 is past 256"):
        candidates("forward", 257, 2)
    with pytest.raises(ValueError, match="there is no pass 'sideways'"):
        candidates("sideways", 64, 2)


def test_a_decode_tile_is_checked_with_all_its_rows_and_both_16_bit_dtypes():
    checks = tune_tiles.checks(CELL._replace(name="decode"))
    assert {cell.dtype for cell, _ in checks} == {torch.bfloat16, torch.float16}
    assert [features for cell, features in checks if cell.dtype == torch.bfloat16] == [tune_tiles.EVERYTHING, {}]
    assert len(tune_tiles.checks(CELL._replace(target="sm_86", dtype=torch.float32))) == 1


def test_the_table_is_rewritten_as_code():
    row = {"target": "sm_90", "pass": "forward", "dtype": "bf16", "config": [64, 16, 32, 4, 5]}
    rows = [{**row, "head_dim": 96}, {**row, "head_dim": 128}]
    source = "before = 1\nCONFIGS = {\n    (1, 2): {},\n}\nafter = 2\n"
    text = tune_tiles.rewritten(source, rows)
    found = dict(vars(tuning))
    exec(text, found)
    assert found["before"] == 1 and found["after"] == 2
    changed = found["CONFIGS"]["forward", 2][90]
    assert changed[128] == TileConfig(64, 16, 32, 4, 5) and 96 not in changed  # the same as for 128
    # whatever the rows did not name is looked up as before, for all families and head sizes
    for key, by_family in tuning.CONFIGS.items():
        for family in tuning.FAMILIES:
            for head_dim in tune_tiles.HEAD_DIMS:
                before = tune_tiles.in_table(by_family, family, head_dim)
                after = tune_tiles.in_table(found["CONFIGS"][key], family, head_dim)
                named = (*key, family) == ("forward", 2, 90) and head_dim in (96, 128)
                assert after == (TileConfig(64, 16, 32, 4, 5) if named else before)


def test_a_family_like_its_kin_has_no_tiles_of_its_own():
    ampere = {head_dim: tune_tiles.in_table(tuning.CONFIGS["dq", 2], 80, head_dim) for head_dim in tune_tiles.HEAD_DIMS}
    rows = [
        {"target": target, "pass": "dq", "dtype": "bf16", "config": list(ampere[head_dim]), "head_dim": head_dim}
        for target in ("sm_90", "sm_100") for head_dim in ampere
    ]  # fmt: skip
    found = dict(vars(tuning))
    exec(tune_tiles.rewritten("CONFIGS = {\n}\n", rows), found)
    assert not {90, 100} & found["CONFIGS"]["dq", 2].keys()
    with pytest.raises(ValueError, match="has no table"):
        tune_tiles.rewritten("CONFIG = 1", rows)

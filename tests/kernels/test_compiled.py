"""Kernels as machine code, without a GPU: no shipped tile spills, products are matrix instructions, loads are wide.

They are compiled in a separate process, since this one interprets kernels.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernels import compiled
from kernels.compiled import machine_code
from kernels.compiled.machine_code import Branch, innermost_loops

ROOT = Path(__file__).parents[2]
MATRIX = {"sm_80": ["HMMA"], "sm_90": ["HGMMA"]}
OF_KEYS = {"v_scale", "scores"}  # `scores *= load of the keys' scales`
WITH_PRODUCTS = {"attention_forward", "attention_dq", "attention_dkdv", "decode"}
COMPILE = """
import json, torch
from kernels import compiled
from kernels.compiled.machine_code import Branch, innermost_loops
from kernels.compiled.ptx import parse
from kernels.backends.triton import attend, attend_backward
from kernels.backends.triton.tile_configs import RowTile

def ptx_loops(text):
    # the opcodes, in order, of the innermost loops that multiply matrices
    program = parse(text)
    code = program.instructions
    jumps = [(at, one) for at, one in enumerate(code) if one.opcode.startswith("bra")]
    branches = [Branch(at, program.labels[one.operands[0].name], one.guard is not None) for at, one in jumps]
    found = innermost_loops(len(code), branches, lambda loop: any("mma" in code[i].opcode for i in loop))
    return [[code[i].opcode for i in loop] for loop in found]

def report(launch, target, D, variant):
    made = compiled.compile_launch(launch, target)._asdict() | {"D": D, "variant": variant}
    tiles = [one for one in made["accesses"] if one.kind != "store" and not one.of_rows]
    made["narrow"] = [tuple(one) for one in tiles if one.bytes < 16]
    made["loops"] = [loop._asdict() for loop in made["loops"]]
    made["ptx_loops"] = ptx_loops(made["ptx"])
    del made["binary"], made["ptx"]
    print(json.dumps(made))

everything = dict(sinks=True, softcap=20.0, grad_lse=True)
variants = {"all": dict(rope=True, **everything), "half": dict(half_rope=True, **everything), "plain": {}}
for D, dtype in ((128, torch.bfloat16), (72, torch.float16)):
    for target in ("sm_80", "sm_90"):
        for launch in compiled.launches(target, head_dim=D, dtype=dtype, norm=True):
            if launch.name.startswith("norm_rope"):
                report(launch, target, D, "norm")
for target in ("sm_80", "sm_90"):
    for D, variant in ((128, "all"), (64, "plain")):
        for launch in compiled.launches(target, head_dim=D, dtype=torch.bfloat16, int8=True, **variants[variant]):
            if launch.name in ("append", "decode"):
                report(launch, target, D, variant + ", int8")
variants |= {name + ", documents": dict(starts=True, **variants[name]) for name in variants}
attention = ("attention_forward", "attention_dq", "attention_dkdv")
for target in ("sm_80", "sm_90"):
    for D, name in ((128, "half"), (128, "plain"), (64, "all")):
        for variant in (name, name + ", documents"):
            for launch in compiled.launches(target, head_dim=D, dtype=torch.bfloat16, **variants[variant]):
                if launch.name in attention or variant in ("half", "all"):
                    report(launch, target, D, variant)
# shapes that took a way of their own: Phi-4-mini's rotation of 96 of 128 elements where shared memory is scarce, heads
# of 72, and a single key whose position stride is 1
for target, D, R, T, k_strides in (("sm_86", 128, 96, 256, None), ("sm_90", 72, 0, 256, None),
                                   ("sm_90", 64, 0, 1, (128, 64, 1, 1))):
    q = torch.empty(1, T, 8, D, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    k = torch.empty_strided((1, 2, T, D), k_strides or (2 * T * D, D, 2 * D, 1), dtype=q.dtype, device="meta")
    rope = (torch.empty(T, R // 2, device="meta"),) * 2 if R else None
    with compiled.recorded(target) as found:
        out, lse = attend(q, k, k, 128, scale=1.0, rope=rope)
        attend_backward(out, lse, q, k, k, out, lse, 128, scale=1.0, rope=rope)
    for launch in {launch.name: launch for launch in found}.values():
        report(launch, target, D, "special")
# one that is known not to fit into registers
too_large = {"forward": RowTile(128, 64, 64, 4, 2)}
launch = compiled.launches("sm_80", head_dim=128, dtype=torch.bfloat16, configs=too_large)[0]
made = compiled.compile_launch(launch, "sm_80")
print(json.dumps({"kernel": "too large", "spilled_bytes": made.spilled_bytes, "stack_bytes": made.stack_bytes}))
"""

LAUNCH = """
import json, sys, torch, triton
from kernels import compiled

slow = type(triton.cdiv).__call__.__code__
calls = []
def profile(frame, event, argument):
    if event == "call" and frame.f_code is slow:
        calls.append(frame.f_back.f_code.co_name)

for times in range(2):
    sys.setprofile(profile if times else None)
    compiled.launches("sm_90", head_dim=128, dtype=torch.bfloat16, rope=True)
sys.setprofile(None)
triton_code = type(triton.cdiv).__module__
print(json.dumps([triton_code, calls]))
"""


def run_compiled(code):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def all_made():
    return run_compiled(COMPILE)


@pytest.fixture(scope="module")
def shipped(all_made):
    return [made for made in all_made[:-1] if made["variant"] != "special"]


@pytest.fixture(scope="module")
def special(all_made):
    return [made for made in all_made[:-1] if made["variant"] == "special"]


def named(made):
    return made["target"], made["kernel"], made["D"], made["variant"]


@pytest.mark.skipif(metadata.version("triton") < "3.7", reason="Triton 3.7 chose the tiles; 3.6 needs more registers")
def test_no_shipped_tile_spills(shipped):
    assert not [
        (named(made), made["spilled_bytes"]) for made in shipped if made["spilled_bytes"] or made["stack_bytes"]
    ]


def test_a_tile_that_spills_is_seen(all_made):
    assert all_made[-1]["kernel"] == "too large"
    assert all_made[-1]["spilled_bytes"] > 0 and all_made[-1]["stack_bytes"] > 0


def test_every_kernel_was_compiled_and_fits(shipped):
    everything = {*WITH_PRODUCTS, "rope", "norm_rope", "norm_rope_backward", "append", "combine"}
    assert {(made["target"], made["kernel"]) for made in shipped} == {(t, k) for t in MATRIX for k in everything}
    assert not [named(made) for made in shipped if made["blocks_per_multiprocessor"] < 1]


def test_a_rotation_of_three_quarters_of_the_head_fits(special):
    """Its backward would have tiles of 256 columns, 131,072 bytes in the memory of a card that has 101,376."""
    found = [made for made in special if made["target"] == "sm_86"]
    assert {made["kernel"] for made in found} == {"rope", "attention_forward", "attention_dq", "attention_dkdv"}
    assert all(made["blocks_per_multiprocessor"] >= 1 and not made["spilled_bytes"] for made in found)


def test_heads_of_72_are_loaded_16_bytes_a_thread(special):
    found = [made for made in special if made["D"] == 72]
    assert len(found) == 3 and not [(named(made), made["narrow"]) for made in found if made["narrow"]]


def test_a_position_stride_of_one_compiles(special):
    assert len([made for made in special if made["D"] == 64]) == 3


def test_products_run_on_the_matrix_unit(shipped):
    for made in shipped:
        if made["kernel"] in WITH_PRODUCTS:
            # 16 rows are too few for Hopper's warp-group instruction, which takes 64
            wanted = ["HMMA"] if made["kernel"] == "decode" else MATRIX[made["target"]]
            assert made["matrix"] == wanted, named(made)


def test_tiles_are_loaded_16_bytes_a_thread(shipped):
    """But for the weights of a norm, which lie in another tile's layout, and the scales of int8, one number a key."""
    for made in shipped:
        narrow = {what for what, *_ in made["narrow"]}
        assert narrow <= OF_KEYS if "int8" in made["variant"] else not narrow or made["variant"] == "norm", named(made)
    for made in shipped:  # and their names are known, so that none slips through
        assert all(what for what, kind, *_ in made["accesses"]), named(made)


def test_there_is_one_masked_loop_and_one_without_a_mask(shipped):
    for made in shipped:
        if made["kernel"] in WITH_PRODUCTS:
            assert [loop["masked"] for loop in made["loops"]] == [True, False], named(made)
            compares = sum(n for name, n in made["loops"][1]["opcodes"].items() if name.startswith("ISETP"))
            # of the loop's own counter and its copies, and of the ring's end
            assert compares <= (12 if made["kernel"] == "decode" else 4), named(made)


def test_rings_of_int8_are_read_and_written_as_int8(shipped):
    """16 bytes a thread, which are 16 elements: as many copies as in bf16 for twice the elements."""
    for made in (made for made in shipped if made["variant"].endswith(", int8")):
        own = [access for access in made["accesses"] if access[0] in ("k", "v")]
        if made["kernel"] == "decode":
            assert {access[0] for access in own} == {"k", "v"} and all(access[2] == 16 for access in own), named(made)


def test_documents_cost_the_interior_nothing(shipped):
    """What they add is before the loops: the interior's PTX is the same, opcode for opcode.

    Copies of registers in the machine code differ by up to 2 % here, as the allocation falls out.
    """
    with_documents = [made for made in shipped if made["variant"].endswith(", documents")]
    assert len(with_documents) == 2 * 3 * 3
    for made in with_documents:
        without = next(
            m for m in shipped if named(m) == (*named(made)[:3], made["variant"].removesuffix(", documents"))
        )
        assert made["ptx_loops"][1] == without["ptx_loops"][1] != [], named(made)
        assert made["ptx_loops"][0] != without["ptx_loops"][0], named(made)
        loops = made["loops"][1], without["loops"][1]
        assert abs(loops[0]["instructions"] / loops[1]["instructions"] - 1) <= 0.02, named(made)
        for pipe in ("matrix", "mufu", "global"):
            assert loops[0]["pipes"].get(pipe) == loops[1]["pipes"].get(pipe), (named(made), pipe)


def test_launchers_ask_none_of_the_kernels_arithmetic():
    """triton.cdiv and its like unwrap constants first, which costs the host time in every launch."""
    assert run_compiled(LAUNCH) == [["triton.runtime.jit", []]]


@pytest.mark.parametrize(("target", "most"), [("sm_80", 515), ("sm_90", 350)])
def test_the_forwards_interior_is_short(shipped, target, most):
    forward = [m for m in shipped if named(m) == (target, "attention_forward", 128, "plain")]
    interior, tile = forward[0]["loops"][1], forward[0]["tile"]
    assert tile["BLOCK_M"] == 16 * tile["num_warps"] and tile["BLOCK_N"] == 64  # as many scores a thread on both
    assert interior["instructions"] <= most


def test_an_unknown_architecture_is_named_with_those_possible():
    with pytest.raises(ValueError, match=r"architecture 'sm_70' is not one .* wanted one of sm_80, .*sm_90"):
        compiled.card_of("sm_70")


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
def test_interpreted_kernels_are_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1: record and compile in a process without it"):
        compiled.launches("sm_90", head_dim=64, dtype=torch.float16)


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "expected"),
    [
        ("sm_80", 128, 8, 0, (2, "registers")),  # 65,536 / (128 x 32 x 8)
        ("sm_80", 129, 8, 0, (1, "registers")),  # registers come in eights
        ("sm_80", 32, 4, 80 << 10, (2, "shared memory")),
        ("sm_80", 32, 4, 82 << 10, (1, "shared memory")),  # 1 kB of each block is CUDA's: 2 x 83 > 164
        ("sm_86", 32, 4, 100 << 10, (0, "shared memory")),
        ("sm_90", 16, 1, 0, (32, "blocks")),
        ("gfx942", 128, 4, 0, (4, "registers")),
    ],
)
def test_resident_blocks(target, registers, warps, shared, expected):
    assert compiled.resident_blocks(compiled.CARDS[target], registers, warps, shared) == expected


def test_a_jump_back_from_code_behind_the_end_is_no_loop():
    """0; 1: loop of 1 .. 4, whose 3 may leave to wait at 6 .. 7, which loops on 6 and comes back to 4."""
    branches = [
        Branch(3, 6, conditional=True),
        Branch(4, 1, conditional=True),
        Branch(5, None, conditional=False),
        Branch(6, 6, conditional=True),
        Branch(7, 4, conditional=False),
    ]
    assert innermost_loops(8, branches) == [[6]]
    assert innermost_loops(8, branches, lambda loop: len(loop) > 1) == [[1, 2, 3, 4, 6, 7]]
    # without the loop over 1 .. 4, the jump from 7 back to 4 makes none
    assert innermost_loops(8, [b for b in branches if b.at not in (4, 6)]) == []


SASS = """
	//## File "/somewhere/kernels/{file}", line {line}
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDS.128 R4, [R2] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/                   STL.64 [R1], R4 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
"""
PTX = """
	.loc	1 {load} 5                         // attention_forward.py:{load}:5
	@%p1 ld.global.v4.b32 {{ %r1, %r2, %r3, %r4 }}, [ %rd1 + 0 ];
	cp.async.ca.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x4, %r5;
	st.global.b16 [ %rd1 + 0 ], {{ %rs1 }};
"""


@pytest.mark.parametrize("masked", [True, False])
def test_machine_code_is_read(masked):
    def line_of(name, text):
        lines = (ROOT / "kernels" / "backends" / "triton" / name).read_text().splitlines()
        return next(i for i, line in enumerate(lines, 1) if text in line)

    line = line_of("tiles.py", "return (k_pos <= q_pos)" if masked else "rescale = tl.exp2(")
    load = line_of("attention_forward.py", "q = load_rotated(")
    sass = SASS.format(file="tiles.py", line=line)
    found = machine_code.read_cuda(sass, "REG:40 STACK:8 SHARED:16 LOCAL:0", PTX.format(load=load))
    assert (found.registers, found.stack_bytes, found.static_shared_bytes, found.instructions) == (40, 8, 16, 6)
    assert found.spilled_bytes == 8 and found.matrix == ("HMMA",)
    (loop,) = found.loops
    assert loop.masked == masked and loop.instructions == 4
    assert loop.pipes == {"matrix": 1, "shared": 1, "global": 1, "control": 1}
    assert loop.opcodes["HMMA.16816.F32.BF16"] == 1 and next(iter(loop.lines.values())) == 4
    assert [access[:4] for access in found.accesses] == [
        ("q", "load", 16, 1),
        ("q", "copy", 4, 1),
        ("q", "store", 2, 1),
    ]

"""The emulator finds faults: small programs in PTX with one mistake each, and mutants of the compiled kernels.

`python tests/kernels/test_emulator.py sm_90 100` makes every mutant (100 of a kind at most) of every attention kernel
and prints how many of each kind were found: the table of docs/kernels.md.
"""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", minversion="3.7")  # 3.6 makes other PTX

from kernels.compiled import Fault, UnknownOpcode, emulated
from kernels.compiled.counts import Counter
from kernels.compiled.emulate import code_of
from kernels.compiled.emulate import run as run_grid

ROOT = Path(__file__).parents[2]
DECLARATIONS = """
.visible .entry small_kernel(.param .u64 .ptr .global .align 1 p_0, .param .u64 .ptr .global .align 1 p_1)
.reqntid 64
{ .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .b64 %rd<9>;
  ld.param.b64 %rd1, [p_0];  ld.param.b64 %rd2, [p_1];
  mov.u32 %r1, %tid.x;  shl.b32 %r2, %r1, 2;  cvt.u64.u32 %rd3, %r2;
  add.s64 %rd1, %rd1, %rd3;  add.s64 %rd2, %rd2, %rd3;
  mov.b32 %r3, global_smem;  add.s32 %r3, %r3, %r2;
"""
# out[i] = in[i ^ 32]: the two warps exchange what they hold through shared memory, with a copy or with a store
COPY = """
  cp.async.ca.shared.global [%r3], [%rd1], 4, 4;
  cp.async.commit_group;
  cp.async.wait_group 0;
"""
STORE = """
  ld.global.b32 %r5, [%rd1 + 0];
  st.shared.b32 [%r3 + 0], %r5;
"""
EXCHANGE = """
  bar.sync 0;
  xor.b32 %r4, %r3, 128;
  ld.shared.b32 %r6, [%r4 + 0];
  st.global.b32 [%rd2], %r6;
  ret; }
"""


def run(body, inputs=None, grid=1, **options):
    given = torch.arange(64, dtype=torch.int32) if inputs is None else inputs
    result = torch.full((64,), -1, dtype=torch.int32)
    parameters = [("in", "*i32", given), ("out", "*i32", result)]
    run_grid(code_of(DECLARATIONS + body), grid, parameters, shared_bytes=256, **options)
    return result


@pytest.mark.parametrize("first", [COPY, STORE])
def test_two_warps_exchange_through_shared_memory(first):
    assert run(first + EXCHANGE).tolist() == [i ^ 32 for i in range(64)]


NO_BARRIER = "warps 0 and 1 write and read the same shared memory with no barrier between"
BARRIER, SOME = "  bar.sync 0;", "  setp.lt.u32 %p1, %r1, 16;"  # half of the first warp
FAULTS = {  # fault: (program, text, what takes its place, what the fault says)
    "a barrier left out": (STORE, BARRIER, "", NO_BARRIER),
    "a wait left out": (COPY, "  cp.async.wait_group 0;", "", "read before the asynchronous copy"),
    "a commit left out": (COPY, "  cp.async.commit_group;", "", "read before the asynchronous copy"),
    "a wait for all but one": (COPY, "wait_group 0", "wait_group 1", "read before the asynchronous copy"),
    "a store left out": (STORE, "  st.shared.b32 [%r3 + 0], %r5;", "", "never written"),
    "a word past the end": (STORE, "[%r4 + 0]", "[%r4 + 128]", "not in the 256 bytes of shared memory"),
    "a misaligned word": (STORE, "[%r4 + 0]", "[%r4 + 2]", "is not a multiple of 4 bytes"),
    "an element past the tensor": (STORE, "[%rd1 + 0]", "[%rd1 + 4]", "in no tensor: nearest is in, .* offset 256"),
    "an element before the tensor": (STORE, "[%rd1 + 0]", "[%rd1 + -4]", "in no tensor: nearest is in, .* offset -4"),
    "one word for all": (STORE, "[%r3 + 0]", "[global_smem + 0]", "two warps write different values into the same"),
    "half of a warp at a barrier": (STORE, BARRIER, SOME + "@%p1 bar.sync 0;", "threads of one warp part ways"),
    "half of a warp at a branch": (
        STORE,
        BARRIER,
        SOME + "@%p1 bra L; L: bar.sync 0;",
        "threads of one warp part ways",
    ),
    "one warp at a barrier": (STORE, BARRIER, "  setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 0;", NO_BARRIER[-18:]),
    "a warp that has ended": (
        STORE,
        BARRIER,
        "  setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;",
        "after another has ended",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault):
    first, text, replacement, message = FAULTS[fault]
    assert (first + EXCHANGE).count(text) == 1
    with pytest.raises(Fault, match=message):
        run((first + EXCHANGE).replace(text, replacement))


def test_gaps_between_the_rows_of_a_tensor_are_not_part_of_it():
    padded = torch.arange(128, dtype=torch.int32).reshape(2, 64)
    assert run(STORE + EXCHANGE, padded[:, :64]).tolist() == [i ^ 32 for i in range(64)]
    with pytest.raises(Fault, match="is in no tensor"):
        run(STORE + EXCHANGE, padded[:, :62])


def test_programs_may_not_write_the_same_elements():
    with pytest.raises(Fault, match="two programs write the same elements of out"):
        run(STORE + EXCHANGE, grid=2)


def test_a_program_can_be_watched():
    """What the first lane holds after each instruction of one line of the source."""
    seen = []

    def watch(machine, instruction):
        if instruction.source.startswith("kernel.py:7:"):
            seen.append((instruction.opcode, int(machine.registers["%r6"][0, 0])))

    marked = EXCHANGE.replace("  ld.shared", "  .loc 1 7 3  // kernel.py:7:3\n  ld.shared")
    run(STORE + marked.replace("  st.global", "  .loc 1 8 3  // kernel.py:8:3\n  st.global"), watch=watch)
    assert seen == [("ld.shared.b32", 32)]


def test_instructions_wavefronts_sectors_and_bytes_are_counted():
    counter = Counter()
    run(STORE + EXCHANGE, counter=counter)
    counts = counter.kernels["small"]
    assert counts.opcodes["ld.shared.b32"] == 64 and counts.kinds()["shared"] == 128
    assert counts.wavefronts == {"st": 2, "ld": 2} and not counts.conflicts.total()
    assert counts.sectors == counts.least_sectors == 16
    assert counts.bytes_read == {"in": 256} and counts.bytes_written == {"out": 256}

    # the lanes of a warp read words that lie 8 apart, two in each of 4 banks; and every second element of a tensor
    strided = """mul.lo.s32 %r5, %r1, 4; cvt.u64.u32 %rd4, %r5; add.s64 %rd4, %rd4, %rd1; ld.global.b32 %r6, [%rd4];
        st.shared.b32 [%r3], %r6; bar.sync 0; shl.b32 %r7, %r1, 5; and.b32 %r7, %r7, 255;
        mov.b32 %r8, global_smem; add.s32 %r8, %r8, %r7; ld.shared.b32 %r9, [%r8]; ret; }"""
    counter = Counter()
    run(strided, torch.arange(128, dtype=torch.int32), counter=counter)
    counts = counter.kernels["small"]
    assert (counts.wavefronts["ld"], counts.conflicts["ld"]) == (4, 2)
    assert (counts.sectors, counts.least_sectors) == (16, 8)


def test_an_unknown_instruction_is_named():
    with pytest.raises(UnknownOpcode, match=r"does not know sad\.u32: sad\.u32 %r5, %r1, %r1, %r1"):
        run(STORE + "sad.u32 %r5, %r1, %r1, %r1;" + EXCHANGE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
def test_interpreted_kernels_are_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1: emulate in a process without it"), emulated("sm_90"):
        pass


def float_bits(x):
    return int(np.float32(x).view(np.uint32))


NAN, ONE = 0x7FC00000, float_bits(1)
ARITHMETIC = [  # opcode, sources, result: those of PTX that NumPy or Python would do otherwise
    ("div.s32", (-7, 2), -3),
    ("rem.s32", (-7, 2), -1),
    ("shl.b32", (1, 32), 0),
    ("shr.s32", (-8, 99), -1),
    ("shr.u32", (-1, 31), 1),
    ("bfe.u32", (0x12345678, 8, 12), 0x456),
    ("bfe.s32", (0x00000F00, 8, 4), -1),
    ("bfi.b32", (0xFF, 0x12345678, 8, 4), 0x12345F78),
    ("prmt.b32", (0x33221100, 0x77665544, 0x7410), 0x77441100),
    ("prmt.b32", (0x000000F0, 0, 0x8888), 0xFFFFFFFF),
    ("lop3.b32", (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA, 0x96), 0x96969696),
    ("min.relu.s32", (-5, 3), 0),
    ("mul.hi.u32", (0x80000000, 6), 3),
    ("mul.hi.s32", (-1, 5), -1),
    ("shf.l.wrap.b32", (0x80000000, 1, 33), 3),
    ("shf.r.wrap.b32", (2, 1, 1), 0x80000001),
    ("max.f32", (NAN, ONE), ONE),
    ("ex2.approx.ftz.f32", (float_bits(-140.0),), 0),
    ("fma.rn.f32", (float_bits(1 + 2**-12), float_bits(1 + 2**-12), float_bits(-1 - 2**-11)), float_bits(2**-24)),
    ("cvt.rn.bf16x2.f32", (float_bits(1.0), float_bits(1 + 2**-8)), 0x3F803F80),  # a tie to even
    ("cvt.rn.bf16x2.f32", (float_bits(1 + 3 * 2**-8), NAN), 0x3F827FFF),
    ("cvt.rna.tf32.f32", (float_bits(1 + 2**-11),), float_bits(1 + 2**-10)),  # a tie away from zero
    ("cvt.rzi.s32.f32", (float_bits(-2.9),), -2),
    ("cvt.rzi.s32.f32", (float_bits(1e20),), 0x7FFFFFFF),
]


@pytest.mark.parametrize("opcode, sources, result", ARITHMETIC)
def test_arithmetic_is_that_of_the_isa(opcode, sources, result):
    operands = ", ".join(f"%r{10 + i}" for i in range(len(sources)))
    moves = "".join(f"mov.b32 %r{10 + i}, {source};" for i, source in enumerate(sources))
    found = run(f"{moves} {opcode} %r5, {operands}; st.global.b32 [%rd2], %r5; ret; }}")
    assert (found.numpy().view(np.uint32) == np.uint32(result & 0xFFFFFFFF)).all()


def test_narrow_integers_are_the_lower_bits_of_a_register_and_keep_their_sign():
    body = """mov.b32 %r5, 511; cvt.s8.s32 %rs1, %r5; cvt.s16.s8 %rs2, %rs1; mul.hi.s16 %rs3, %rs2, 16384;
        cvt.u32.u16 %r6, %rs2; cvt.s32.s16 %r7, %rs3; add.s32 %r6, %r6, %r7; st.global.b32 [%rd2], %r6; ret; }"""
    assert (run(body) == 0xFFFF - 1).all()  # 511 is -1 in 8 bits; (-1 * 16384) >> 16 is -1


def test_numbered_registers_of_a_block_are_its_own():
    """As Triton converts four bytes of int8: 0x01FE0380 is -128, 3, -2, 1."""
    body = """mov.b32 %r5, 0x01FE0380; { .reg .s8 s<4>; .reg .f32 f<4>; mov.b32 {s0, s1, s2, s3}, %r5;
        cvt.rn.f32.s8 f0, s0; cvt.rn.f32.s8 f2, s2; add.f32 f3, f0, f2; mov.b32 %r6, f3;
        cvt.rn.f16.s8 %rs1, s1; mov.b32 %r7, {%rs1, %rs1}; }
        st.global.b32 [%rd2], %r6; ret; }"""
    assert (run(body).numpy().view(np.float32) == -130).all()
    assert (run(body.replace("%r6; ret", "%r7; ret")).numpy().view(np.float16) == 3).all()


def test_halves_are_added_and_multiplied_in_fp32():
    """Mixed precision of sm_100: 1.5 * 1.5 + 3 in one rounding, plus 1.5."""
    body = f"""mov.b16 %rs1, {0x3FC0}; mov.b32 %r5, {float_bits(3)}; fma.rn.f32.bf16 %r6, %rs1, %rs1, %r5;
        add.f32.bf16 %r6, %rs1, %r6; st.global.b32 [%rd2], %r6; ret; }}"""
    assert (run(body).numpy().view(np.float32) == 6.75).all()


@pytest.mark.parametrize(
    "instruction, lanes",
    [
        ("bfly.b32 %r5, %r1, 1, 31", lambda i: i ^ 1),
        ("idx.b32 %r5, %r1, 3, 31", lambda i: i // 32 * 32 + 3),
        ("idx.b32 %r5, %r1, 3, 6175", lambda i: i // 8 * 8 + 3),  # segments of 8 lanes: 0b11000 << 8 | 31
        ("up.b32 %r5, %r1, 4, 0", lambda i: i - 4 if i % 32 >= 4 else i),
        ("down.b32 %r5, %r1, 4, 31", lambda i: i + 4 if i % 32 < 28 else i),
    ],
)
def test_shuffles(instruction, lanes):
    found = run(f"shfl.sync.{instruction}, -1; st.global.b32 [%rd2], %r5; ret; }}")
    assert found.tolist() == [lanes(i) for i in range(64)]


# Mutants of the compiled kernels: {kind: (pattern, what takes its place, the least part that must be found)}. Of some
# kinds a few are harmless: another barrier or a later wait does what is left out, or no key of the tile is visible.


def without(match):
    return "\n" * match.group().count("\n")


def shifted(match):
    return match.group().replace("+ 0 ]", "+ 32 ]")


def other_swizzle(match):
    bits = int(match.group(2))
    return match.group(1) + str(bits ^ (3 << 62) if bits >> 62 == 1 and not bits >> 61 & 1 else bits ^ (6 << 61))


MUTATIONS = {
    "a barrier removed": (r"\tbar\.sync \t0;", without, 0.3),
    "a wait for copies removed": (r"\tcp\.async\.wait_group \t\d+;", without, 0.3),
    "a group of copies not committed": (r"\tcp\.async\.commit_group;", without, 0.3),
    "a copy removed": (r"\tcp\.async\.c[ag]\.[^;]*;", without, 0.6),
    "a copy from 32 bytes further": (r"(?<=\], )\[ %rd\d+ \+ 0 \](?=, 0x10)", shifted, 0.6),
    "a store to shared memory removed": (r"\tst\.shared[^;]*;", without, 1),
    "a global load from 32 bytes further": (r"ld\.global\.v4\.b32[^;]*\[ %rd\d+ \+ 0 \]", shifted, 1),
    "a global store to 32 bytes further": (r"st\.global\.v4\.b32 \[ %rd\d+ \+ 0 \]", shifted, 1),
    "a matrix product removed": (r"(?:@%p\d+ |\t)(?:mma\.sync|wgmma\.mma|tcgen05\.mma)[^;]*;", without, 0.6),
    "a matrix loaded without its swizzle": (r"(\t)xor(\.b32 \t%r\d+, %r\d+, (?:16|32|64);)", r"\1or\2", 0.3),
    "another swizzle of a descriptor": (r"(or\.b64 \t%rd\d+, %rd\d+, )(46\d{17})", other_swizzle, 0.6),
    "a wait for wgmma removed": (r"\twgmma\.wait_group[^;]*;", without, 0.3),
    "a group of wgmma not committed": (r"\twgmma\.commit_group[^;]*;", without, 0.3),
    # of several before a product, the last: it covers what the others do
    "a proxy fence removed": (
        r"\tfence\.proxy\.async[^;]*;(?=(?:(?!fence\.proxy)[\s\S])*?(?:wgmma|tcgen05)\.mma)",
        without,
        1,
    ),
    "a wait for tcgen05.ld removed": (r"\ttcgen05\.wait::ld[^;]*;", without, 1),
    "a wait for tcgen05.st removed": (r"\ttcgen05\.wait::st[^;]*;", without, 0.3),
    "a tcgen05.commit removed": (r"\t@%p\d+ tcgen05\.commit[^;]*;", without, 1),
    "a wait for an mbarrier removed": (r"\tmbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;", without, 0.3),
}


def mutate(target, most):
    """Prints a line a kernel and kind of mutant: how many were made, and how each was found ("" for not)."""
    from kernels.backends.triton import attend, attend_backward
    from kernels.compiled.memory import MissingFence

    torch.manual_seed(0)
    every = most > 10
    # long enough for every loop to go round; queries at the end of many keys will do for the forward
    T, S, group, D, window = (330, 350, 4, 64, 300) if every else (70, 420, 4, 64, 330)
    shapes = ((T, group), (S, 1), (S, 1), (T, group))
    q, k, v, grad = (torch.randn(1, length, heads, D).bfloat16().transpose(1, 2) for length, heads in shapes)
    texts = {}
    # where the compiler leaves fences out by itself, that is no way to find a mutant
    warnings.simplefilter("ignore" if target == "sm_100" else "error", MissingFence)

    def results(kernel, edit):
        with emulated(target, edit=edit):
            out, lse = attend(q, k, v, window, scale=0.2)
            if kernel == "attention_forward_kernel":
                return [out, lse]
            return [x for x in attend_backward(grad, None, q, k, v, out, lse, window, scale=0.2) if x is not None]

    def how_found(kernel, start, end, replacement, expected):
        def edit(name, text):
            return text if name != kernel else text[:start] + replacement + text[end:]

        try:
            found = results(kernel, edit)
        except (Fault, MissingFence) as fault:
            return str(fault)
        errors = [float((a.float() - b.float()).abs().max()) for a, b in zip(found, expected, strict=True)]
        return "" if all(error < 0.02 for error in errors) else f"results are off by {errors}"  # NaN is not less

    for kernel in (f"attention_{name}_kernel" for name in (("forward", "dq", "dkdv") if every else ("forward",))):
        expected = results(kernel, lambda name, text: texts.setdefault(name, text))
        for kind, (pattern, replacement, _) in MUTATIONS.items():
            places = list(re.finditer(pattern, texts[kernel]))
            places = (
                [places[(2 * i + 1) * len(places) // (2 * most)] for i in range(most)] if len(places) > most else places
            )
            found = []
            for place in places:
                text = replacement(place) if callable(replacement) else place.expand(replacement)
                found.append(how_found(kernel, *place.span(), text, expected))
            if found:
                print(json.dumps({"kernel": kernel, "kind": kind, "found": found}), flush=True)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_mutants_of_the_compiled_forward_are_found(target):
    """Up to three of each kind. Those that are not found are harmless, see docs/kernels.md."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, target, "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) >= {"sm_80": 8, "sm_90": 11, "sm_100": 12}[target]
    for line in lines:
        if line["kind"] != "a proxy fence removed" or target != "sm_100":  # where Triton leaves them out too
            assert sum(map(bool, line["found"])) >= MUTATIONS[line["kind"]][2] * len(line["found"]), line


if __name__ == "__main__":
    mutate(sys.argv[1], int(sys.argv[2]))

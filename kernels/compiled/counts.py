"""Counts what a profiler would: instructions, shared-memory wavefronts, sectors, bytes by tensor, matrix products.

    from kernels.compiled.counts import report
    print(report("sm_90", head_dim=128, dtype=torch.bfloat16, window=256, length=768, group=4))

All are counted while the PTX runs (emulate.py), so they are exact for PTX and say nothing of time. The assembler merges
and splits instructions: machine code has fewer `mov` and 64-bit additions, and more of what one PTX instruction hides.
"""

import collections
import dataclasses

import numpy as np
import torch

from ..band import visible_pairs
from .emulate import emulated

SECTOR = 32  # bytes of global memory that move together
LANES, BANKS, BANK_BYTES = 32, 32, 4


@dataclasses.dataclass
class KernelCounts:
    """Totals of the launches of one kernel."""

    programs: int = 0
    threads: int = 0  # of a program
    opcodes: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # thread instructions
    lines: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by innermost source line
    # of shared memory, by instruction: ld, st, cp (asynchronous), ldmatrix, stmatrix
    wavefronts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    conflicts: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # those too many
    sectors: int = 0  # of global memory, that requests of a warp move
    least_sectors: int = 0  # that would do for the same bytes
    bytes_read: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by argument
    bytes_written: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    multiplications: int = 0  # of the matrix units

    @property
    def instructions(self):
        return sum(self.opcodes.values())

    def kinds(self):
        """{kind: thread instructions}, most frequent first."""
        kinds = collections.Counter()
        for opcode, number in self.opcodes.items():
            kinds[kind_of(opcode)] += number
        return dict(kinds.most_common())


def kind_of(opcode):
    """What an instruction is there for."""
    name, *rest = opcode.split(".")
    if name in ("mma", "wgmma") or opcode.startswith(("tcgen05.mma", "tcgen05.commit")):
        return "matrix"
    if name in ("ldmatrix", "stmatrix", "tcgen05") or (name in ("ld", "st") and rest[0].startswith("shared")):
        return "shared"
    if name in ("ld", "st", "cp"):
        return "global"
    if name in ("ex2", "lg2", "rsqrt", "rcp", "sqrt", "div", "tanh") and rest[-1].startswith("f"):
        return "special function"
    if name in ("bar", "bra", "ret", "elect", "mbarrier", "fence"):
        return "control"
    if name == "shfl":
        return "shuffle"
    if name in ("mov", "cvt", "prmt"):
        return "move and convert"
    if name in ("setp", "selp"):
        return "compare and select"
    return "floating point" if rest and rest[-1].startswith(("f", "bf")) else "integer"


class Counter:
    """Receives what `emulated(target, counter=...)` executes: `kernels` is {name: KernelCounts}."""

    def __init__(self):
        self.kernels = {}
        self.now = None

    def begin(self, program):
        self.now = self.kernels.setdefault(program.name.removesuffix("_kernel"), KernelCounts())
        self.now.threads = program.threads

    def end(self, machine):
        self.now.programs += len(machine.ids)
        for one, warps in zip(machine.program.instructions, machine.executed, strict=True):
            if warps:
                self.now.opcodes[one.opcode] += LANES * int(warps)
                self.now.lines[one.source.split(" @")[0].rpartition(":")[0]] += LANES * int(warps)

    def product(self, number):
        self.now.multiplications += number

    def shared_access(self, machine, one, addresses, size):
        """Accesses of active threads. 16 bytes a thread are served for 8 threads at a time, 8 bytes for 16."""
        together = min(LANES, BANKS * BANK_BYTES // size)
        lane = np.arange(machine.count * LANES).reshape(-1, LANES)
        self._wavefronts(one, machine.active_only(lane) // together, addresses, size)

    def matrix_access(self, one, addresses):
        """ldmatrix and stmatrix: 8 rows of 16 bytes at a time."""
        self._wavefronts(one, np.arange(addresses.size) // 8, addresses.reshape(-1), 16)

    def _wavefronts(self, one, group, addresses, size):
        words = (addresses // BANK_BYTES)[:, None] + np.arange(max(1, size // BANK_BYTES))
        distinct = np.unique(group[:, None] << 32 | words)  # threads that read the same word share it
        in_bank = np.unique(distinct >> 32 << 8 | distinct % BANKS, return_counts=True)
        groups, first = np.unique(in_bank[0] >> 8, return_index=True)
        wavefronts = int(np.maximum.reduceat(in_bank[1], first).sum())
        name = one.opcode.split(".")[0]
        self.now.wavefronts[name] += wavefronts
        self.now.conflicts[name] += wavefronts - len(groups)

    def global_access(self, machine, kind, addresses, size, found, which=slice(None)):
        """which: those of the active threads that access memory, where not all do."""
        warp = machine.active_only(np.arange(machine.count)[:, None])[which]
        first, last = addresses // SECTOR, (addresses + size - 1) // SECTOR
        self.now.sectors += len(np.unique(np.concatenate([warp << 48 | first, warp << 48 | last])))
        self.now.least_sectors += int((-(-np.bincount(warp) * size // SECTOR)).sum())
        into = self.now.bytes_written if kind == "store" else self.now.bytes_read
        for region, chosen in found:
            into[region.name] += size * len(addresses[chosen])


def count(target, *, head_dim, dtype, window, length, group=4, rope=False, backward=True):
    """({pass: KernelCounts}, visible scores) of attention over one KV head: what `report` shows."""
    from ..backends.triton import attend, attend_backward

    generator = torch.Generator().manual_seed(0)

    def projected(heads):
        return torch.randn(1, length, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)

    q, k, v, grad = projected(group), projected(1), projected(1), projected(group)
    angles = torch.arange(length)[:, None] * torch.rand(head_dim // 2, generator=generator)
    options = {"scale": head_dim**-0.5, "rope": (angles.cos(), angles.sin()) if rope else None}
    counter = Counter()
    with emulated(target, counter=counter):
        out, lse = attend(q, k, v, window, **options)
        if backward:
            attend_backward(grad, None, q, k, v, out, lse, window, **options)
    return counter.kernels, group * visible_pairs(length, length, window)


# how many matrix products a visible score needs: s and o; s, dp and dq; s, dv, dp and dk
PRODUCTS = {"attention_forward": 2, "attention_dq": 3, "attention_dkdv": 4}


def report(target, **shape):
    """A text: each pass with its counts, by kind of instruction, by shared-memory instruction and by tensor.

    The arguments are those of `count`. "useful" is the part of the matrix products that visible scores need.
    """
    kernels, visible = count(target, **shape)
    dtype = str(shape["dtype"]).removeprefix("torch.")
    size = f"D {shape['head_dim']}, W {shape['window']}, T {shape['length']}"
    lines = [f"{target}, {dtype}, {size}: {visible} visible scores"]
    for name, counts in kernels.items():
        wavefronts, conflicts = counts.wavefronts.total(), counts.conflicts.total()
        kinds, moved = counts.kinds(), counts.bytes_read + counts.bytes_written
        lines += [
            f"{name}: {counts.programs} programs of {counts.threads} threads",
            f"  {counts.instructions / visible:.1f} thread instructions a score: "
            + _listed(kinds, counts.instructions),
            f"  {wavefronts} shared wavefronts ({conflicts / max(1, wavefronts):.1%} bank conflicts): "
            + _listed(counts.wavefronts, wavefronts),
            f"  {counts.sectors} sectors of 32 bytes ({counts.least_sectors} at least), {moved.total()} bytes: "
            + _listed({tensor.removesuffix("_ptr"): number for tensor, number in moved.items()}, moved.total()),
        ]
        if name in PRODUCTS:
            useful = PRODUCTS[name] * visible * shape["head_dim"]
            lines.append(
                f"  {counts.multiplications} multiply-adds of matrices, {useful / counts.multiplications:.1%} useful"
            )
    return "\n".join(lines)


def _listed(numbers, total):
    ordered = sorted(numbers.items(), key=lambda one: -one[1])
    return ", ".join(f"{name} {number / total:.0%}" for name, number in ordered)

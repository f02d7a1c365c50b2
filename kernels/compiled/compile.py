"""What the compiler makes of a kernel, for any GPU, on a machine without one.

    from kernels.compiled import compile_launch, launches
    for launch in launches("sm_90", head_dim=128, dtype=torch.bfloat16, rope=True):
        made = compile_launch(launch, "sm_90")
        print(made.kernel, made.registers, made.spilled_bytes, made.shared_bytes, [loop.pipes for loop in made.loops])

Tensors on the meta device go through the real launchers, which choose tiles and arguments as they would on that card.
Their launches are recorded instead of run. Triton compiles them with a driver that only knows the target, so the result
is the code that would run. Triton's package has the assembler and the disassemblers.

A process with TRITON_INTERPRET=1 cannot use this: interpreted functions cannot be compiled.
"""

import contextlib
import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton import knobs
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ..backends.triton import (
    append,
    attend,
    attend_backward,
    attend_to_cache,
    norm_rotate,
    norm_rotate_backward,
    rotate,
    tile_configs,
)
from . import machine_code


class Card(NamedTuple):
    """One card of an architecture: what a multiprocessor holds, and what it executes in a cycle.

    Sources: CUDA programming guide, "compute capabilities"; AMD's CDNA 3 ISA and white paper, for the MI300X.
    """

    name: str
    number: int  # the architecture, as tile_configs counts them
    shared_per_block: int  # bytes
    shared_total: int
    warps: int
    blocks: int
    multiprocessors: int
    gigahertz: float  # boost clock
    registers: int = 65536  # 32 bits each
    warp_size: int = 32
    fma: int = 128  # lanes of each pipe
    alu: int = 64
    mufu: int = 16
    fma_in_alu: bool = False  # multiplications take the lanes of the ALU
    l2: int = 5120  # bytes that L2 gives all multiprocessors in a cycle: an A100's (white paper), taken for every card


CARDS = {
    "sm_80": Card("A100", 80, 163 << 10, 164 << 10, 64, 32, 108, 1.41, fma=64),
    "sm_86": Card("A10", 86, 99 << 10, 100 << 10, 48, 16, 72, 1.695),
    "sm_89": Card("4090", 89, 99 << 10, 100 << 10, 48, 24, 128, 2.52),
    "sm_90": Card("H100", 90, 227 << 10, 228 << 10, 64, 32, 132, 1.83),
    "sm_100": Card("B200", 100, 227 << 10, 228 << 10, 64, 32, 148, 1.85),
    "sm_120": Card("5090", 120, 99 << 10, 100 << 10, 48, 24, 170, 2.407),
    "gfx942": Card("MI300X", tile_configs.AMD, 64 << 10, 64 << 10, 32, 32, 304, 2.1, registers=4 * 512 * 64,
                   warp_size=64, fma=64, fma_in_alu=True, l2=8 * 2048),
}  # fmt: skip
RESERVED_SHARED = 1 << 10  # bytes that CUDA takes for itself from every block
TENSOR_MEMORY_COLUMNS = 512  # of a Blackwell multiprocessor


class Launch(NamedTuple):
    """One recorded kernel launch."""

    kernel: JITFunction
    arguments: tuple
    keywords: dict  # constexprs, num_warps, num_stages
    grid: tuple

    @property
    def name(self):
        return self.kernel.fn.__name__.removesuffix("_kernel")

    @property
    def tile(self):
        """The launch's tile: blocks, packed heads, warps and stages by name."""
        wanted = ("BLOCK_", "EDGE_", "PACK", "num_")
        return {name: value for name, value in self.keywords.items() if name.startswith(wanted)}


class Compiled(NamedTuple):
    """One kernel as machine code. Counts are per thread (on AMD per lane) unless another unit is named."""

    kernel: str
    target: str
    tile: dict
    registers: int
    stack_bytes: int
    spilled_bytes: int  # registers that the code stores into local memory, 4 bytes each
    shared_bytes: int  # a block's
    blocks_per_multiprocessor: int  # resident at a time; 0: a block does not fit
    limited_by: str  # the resource that allows no more blocks
    instructions: int  # of the whole kernel
    matrix: tuple  # the matrix instructions used, such as ("HGMMA",)
    accesses: tuple  # of machine_code.Access: global loads and stores with their widths
    loops: tuple  # of machine_code.Loop: the innermost ones, in the order of the code
    ptx: str  # empty on AMD
    binary: bytes  # a cubin, on AMD a code object

    @property
    def narrow_tile_loads(self):
        """Loads of tiles (not of one number a row) of under 16 bytes a thread."""
        return [
            access for access in self.accesses if not access.of_rows and access.kind != "store" and access.bytes < 16
        ]


def card_of(target):
    """The `Card` of a target. Raises ValueError for one that is unknown or that this Triton cannot assemble."""
    known = [name for name in CARDS if _assembles(name)]
    if target not in known:
        raise ValueError(f"architecture {target!r} is not one that triton {triton.__version__} compiles for here: "
                         f"wanted one of {', '.join(known)}")  # fmt: skip
    return CARDS[target]


def launches(
    target, *, head_dim, dtype, rope=False, half_rope=False, sinks=False, softcap=None, grad_lse=False, starts=False,
    right=0, norm=False, int8=False, group=4, new_tokens=1, configs=None,
):  # fmt: skip
    """The launches of every pass on `target`, once each: a list of `Launch`.

    rope: whether q and k are rotated, with half_rope only half of each head. grad_lse: whether lse has a gradient.
    starts: whether attention has documents, right: how many later keys it sees; decoding has neither.
    norm: also the rotation with a norm of q and k, forward and backward. int8: of the rings, beside their scales.
    configs {pass: tile}: in place of the table's. The other arguments are those of `sliding_gqa_attention`.
    """
    configs = configs or {}
    batch, heads, length, window, splits = 1, 2, 1024, 512, 2
    rotary_dim = (head_dim // 2 if half_rope else head_dim) if rope or half_rope else 0

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def projected(tokens, heads):
        return meta(batch, tokens, heads, head_dim).transpose(1, 2)

    q, k = projected(length, heads * group), projected(length, heads)
    table = meta(length, max(1, rotary_dim // 2), dtype=torch.float32)
    extras = {
        "scale": head_dim**-0.5,
        "softcap": softcap,
        "sinks": meta(heads * group) if sinks else None,
        "rope": (table, table) if rotary_dim else None,
    }
    with recorded(target) as found:
        sight = {"right": right, "starts": meta(batch, length, dtype=torch.int32) if starts else None}
        out, lse = attend(q, k, k, window, config=configs.get("forward"), **sight, **extras)
        by_pass = (configs.get("dq"), configs.get("dkdv"))
        grads = out, lse if grad_lse else None
        attend_backward(*grads, q, k, k, out, lse, window, configs=by_pass, **sight, **extras)
        tables = extras["rope"] or (meta(length, head_dim // 2, dtype=torch.float32),) * 2
        rotate(q, k, *tables)
        if norm:
            weights = meta(head_dim), meta(head_dim), 1e-6
            norm_rotate(q, k, weights, *tables)
            norm_rotate_backward(q, k, q, k, weights, *tables)
        cache = meta(batch, heads, length, head_dim, dtype=torch.int8 if int8 else dtype)
        scales = (meta(batch, heads, length, dtype=torch.float32),) * 2 if int8 else None
        lengths, ring = meta(batch, dtype=torch.int32), {"rope": extras["rope"], "scales": scales}
        append(projected(new_tokens, heads), projected(new_tokens, heads), cache, cache, lengths, **ring)
        attend_to_cache(projected(new_tokens, heads * group), cache, cache, lengths, window, num_splits=splits,
                        config=configs.get("decode"), **extras, scales=scales)  # fmt: skip
    return list({launch.name: launch for launch in found}.values())


@contextlib.contextmanager
def recorded(target):
    """A list that receives a `Launch` for every kernel launched inside the block; none of them runs.

    Launchers choose tiles as they would on `target`. Only one thread may use it at a time.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("kernels were decorated with TRITON_INTERPRET=1: record and compile in a process without it")
    found = []
    number = card_of(target).number
    run, architecture = JITFunction.run, tile_configs.architecture
    JITFunction.run = lambda kernel, *arguments, grid, warmup, **keywords: found.append(
        Launch(kernel, arguments, keywords, grid)
    )
    tile_configs.architecture = lambda device: number
    try:
        yield found
    finally:
        JITFunction.run, tile_configs.architecture = run, architecture


def compile_launch(launch, target):
    """The `Compiled` of a launch. Errors of Triton and of its assembler pass through."""
    card = card_of(target)
    with _compiling_for(target, card):
        code = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.keywords)
    read = machine_code.read_amd if "amdgcn" in code.asm else _read_cuda
    found = read(code.asm)
    shared = code.metadata.shared + found.static_shared_bytes
    warps = code.metadata.num_warps
    columns = getattr(code.metadata, "tmem_size", None) or 0
    blocks, limited_by = resident_blocks(card, found.registers, warps, shared, columns)
    return Compiled(
        kernel=launch.name,
        target=target,
        tile=launch.tile,
        registers=found.registers,
        stack_bytes=found.stack_bytes,
        spilled_bytes=found.spilled_bytes,
        shared_bytes=shared,
        blocks_per_multiprocessor=blocks,
        limited_by=limited_by,
        instructions=found.instructions,
        matrix=found.matrix,
        accesses=found.accesses,
        loops=found.loops,
        ptx=code.asm.get("ptx", ""),
        binary=code.asm.get("cubin") or code.asm.get("hsaco"),
    )


def resident_blocks(card, registers, warps, shared, tensor_memory_columns=0):
    """(blocks that a multiprocessor of a `Card` holds at a time, what allows no more). registers: a thread's."""
    if card.warp_size == 64:
        # registers of a SIMD: 512 a lane, handed out by 8; a block's waves are spread over 4 SIMDs
        waves = min(8, 512 // max(1, -(-registers // 8) * 8))
        by_registers = 4 * waves // warps
        by_shared = card.shared_total // max(1, shared)
    else:
        # registers are handed out to warps, 256 at a time
        by_registers = card.registers // (max(1, -(-registers * 32 // 256)) * 256 * warps)
        by_shared = card.shared_total // (shared + RESERVED_SHARED)
    if shared > card.shared_per_block:
        by_shared = 0
    counts = {"shared memory": by_shared, "registers": by_registers, "warps": card.warps // warps}
    counts["blocks"] = card.blocks
    if tensor_memory_columns:
        counts["tensor memory"] = TENSOR_MEMORY_COLUMNS // tensor_memory_columns
    limited_by = min(counts, key=counts.get)
    return counts[limited_by], limited_by


class TargetOnly(DriverBase):
    """A driver for an absent card: Triton compiles with it, and cannot launch."""

    def __init__(self, target):
        super().__init__()
        self.target = target
        self.get_current_device = lambda: target.arch  # Triton's key for compiled kernels
        self.get_current_stream = lambda device: 0

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise RuntimeError("this driver compiles only, and launches nothing")

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("meta")

    def get_benchmarker(self):
        raise RuntimeError("this driver compiles only, and times nothing")


@contextlib.contextmanager
def _compiling_for(target, card):
    cuda = target.startswith("sm_")
    wanted = GPUTarget("cuda" if cuda else "hip", card.number if cuda else target, card.warp_size)
    before = driver._active  # `driver.active` would search for a GPU
    driver.set_active(TargetOnly(wanted))
    try:
        yield
    finally:
        driver.set_active(before)


def _read_cuda(asm):
    return _disassembled(asm["cubin"], asm["ptx"])


@functools.lru_cache(256)  # several sets of features often give the same code
def _disassembled(cubin, ptx_text):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", "-g", str(path))
    return machine_code.read_cuda(sass, usage, ptx_text)


def _output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def _assembles(target):
    """Whether this installation of Triton can assemble for `target`."""
    if target.startswith("gfx"):
        return "amd" in backends
    if "nvidia" not in backends:
        return False
    assembler = knobs.nvidia.ptxas_blackwell if CARDS[target].number >= 100 else knobs.nvidia.ptxas
    return re.search(rf"'{target}a?'", _output(assembler.path, "--help")) is not None

"""The matrix units of Ampere and Hopper: mma.sync and wgmma; tcgen05.py has Blackwell's.

PTX ISA 8.7: fragments 9.7.14.5, wgmma 9.7.15. Operands are bf16, fp16 or tf32, sums fp32. Products are added up in
fp32, in NumPy's order; the order and the inner precision of the hardware are not documented.

wgmma is asynchronous: it reads shared memory and is added up when it is waited for. A write in between to what it
reads is a Fault, and so is a use of what it makes.
"""

import functools

import numpy as np

from .arithmetic import bf16_to_f32
from .memory import SHARED_BASE, Fault

LANES = 32
ROWS, QUADS = 8, 4  # a lane is 4 row + quad in every fragment


def as_f32(bits, type_):
    """Matrix elements as fp32: uint16 of bf16 and fp16, uint32 of tf32, whose last 13 bits are not looked at."""
    if type_ == "bf16":
        return bf16_to_f32(bits)
    if type_ == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _elements(registers, type_):
    """(warps, 32, registers, elements a register) of (warps, 32) registers."""
    stacked = np.stack(registers, -1)
    width = np.uint32 if type_ == "tf32" else np.uint16
    return as_f32(stacked.view(width), type_).reshape(*stacked.shape, -1)


def fragment_a(registers, type_):
    """(warps, 16, K): register 2 j + i has rows 8 i + row and columns of half j."""
    parts = _elements(registers, type_)
    n, _, count, pair = parts.shape
    parts = parts.reshape(n, ROWS, QUADS, count // 2, 2, pair)
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(n, 16, -1)


def fragment_b(registers, type_):
    """(warps, K, 8): register j has rows of half j and column `row`."""
    parts = _elements(registers, type_)
    n, _, count, pair = parts.shape
    return parts.reshape(n, ROWS, QUADS, count, pair).transpose(0, 3, 2, 4, 1).reshape(n, -1, ROWS)


def accumulators(registers):
    """(warps, 16, N) fp32: registers 4 c + 2 i + e have row 8 i + row and column 8 c + 2 quad + e."""
    parts = np.stack(registers, -1).view(np.float32)
    n = len(parts)
    return parts.reshape(n, ROWS, QUADS, -1, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(n, 16, -1)


def accumulator_registers(tile):
    """The inverse of `accumulators`: (warps, 32, N / 2)."""
    n = len(tile)
    parts = tile.reshape(n, 2, ROWS, -1, QUADS, 2).transpose(0, 2, 4, 3, 1, 5)
    return np.ascontiguousarray(parts).reshape(n, LANES, -1).view(np.uint32)


def multiply(m, one, n, k, type_, _):
    """mma.sync.m16n8k*: d = a b + c, each spread over the registers of a warp."""
    d, a, b, c = one.operands

    def registers(names):
        return [m.threads(name, "b32") for name in names]

    product = fragment_a(registers(a), type_) @ fragment_b(registers(b), type_) + accumulators(registers(c))
    if m.counter:
        m.counter.product(m.count * 16 * int(n) * int(k))
    result = accumulator_registers(product)
    for i, name in enumerate(d):
        m.put(name, np.ascontiguousarray(result[:, :, i]))


# matrix descriptors (9.7.15.5.1.2, 9.7.16.4.1)

WGMMA_SWIZZLES, TCGEN05_SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}, {0: 16, 2: 128, 4: 64, 6: 32}


@functools.lru_cache(4096)
def element_addresses(descriptor, blackwell, rows, columns, item, transposed):
    """(rows, columns) addresses in shared memory of the elements, `item` bytes each, of the matrix of a descriptor.

    Columns are those of k. A tile has 8 rows of `width` bytes, one after the other. The swizzle permutes the 16-byte
    pieces of a row: exclusive or of address bits 4 to 6 with bits 7 to 9, or of fewer bits where rows are shorter.
    Transposed, a piece runs over rows of the matrix, and 8 steps of k take the place of the tile's rows.
    """
    swizzle = descriptor >> 61 if blackwell else descriptor >> 62
    modes = TCGEN05_SWIZZLES if blackwell else WGMMA_SWIZZLES
    if swizzle not in modes or descriptor >> 49 & 7:
        raise Fault(f"matrix descriptor {descriptor:#x}: the emulator does not know its swizzle or base offset")
    width = modes[swizzle]
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
    inner, outer = (row * item, column) if transposed else (column * item, row)
    address = start + inner % width + outer % 8 * width
    if width == 16 and not transposed:
        address = address + inner // width * leading + outer // 8 * stride
    elif width == 16:
        address = address + inner // width * stride + outer // 8 * leading
    else:
        address = address + inner // width * leading + outer // 8 * stride
    if width == 16:
        return address
    return address ^ (address >> 3 & {128: 0x70, 64: 0x30, 32: 0x10}[width])


def shared_words(m, program, addresses, item):
    """Indices of 2-byte words, (rows, columns, item / 2), of a program's shared memory."""
    offset = addresses - SHARED_BASE
    if offset.min() < 0 or offset.max() + item > m.shared.size:
        raise Fault(f"a matrix reaches outside of {m.shared.size} bytes of shared memory")
    return (program * m.shared.words + offset // 2)[:, :, None] + np.arange(item // 2)


def shared_matrix(words, type_):
    """fp32 (rows, columns) of 2-byte words (rows, columns, 1 or 2)."""
    words = np.ascontiguousarray(words)
    return as_f32(words.view(np.uint32) if type_ == "tf32" else words, type_)[:, :, 0]


# wgmma


def multiply_async(m, one, n, k, type_, _):
    """wgmma.mma_async.m64nNk*: the four warps of a group; a from registers or shared memory, b from shared memory."""
    n, k = int(n), int(k)
    d, a, b, keep = one.operands[:4]
    if [operand.bits for operand in one.operands[4:6]] != [1, 1]:
        raise Fault("wgmma that negates an operand: the emulator does not know it")
    transposed = [bool(operand.bits) for operand in one.operands[6:]]
    rows = m.row_numbers()
    groups = rows.reshape(-1, 4) if len(rows) % 4 == 0 else None
    if groups is None or (groups != groups[:, :1] + np.arange(4)).any() or (groups[:, 0] % 4).any():
        raise Fault("wgmma is executed by some of a warp group's warps")
    item = 4 if type_ == "tf32" else 2
    in_registers = type(a) is tuple
    reads = []  # for each group, the words of a (or None) and of b
    for group, first in enumerate(groups[:, 0]):
        program = m.program_of[first]
        words = []
        for operand, size, flag in ((a, 64, transposed[:-1]), (b, n, transposed[-1:])):
            if operand is a and in_registers:
                words.append(None)
                continue
            descriptor = m.value(operand, "u64").reshape(len(groups), -1)[group]
            if (descriptor != descriptor[0]).any():
                raise Fault("the threads of a warp group have different matrix descriptors")
            addresses = element_addresses(int(descriptor[0]), False, size, k, item, flag == [True])
            words.append(shared_words(m, program, addresses, item))
            m.shared.start_async_read(words[-1], program)
        reads.append(words)
    a_values = fragment_a([m.value(name, "b32") for name in a], type_).reshape(-1, 64, k) if in_registers else None
    keep = m.threads(keep, "pred").reshape(len(groups), -1)
    since = m.time.now
    m.registers.update({name: np.full((len(m.pc), LANES), 0xFFFFFFFF, np.uint32) for name in d
                        if name not in m.registers})  # fmt: skip
    count_pending(m.landing, d, rows, len(m.pc), 1)
    count_pending(m.held, a if in_registers else (), rows, len(m.pc), 1)
    if m.counter:
        m.counter.product(len(groups) * 64 * n * k)

    def finish(done):
        for group in np.flatnonzero(done.reshape(-1, 4).all(1)):
            program, warps = m.program_of[groups[group, 0]], groups[group]
            values = []
            for words in reads[group]:
                if words is None:
                    values.append(a_values[group])
                    continue
                values.append(shared_matrix(m.shared.end_async_read(words, since), type_))
                m.shared.mark_read(words, program)
            product = (values[0] @ values[1].T).reshape(4, 16, n)
            if keep[group, 0]:
                product = product + accumulators([m.registers[name][warps] for name in d])
            result = accumulator_registers(product)
            for i, name in enumerate(d):
                m.registers[name] = _with_rows(m.registers[name], warps, result[:, :, i])
        count_pending(m.landing, d, rows[done], len(m.pc), -1)
        count_pending(m.held, a if in_registers else (), rows[done], len(m.pc), -1)

    m.products.add(rows, finish)


def _with_rows(values, rows, new):
    values = values.copy()
    values[rows] = new
    return values


def count_pending(pending, names, rows, warps, change):
    """Adds to how many operations the registers wait for; a register that waits for none is forgotten."""
    for name in names:
        counts = pending.setdefault(name, np.zeros(warps, np.int32))
        counts[rows] += change
        if change < 0 and not counts.any():
            del pending[name]


def commit_products(m, one):
    m.products.commit(m.row_numbers())


def wait_products(m, one):
    m.products.wait(m.row_numbers(), one.operands[0].bits)


_SHAPE = r"n(\d+)k(\d+)"
_HALF = r"\.f32\.(bf16|f16)\.(bf16|f16)"
HANDLERS = [
    (r"mma\.sync\.aligned\.m16n(8)k(8|16)\.row\.col\.f32\.(bf16|f16)\.(bf16|f16)\.f32", multiply, "warp"),
    (r"mma\.sync\.aligned\.m16n(8)k(4|8)\.row\.col\.f32\.(tf32)\.(tf32)\.f32", multiply, "warp"),
    (rf"wgmma\.mma_async\.sync\.aligned\.m64{_SHAPE}{_HALF}", multiply_async, "warp"),
    (rf"wgmma\.mma_async\.sync\.aligned\.m64{_SHAPE}\.f32\.(tf32)\.(tf32)", multiply_async, "warp"),
    (r"wgmma\.commit_group\.sync\.aligned", commit_products, "warp"),
    (r"wgmma\.wait_group\.sync\.aligned", wait_products, "warp"),
]

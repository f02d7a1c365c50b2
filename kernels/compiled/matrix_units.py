"""The matrix units: mma.sync of Ampere, wgmma of Hopper, tcgen05 and tensor memory of Blackwell.

PTX ISA 8.7: fragments 9.7.14.5, wgmma 9.7.15, tcgen05 9.7.16. Operands are bf16, fp16 or tf32, sums fp32. Products are
added up in fp32, in NumPy's order; the order and the inner precision of the hardware are not documented.

wgmma and tcgen05.mma are asynchronous. They read shared memory and are added up when they are waited for; a write in
between to what they read is a Fault, and so is a use of what they make.
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
    shape = m.count, LANES

    def registers(names):
        return [np.broadcast_to(m.value(name, "b32"), shape) for name in names]

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


def _words(m, program, addresses, item):
    """Indices of 2-byte words, (rows, columns, item / 2), of a program's shared memory."""
    offset = addresses - SHARED_BASE
    if offset.min() < 0 or offset.max() + item > m.shared.size:
        raise Fault(f"a matrix reaches outside of {m.shared.size} bytes of shared memory")
    return (program * m.shared.words + offset // 2)[:, :, None] + np.arange(item // 2)


def _matrix(words, type_):
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
        for operand, size, turned in ((a, 64, transposed[:-1]), (b, n, transposed[-1:])):
            if operand is a and in_registers:
                words.append(None)
                continue
            descriptor = m.value(operand, "u64").reshape(len(groups), -1)[group]
            if (descriptor != descriptor[0]).any():
                raise Fault("the threads of a warp group have different matrix descriptors")
            addresses = element_addresses(int(descriptor[0]), False, size, k, item, turned == [True])
            words.append(_words(m, program, addresses, item))
            m.shared.start_async_read(words[-1], program)
        reads.append(words)
    a_values = fragment_a([m.value(name, "b32") for name in a], type_).reshape(-1, 64, k) if in_registers else None
    keep = np.broadcast_to(m.value(keep, "pred"), (m.count, LANES)).reshape(len(groups), -1)
    since = m.time.now
    m.registers.update({name: np.full((len(m.pc), LANES), 0xFFFFFFFF, np.uint32) for name in d
                        if name not in m.registers})  # fmt: skip
    _count(m.landing, d, rows, len(m.pc), 1)
    _count(m.held, a if in_registers else (), rows, len(m.pc), 1)
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
                values.append(_matrix(m.shared.end_async_read(words, since), type_))
                m.shared.mark_read(words, program)
            product = (values[0] @ values[1].T).reshape(4, 16, n)
            if keep[group, 0]:
                product = product + accumulators([m.registers[name][warps] for name in d])
            result = accumulator_registers(product)
            for i, name in enumerate(d):
                m.registers[name] = _with_rows(m.registers[name], warps, result[:, :, i])
        _count(m.landing, d, rows[done], len(m.pc), -1)
        _count(m.held, a if in_registers else (), rows[done], len(m.pc), -1)

    m.products.add(rows, finish)


def _with_rows(values, rows, new):
    values = values.copy()
    values[rows] = new
    return values


def _count(pending, names, rows, warps, change):
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


# mbarrier (9.7.13.15), as far as tcgen05 needs it


class Mbarrier:
    """Counts arrivals; when `expected` have come, its phase ends and the parity of the next begins."""

    def __init__(self, expected):
        self.expected = self.missing = expected
        self.parity = 0

    def arrive(self):
        self.missing -= 1
        if self.missing == 0:
            self.missing, self.parity = self.expected, self.parity ^ 1


def _one_thread_a_program(m, what):
    programs, warps = m.active()
    if len(np.unique(programs)) < len(programs):
        raise Fault(f"{what} is executed by several threads of a program")
    return programs, warps


def init_mbarrier(m, one):
    programs, _ = _one_thread_a_program(m, "mbarrier.init")
    for program, address in zip(programs, _addresses(m, one.operands[0]), strict=True):
        m.mbarriers[program, address] = Mbarrier(one.operands[1].bits)


def invalidate_mbarrier(m, one):
    programs, _ = _one_thread_a_program(m, "mbarrier.inval")
    for program, address in zip(programs, _addresses(m, one.operands[0]), strict=True):
        if m.mbarriers.pop((program, address), None) is None:
            raise Fault("mbarrier.inval of what is no mbarrier")


def wait_mbarrier(m, one):
    """Lets what the mbarrier waits for happen. Warps for whom nothing is under way sleep until there is."""
    target, address, parity = one.operands
    rows, addresses = m.row_numbers(), _addresses(m, address, warps=True)
    parities = np.broadcast_to(m.value(parity, "u32"), (m.count, LANES))[:, 0] & 1
    complete = np.zeros(len(rows), bool)
    for i, row in enumerate(rows):
        key = m.program_of[row], addresses[i]
        if key not in m.mbarriers:
            raise Fault("a wait for what is no mbarrier")
        if m.mbarriers[key].parity == parities[i]:
            _run_tensor_products(m, *key)
        complete[i] = m.mbarriers[key].parity != parities[i]
    m.state[rows[~complete]] = m.ASLEEP
    m.pc[rows[~complete]] = m.at
    m.select(rows[complete])
    if m.count:
        m.put(target, np.ones((m.count, LANES), bool))


def _addresses(m, address, warps=False):
    """[base + offset] of the active threads, or of each warp's first thread."""
    values = np.broadcast_to(m.value(address.base, "u32"), (m.count, LANES)).astype(np.int64) + address.offset
    return [int(value) for value in (values[:, 0] if warps else m.active_only(values))]


# tcgen05: the fifth generation, whose sums lie in tensor memory


def multiply_tensor(m, one, kind):
    """tcgen05.mma: one thread starts it. a from shared or tensor memory, b from shared memory, d in tensor memory."""
    programs, warps = _one_thread_a_program(m, "tcgen05.mma")
    d, a, b, shape, keep = one.operands

    def of_thread(operand, type_):
        return [int(x) for x in m.active_only(m.value(operand, type_))]

    a_values = _addresses(m, a) if hasattr(a, "base") else of_thread(a, "u64")
    operands = zip(programs, warps, _addresses(m, d), a_values, of_thread(b, "u64"), of_thread(shape, "u32"),
                   of_thread(keep, "pred"), strict=True)  # fmt: skip
    for program, warp, to, left, right, descriptor, kept in operands:
        rows, columns, type_, turned_a, turned_b = instruction_shape(descriptor, kind)
        item, k = (4, 8) if type_ == "tf32" else (2, 16)
        lanes = _lanes_of(rows)[:, None]
        reads = []
        for operand, size, turned in ((a, rows, turned_a), (b, columns, turned_b)):
            if operand is a and hasattr(a, "base"):  # 8 columns of 32 bits, each one element or two
                memory = m.tensor_memory
                reads.append(memory.index(program, (left >> 16) + lanes, (left & 0xFFFF) + np.arange(8)))
            else:
                memory = m.shared
                addresses = element_addresses(left if operand is a else right, True, size, k, item, turned)
                reads.append(_words(m, program, addresses, item))
            memory.start_async_read(reads[-1], program, warp)
        sums = m.tensor_memory.index(program, (to >> 16) + lanes, (to & 0xFFFF) + np.arange(columns))
        m.tensor_memory.start_product(sums, program, warp)
        arguments = sums, reads, type_, kept, m.time.now
        m.tensor_products[program].append(functools.partial(_add_tensor_product, m, *arguments))
        if m.counter:
            m.counter.product(rows * columns * k)


def instruction_shape(descriptor, kind):
    """(M, N, type, whether a and b are transposed) of an instruction descriptor (9.7.16.4.2)."""
    types = {"f16": {0: "f16", 1: "bf16"}, "tf32": {2: "tf32"}}[kind]
    a_type, b_type = descriptor >> 7 & 7, descriptor >> 10 & 7
    known = 0b11111_0_111111_11_00_111111_0_11_0000
    if descriptor & ~known or (descriptor >> 4 & 3) != 1 or a_type != b_type or a_type not in types:
        raise Fault(f"instruction descriptor {descriptor:#x}: the emulator does not know all of it")
    rows, columns = (descriptor >> 24 & 31) << 4, (descriptor >> 17 & 63) << 3
    return rows, columns, types[a_type], bool(descriptor >> 15 & 1), bool(descriptor >> 16 & 1)


def _lanes_of(rows):
    """The lane of tensor memory of each row: all 128, or of 64 rows the first 16 of each 32 (9.7.16.10.5)."""
    row = np.arange(rows)
    return row if rows == 128 else row // 16 * 32 + row % 16


def _add_tensor_product(m, sums, reads, type_, kept, since):
    values = []
    for index in reads:
        if index.ndim == 2:  # tensor memory
            bits = np.ascontiguousarray(m.tensor_memory.end_async_read(index, since))
            values.append(as_f32(bits if type_ == "tf32" else bits.view(np.uint16), type_))
        else:
            values.append(_matrix(m.shared.end_async_read(index, since), type_))
    product = values[0] @ values[1].T
    if kept:
        product = product + m.tensor_memory.data[sums].view(np.float32)
    m.tensor_memory.end_product(sums, np.ascontiguousarray(product).view(np.uint32), since)


def commit_tensor(m, one):
    """tcgen05.commit: the mbarrier counts an arrival when all products before have been added up."""
    programs, _ = _one_thread_a_program(m, "tcgen05.commit")
    for program, address in zip(programs, _addresses(m, one.operands[0]), strict=True):
        m.tensor_products[program].append(address)
        asleep = (m.program_of == program) & (m.state == m.ASLEEP)
        m.state[asleep] = m.READY


def _run_tensor_products(m, program, address):
    """Adds up the products of a program, in order, to the first commit to the mbarrier; nothing without one."""
    queue = m.tensor_products[program]
    while address in queue:
        entry = queue.pop(0)
        if callable(entry):
            entry()
            continue
        if (program, entry) not in m.mbarriers:
            raise Fault("tcgen05.commit to what is no mbarrier")
        m.mbarriers[program, entry].arrive()
        if entry == address:
            return


def _tensor_cells(m, address, form, count, split):
    """(rows, 32, count) cells of tensor memory that the threads of each warp access (9.7.16.8)."""
    base = np.array(_addresses(m, address, warps=True))[:, None, None]
    lane, column = base >> 16, base & 0xFFFF
    if (lane.reshape(-1) // 32 != m.warp_of[m.rows] % 4).any():
        raise Fault("a warp accesses lanes of tensor memory that belong to another of its group")
    thread = np.arange(LANES)[None, :, None]
    column = column + np.arange(count)
    if form == "16x32bx2":
        thread, column = thread % 16, column + thread // 16 * split
    return m.tensor_memory.index(m.program_of[m.rows][:, None, None], lane + thread, column)


def load_tensor(m, one, form, count):
    """tcgen05.ld: its registers may be read after tcgen05.wait::ld."""
    names = one.operands[0] if type(one.operands[0]) is tuple else one.operands[:1]
    split = one.operands[2].bits if form == "16x32bx2" else 0
    index = _tensor_cells(m, one.operands[1], form, int(count), split)
    values = m.tensor_memory.read(index.reshape(m.count, -1), m.program_of[m.rows], m.warp_of[m.rows])
    values = values.reshape(index.shape)
    for i, name in enumerate(names):
        m.put(name, np.ascontiguousarray(values[:, :, i]))
    mark_loading(m, names)


def mark_loading(m, names):
    """The registers may be read after the next tcgen05.wait::ld."""
    rows = m.row_numbers()
    _count(m.loading, names, rows, len(m.pc), 1)
    m.tensor_loads.add(rows, lambda done: _count(m.loading, names, rows[done], len(m.pc), -1))


def store_tensor(m, one, form, count):
    """tcgen05.st: it has happened after tcgen05.wait::st."""
    names = one.operands[-1] if type(one.operands[-1]) is tuple else one.operands[-1:]
    split = one.operands[1].bits if form == "16x32bx2" else 0
    index = _tensor_cells(m, one.operands[0], form, int(count), split).reshape(m.count, -1)
    values = np.stack([np.broadcast_to(m.value(name, "b32"), (m.count, LANES)) for name in names], -1)
    values = values.reshape(m.count, -1)
    rows, programs, warps = m.row_numbers(), m.program_of[m.rows], m.warp_of[m.rows]
    m.tensor_memory.start_copy(index, programs, warps)
    m.tensor_stores.add(rows, lambda done: m.tensor_memory.land(index[done], programs[done], warps[done], values[done]))


def wait_tensor(m, one, what):
    queue = m.tensor_loads if what == "ld" else m.tensor_stores
    queue.commit(m.row_numbers())
    queue.wait(m.row_numbers(), 0)


def allocate_tensor(m, one):
    """tcgen05.alloc writes the address of the first column into shared memory (9.7.16.7.1)."""
    rows, addresses = m.row_numbers(), np.array(_addresses(m, one.operands[0], warps=True))
    for i, row in enumerate(rows):
        program, columns = m.program_of[row], one.operands[1].bits
        first = m.tensor_memory.allocated[program]
        if first + columns > m.tensor_memory.COLUMNS or columns < 32 or columns & (columns - 1):
            raise Fault(f"tcgen05.alloc of {columns} columns with {first} taken already")
        m.tensor_memory.allocated[program] += columns
        index = m.shared.index(np.array([program]), addresses[i : i + 1], 4)
        words = np.array([[first, 0]], np.uint16)
        m.shared.write(index, np.array([program]), m.warp_of[[row]], words)


def deallocate_tensor(m, one):
    m.tensor_memory.allocated[m.program_of[m.rows]] -= one.operands[1].bits


def _nothing(m, one):
    pass


_SHAPE = r"n(\d+)k(\d+)"
_HALF = r"\.f32\.(bf16|f16)\.(bf16|f16)"
_BLACKWELL = r"cta_group::1\.sync\.aligned"
HANDLERS = [
    (r"mma\.sync\.aligned\.m16n(8)k(8|16)\.row\.col\.f32\.(bf16|f16)\.(bf16|f16)\.f32", multiply, "warp"),
    (r"mma\.sync\.aligned\.m16n(8)k(4|8)\.row\.col\.f32\.(tf32)\.(tf32)\.f32", multiply, "warp"),
    (rf"wgmma\.mma_async\.sync\.aligned\.m64{_SHAPE}{_HALF}", multiply_async, "warp"),
    (rf"wgmma\.mma_async\.sync\.aligned\.m64{_SHAPE}\.f32\.(tf32)\.(tf32)", multiply_async, "warp"),
    (r"wgmma\.commit_group\.sync\.aligned", commit_products, "warp"),
    (r"wgmma\.wait_group\.sync\.aligned", wait_products, "warp"),
    (r"mbarrier\.init\.shared::cta\.b64", init_mbarrier, "thread"),
    (r"mbarrier\.inval\.shared::cta\.b64", invalidate_mbarrier, "thread"),
    (r"mbarrier\.try_wait\.parity\.shared::cta\.b64", wait_mbarrier, "control"),
    (r"tcgen05\.mma\.cta_group::1\.kind::(f16|tf32)", multiply_tensor, "thread"),
    (r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one\.shared::cluster\.b64", commit_tensor, "thread"),
    (r"tcgen05\.ld\.sync\.aligned\.(32x32b|16x32bx2)\.x(\d+)\.b32", load_tensor, "warp"),
    (r"tcgen05\.st\.sync\.aligned\.(32x32b|16x32bx2)\.x(\d+)\.b32", store_tensor, "warp"),
    (r"tcgen05\.wait::(ld|st)\.sync\.aligned", wait_tensor, "warp"),
    (rf"tcgen05\.alloc\.{_BLACKWELL}\.shared::cta\.b32", allocate_tensor, "warp"),
    (rf"tcgen05\.dealloc\.{_BLACKWELL}\.b32", deallocate_tensor, "warp"),
    (rf"tcgen05\.relinquish_alloc_permit\.{_BLACKWELL}", _nothing, "warp"),
    (r"tcgen05\.fence::(?:before|after)_thread_sync", _nothing, "warp"),
]

"""The matrix unit of Blackwell: tcgen05, whose sums lie in tensor memory, and the mbarriers it reports to.

PTX ISA 8.7, 9.7.16 and 9.7.13.15. One thread starts a product; tcgen05.commit has an mbarrier count when all products
before have been added up. Here that happens when the mbarrier is waited for. A warp that waits for something that
nothing under way will complete sleeps until it does.
"""

import functools

import numpy as np

from .matrix_units import LANES, as_f32, count_pending, element_addresses, shared_matrix, shared_words
from .memory import Fault


class Mbarrier:
    """Counts arrivals; when `expected` have come, its phase ends and the parity of the next begins.

    maker: (warp, epoch of its program) at mbarrier.init; waiters: {warp: epoch at its latest wait}.
    """

    def __init__(self, expected, maker):
        self.expected = self.missing = expected
        self.parity, self.maker, self.waiters = 0, maker, {}

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
    programs, warps = _one_thread_a_program(m, "mbarrier.init")
    for program, warp, address in zip(programs, warps, _addresses(m, one.operands[0]), strict=True):
        m.mbarriers[program, address] = Mbarrier(one.operands[1].bits, (warp, m.time.epoch[program]))


def invalidate_mbarrier(m, one):
    programs, warps = _one_thread_a_program(m, "mbarrier.inval")
    for program, warp, address in zip(programs, warps, _addresses(m, one.operands[0]), strict=True):
        waiters = _mbarrier(m, program, address).waiters
        if any(epoch == m.time.epoch[program] for waiter, epoch in waiters.items() if waiter != warp):
            raise Fault("mbarrier.inval with no barrier after another warp's wait")
        del m.mbarriers[program, address]


def _mbarrier(m, program, address):
    if (program, address) not in m.mbarriers:
        raise Fault("there is no mbarrier at this address")
    return m.mbarriers[program, address]


def wait_mbarrier(m, one):
    """Lets what the mbarrier waits for happen. Warps for whom nothing is under way sleep until there is."""
    target, address, parity = one.operands
    rows, addresses = m.row_numbers(), _addresses(m, address, warps=True)
    parities = m.threads(parity, "u32")[:, 0] & 1
    complete = np.zeros(len(rows), bool)
    for i, row in enumerate(rows):
        program, warp = m.program_of[row], m.warp_of[row]
        waited, epoch = _mbarrier(m, program, addresses[i]), m.time.epoch[program]
        if waited.maker[0] != warp and waited.maker[1] == epoch:
            raise Fault("a warp waits for an mbarrier with no barrier after another made it")
        waited.waiters[warp] = epoch
        if waited.parity == parities[i]:
            _run_tensor_products(m, program, addresses[i])
        complete[i] = waited.parity != parities[i]
    m.state[rows[~complete]] = m.ASLEEP
    m.pc[rows[~complete]] = m.at
    m.select(rows[complete])
    if m.count:
        m.put(target, np.ones((m.count, LANES), bool))


def _addresses(m, address, warps=False):
    """[base + offset] of the active threads, or of each warp's first thread."""
    values = m.threads(address.base, "u32").astype(np.int64) + address.offset
    return [int(value) for value in (values[:, 0] if warps else m.active_only(values))]


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
        rows, columns, type_, transposed_a, transposed_b = instruction_shape(descriptor, kind)
        item, k = (4, 8) if type_ == "tf32" else (2, 16)
        lanes = _lanes_of(rows)[:, None]
        reads = []
        for operand, size, transposed in ((a, rows, transposed_a), (b, columns, transposed_b)):
            if operand is a and hasattr(a, "base"):  # 8 columns of 32 bits, each one element or two
                memory = m.tensor_memory
                reads.append(memory.index(program, (left >> 16) + lanes, (left & 0xFFFF) + np.arange(8)))
            else:
                memory = m.shared
                addresses = element_addresses(left if operand is a else right, True, size, k, item, transposed)
                reads.append(shared_words(m, program, addresses, item))
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
            values.append(shared_matrix(m.shared.end_async_read(index, since), type_))
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
        _mbarrier(m, program, entry).arrive()
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
    count_pending(m.loading, names, rows, len(m.pc), 1)
    m.tensor_loads.add(rows, lambda done: count_pending(m.loading, names, rows[done], len(m.pc), -1))


def store_tensor(m, one, form, count):
    """tcgen05.st: it has happened after tcgen05.wait::st."""
    names = one.operands[-1] if type(one.operands[-1]) is tuple else one.operands[-1:]
    split = one.operands[1].bits if form == "16x32bx2" else 0
    index = _tensor_cells(m, one.operands[0], form, int(count), split).reshape(m.count, -1)
    values = np.stack([m.threads(name, "b32") for name in names], -1)
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


_GROUP = r"cta_group::1\.sync\.aligned"
HANDLERS = [
    (r"mbarrier\.init\.shared::cta\.b64", init_mbarrier, "thread"),
    (r"mbarrier\.inval\.shared::cta\.b64", invalidate_mbarrier, "thread"),
    (r"mbarrier\.try_wait\.parity\.shared::cta\.b64", wait_mbarrier, "control"),
    (r"tcgen05\.mma\.cta_group::1\.kind::(f16|tf32)", multiply_tensor, "thread"),
    (r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one\.shared::cluster\.b64", commit_tensor, "thread"),
    (r"tcgen05\.ld\.sync\.aligned\.(32x32b|16x32bx2)\.x(\d+)\.b32", load_tensor, "warp"),
    (r"tcgen05\.st\.sync\.aligned\.(32x32b|16x32bx2)\.x(\d+)\.b32", store_tensor, "warp"),
    (r"tcgen05\.wait::(ld|st)\.sync\.aligned", wait_tensor, "warp"),
    (rf"tcgen05\.alloc\.{_GROUP}\.shared::cta\.b32", allocate_tensor, "warp"),
    (rf"tcgen05\.dealloc\.{_GROUP}\.b32", deallocate_tensor, "warp"),
    (rf"tcgen05\.relinquish_alloc_permit\.{_GROUP}", _nothing, "warp"),
    (r"tcgen05\.fence::(?:before|after)_thread_sync", _nothing, "warp"),
]

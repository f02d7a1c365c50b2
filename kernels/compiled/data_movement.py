"""Instructions that move data: mov, ld, st, cp.async, ldmatrix, stmatrix, shfl, elect (PTX ISA 8.7, 9.7.9).

Each function takes the machine, the instruction and what its opcode's pattern caught. A thread's several values are an
array (threads, values); only active threads are in it.
"""

import numpy as np

from .arithmetic import NUMPY, UNSIGNED
from .memory import Fault
from .tcgen05 import mark_loading

LANES = 32


def _address(m, address, type_="u32"):
    """[base + offset] of the active threads, in 64 bits."""
    return m.active_only(m.value(address.base, type_)).astype(np.int64) + address.offset


def _vector(operand):
    return operand if type(operand) is tuple else (operand,)


def _write_loaded(m, operands, values, type_):
    """values (active threads, len(operands)) of the width of type_, which says how they are extended."""
    dtype = NUMPY[type_]
    for operand, column in zip(operands, values.T, strict=True):
        column = np.ascontiguousarray(column)
        if m.mask is None:
            full = column.reshape(m.count, LANES)
        else:
            full = np.zeros((m.count, LANES), column.dtype)
            full[m.mask] = column
        m.put(operand, full.view(dtype))


def _read_stored(m, operands, type_):
    """(active threads, len(operands)) of what is to be stored."""
    dtype = UNSIGNED[NUMPY[type_].itemsize * 8]
    return np.stack([m.active_only(m.value(operand, type_)).view(dtype) for operand in operands], -1)


def load_param(m, one, type_):
    dtype = NUMPY[type_]
    bits = m.arguments[one.operands[1].base.name] & ((1 << 8 * dtype.itemsize) - 1)
    m.put(one.operands[0], np.full((m.count, LANES), bits, UNSIGNED[dtype.itemsize * 8]).view(dtype))


def load_global(m, one, count, type_):
    targets = _vector(one.operands[0])
    addresses = _address(m, one.operands[1], "u64")
    size = NUMPY[type_].itemsize
    values, found = m.memory.read(addresses, size, int(count or 1), m.active_ids(), one)
    if m.counter:
        m.counter.global_access(m, "load", addresses, size * len(targets), found)
    _write_loaded(m, targets, values, type_)


def store_global(m, one, count, type_):
    values = _read_stored(m, _vector(one.operands[1]), type_)
    addresses = _address(m, one.operands[0], "u64")
    found = m.memory.write(addresses, values, m.active_ids(), one)
    if m.counter:
        m.counter.global_access(m, "store", addresses, values.shape[1] * values.itemsize, found)


def load_shared(m, one, count, type_):
    targets = _vector(one.operands[0])
    size = NUMPY[type_].itemsize
    words = _read_shared(m, one, _address(m, one.operands[1]), size * int(count or 1))
    _write_loaded(m, targets, words.view(UNSIGNED[8 * size]), type_)


def store_shared(m, one, count, type_):
    values = _read_stored(m, _vector(one.operands[1]), type_)
    _write_shared(m, one, _address(m, one.operands[0]), np.ascontiguousarray(values).view(np.uint16))


def _read_shared(m, one, addresses, size):
    programs, warps = m.active()
    index = m.shared.index(programs, addresses, size)
    if m.counter:
        m.counter.shared_access(m, one, addresses, size)
    return m.shared.read(index, programs, warps)


def _write_shared(m, one, addresses, words):
    programs, warps = m.active()
    index = m.shared.index(programs, addresses, 2 * words.shape[1])
    if m.counter:
        m.counter.shared_access(m, one, addresses, 2 * words.shape[1])
    m.shared.write(index, programs, warps, words)


def copy_async(m, one, size):
    """cp.async (9.7.9.25.3.1): `size` bytes, of which the last operand says how many are read; the rest is zero."""
    target, source, size = one.operands[0], one.operands[1], one.operands[2].bits
    wanted = m.active_only(m.value(one.operands[3], "u32")) if len(one.operands) > 3 else np.uint32(size)
    addresses = _address(m, target)
    wanted = np.broadcast_to(wanted, addresses.shape)
    if not np.isin(wanted, (0, size)).all():
        raise Fault(f"cp.async reads {int(wanted.max())} of {size} bytes: the emulator knows all or none")
    programs, warps = m.active()
    index = m.shared.index(programs, addresses, size)
    words = np.zeros((len(addresses), size // 2), np.uint16)
    reads = wanted > 0
    if reads.any():
        from_ = _address(m, source, "u64")[reads]
        values, found = m.memory.read(from_, 4, size // 4, m.active_ids()[reads], one)
        words[reads] = values.view(np.uint16)
        if m.counter:
            m.counter.global_access(m, "copy", from_, size, found, reads)
    if m.counter:
        m.counter.shared_access(m, one, addresses, size)
    m.shared.start_copy(index, programs, warps)
    row = m.active_only(np.arange(m.count)[:, None])

    def land(done):
        threads = done[row]
        m.shared.land(index[threads], programs[threads], warps[threads], words[threads])

    m.copies.add(m.row_numbers(), land)


def commit_copies(m, one):
    m.copies.commit(m.row_numbers())


def wait_copies(m, one):
    m.copies.wait(m.row_numbers(), one.operands[0].bits)


def move(m, one, type_):
    """mov, also to pack a vector into a register and to unpack one (9.7.9.3, 9.7.9.4).

    It may be given what tcgen05.ld has not loaded yet: Triton puts a mov before the wait. Then its target has to wait.
    """
    target, source = one.operands
    if m.loading and any(name in m.loading for name in _vector(source)):
        waiting, m.loading = m.loading, {}
        move(m, one, type_)
        m.loading = waiting
        mark_loading(m, _vector(target))
        return
    if type(target) is tuple:
        part = m.value(source, type_).itemsize * 8 // len(target)
        pieces = m.threads(source, type_)
        pieces = pieces.view(UNSIGNED[part]).reshape(m.count, LANES, len(target))
        for i, name in enumerate(target):
            m.put(name, np.ascontiguousarray(pieces[:, :, i]))
    elif type(source) is tuple:
        part = NUMPY[type_].itemsize * 8 // len(source)
        pieces = [m.threads(piece, f"b{part}") for piece in source]
        m.put(target, np.stack(pieces, -1).view(NUMPY[type_])[:, :, 0])
    else:
        m.put(target, m.value(source, type_))


def load_matrices(m, one, number, transposed):
    """ldmatrix (9.7.14.5.15): `number` tiles of 8 x 8 of 16 bits; lane 8 i + r has the address of row r of tile i.

    Lane l gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; transposed, those rows of column l / 4.
    """
    number = int(number)
    targets, addresses = _vector(one.operands[0]), m.threads(one.operands[1].base, "u32").astype(np.int64)
    addresses = addresses[:, : 8 * number] + one.operands[1].offset
    programs, warps = (np.repeat(of[m.rows], 8 * number) for of in (m.program_of, m.warp_of))
    index = m.shared.index(programs, addresses.reshape(-1), 16)
    if m.counter:
        m.counter.matrix_access(one, addresses)
    tiles = m.shared.read(index, programs, warps).reshape(m.count, number, 8, 8)
    if transposed:
        tiles = tiles.swapaxes(2, 3)
    lanes = np.ascontiguousarray(tiles).view(np.uint32).reshape(m.count, number, LANES)
    for i, target in enumerate(targets):
        m.put(target, np.ascontiguousarray(lanes[:, i]))


def store_matrices(m, one, number, transposed):
    """stmatrix (9.7.14.5.16): ldmatrix the other way round."""
    number = int(number)
    addresses = m.threads(one.operands[0].base, "u32").astype(np.int64)
    addresses = addresses[:, : 8 * number] + one.operands[0].offset
    lanes = np.stack([m.threads(source, "b32") for source in _vector(one.operands[1])], 1)
    tiles = np.ascontiguousarray(lanes).view(np.uint16).reshape(m.count, number, 8, 8)
    if transposed:
        tiles = tiles.swapaxes(2, 3)
    programs, warps = (np.repeat(of[m.rows], 8 * number) for of in (m.program_of, m.warp_of))
    if m.counter:
        m.counter.matrix_access(one, addresses)
    index = m.shared.index(programs, addresses.reshape(-1), 16)
    m.shared.write(index, programs, warps, tiles.reshape(-1, 8))


def shuffle(m, one, mode):
    """shfl.sync (9.7.9.6): a lane takes the value of another lane of its segment, or its own if there is none."""
    target, source, offset, clamp, members = one.operands[:1] + one.operands[-4:]
    if not np.all(m.value(members, "u32") == np.uint32(0xFFFFFFFF)):
        raise Fault("a shuffle of some of a warp's threads")
    lane = np.arange(LANES)
    b, c = m.value(offset, "u32").astype(np.int64) & 31, m.value(clamp, "u32").astype(np.int64)
    segment = c >> 8 & 31
    last = lane & segment | c & 31 & ~segment
    first = lane & segment
    wanted = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | b & ~segment}[mode]
    valid = wanted >= last if mode == "up" else wanted <= last
    taken = np.broadcast_to(np.where(valid, wanted, lane), (m.count, LANES))
    values = m.threads(source, "b32")
    m.put(target, np.take_along_axis(values, taken, 1))
    if len(one.operands) == 6:  # target|predicate
        m.put(one.operands[1], np.broadcast_to(valid, (m.count, LANES)))


def elect(m, one):
    """elect.sync (9.7.13.14): true for one thread of the warp, here the first."""
    first = np.broadcast_to(np.arange(LANES) == 0, (m.count, LANES))
    m.put(one.operands[0], np.zeros((m.count, LANES), np.uint32))
    m.put(one.operands[1], first)


_CACHE = r"(?:\.(?:ca|cg|cs|nc|L1::\w+|L2::\w+))*"
_TYPE = r"\.([bsuf](?:16|32|64))"
HANDLERS = [
    (r"mov\.(pred|[bsuf](?:16|32|64))", move, "thread"),
    (rf"ld\.param{_TYPE}", load_param, "thread"),
    (rf"ld\.global{_CACHE}(?:\.v([248]))?{_TYPE}", load_global, "thread"),
    (rf"st\.global{_CACHE}(?:\.v([248]))?{_TYPE}", store_global, "thread"),
    (rf"ld\.shared(?:::cta)?(?:\.v([24]))?{_TYPE}", load_shared, "thread"),
    (rf"st\.shared(?:::cta)?(?:\.v([24]))?{_TYPE}", store_shared, "thread"),
    (r"cp\.async\.c([ag])\.shared(?:::cta)?\.global(?:\.L2::\w+)?", copy_async, "thread"),
    (r"cp\.async\.commit_group", commit_copies, "warp"),
    (r"cp\.async\.wait_group", wait_copies, "warp"),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16", load_matrices, "warp"),
    (r"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16", store_matrices, "warp"),
    (r"shfl\.sync\.(up|down|bfly|idx)\.b32", shuffle, "warp"),
    (r"elect\.sync", elect, "warp"),
]

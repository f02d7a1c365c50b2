"""Global, shared and tensor memory of an emulated GPU, and what is wrong with an access.

Every access is checked: an address outside of every tensor or of shared memory, a misaligned vector, shared or tensor
memory that was never written, that one warp writes and another touches with no barrier between, or that is touched
before an asynchronous operation on it was waited for; and an element of a tensor that two programs of a launch write.
"""

import ctypes
import itertools
import warnings

import numpy as np

SHARED_BASE = 1024  # the first address of shared memory; the hardware keeps 1 kB too
MANY = 255  # stands for "several warps" in place of a warp's number
# Owners that are no warp: whose copy or product has not arrived yet; and of what every warp may read
COPYING, MULTIPLYING, ALL_WARPS = 2**31 - 1, 2**31 - 2, 1


class Fault(Exception):
    """Something that the hardware forbids or leaves undefined."""


class MissingFence(UserWarning):
    """A fence that the PTX ISA asks for between cp.async and a matrix product, and that some compilers leave out."""


class Region:
    """The bytes of one tensor, gaps between its rows left out."""

    def __init__(self, name, tensor):
        self.name, self.item = name, tensor.element_size()
        self.base = tensor.data_ptr()
        dims = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
        dims = sorted((dim for dim in dims if dim[0]), reverse=True)
        self.size = self.item * (1 + sum(stride * (size - 1) for stride, size in dims)) if tensor.numel() else 0
        merged = []  # rows that lie one after the other are one dimension
        for stride, size in dims:
            if merged and merged[-1][0] == stride * size:
                merged[-1] = stride, merged[-1][1] * size
            else:
                merged.append((stride, size))
        nested = all(a >= b * n for (a, _), (b, n) in itertools.pairwise(merged))
        self.dims = [(stride * self.item, size) for stride, size in merged] if nested else []
        self.writer = None  # of each element, the program that wrote it, from 1
        self.start = self.base // 16 * 16
        length = -(-(self.base + self.size - self.start) // 16) * 16
        self.bytes = np.frombuffer((ctypes.c_uint8 * length).from_address(self.start), np.uint8) if self.size else None

    def holds(self, addresses, size):
        """Which accesses of `size` bytes lie in the tensor."""
        offset = addresses - self.base
        inside = (offset >= 0) & (offset + size <= self.size)
        if len(self.dims) > 1 or (self.dims and self.dims[0][0] != self.item):
            for end in (offset, offset + max(size - self.item, 0)):
                rest = end
                for stride, count in self.dims:
                    inside &= rest // stride < count
                    rest = rest % stride
                inside &= rest < self.item
        return inside

    def words(self, addresses, size, count):
        """(the tensor's bytes as words of `size` bytes, the indices (N, count) of those at addresses (N,))."""
        return self.bytes.view(f"u{size}"), (addresses - self.start)[:, None] // size + np.arange(count)

    def written_by_another(self, addresses, size, programs):
        """Whether another program has written an element of these accesses of `size` bytes."""
        return self.writer is not None and bool(np.any(self._written_by_others(addresses, size, programs)))

    def claim(self, addresses, size, programs):
        """Programs (N,) write the elements at addresses (N,): no other program may have written them."""
        if self.writer is None:
            self.writer = np.zeros(self.size // self.item, np.int32)
        written = self._written_by_others(addresses, size, programs)
        self.writer[self._elements(addresses, size)] = programs[:, None] + 1
        if np.any(written | self._written_by_others(addresses, size, programs)):  # before, or in this very instruction
            raise Fault(f"two programs write the same elements of {self.name}")

    def _elements(self, addresses, size):
        return (addresses - self.base)[:, None] // self.item + np.arange(max(1, size // self.item))

    def _written_by_others(self, addresses, size, programs):
        writer = self.writer[self._elements(addresses, size)]
        return (writer != 0) & (writer != programs[:, None] + 1)


class GlobalMemory:
    """The tensors that a kernel was given."""

    def __init__(self, tensors):
        """tensors: of (name, tensor). A tensor on the meta device or without elements holds nothing."""
        self.regions = [Region(name, tensor) for name, tensor in tensors]
        self._latest = {}  # by instruction, the tensor that it touched last

    def find(self, addresses, size, instruction):
        """[(region, which of the addresses)] for accesses of `size` bytes; a Fault if one lies in no tensor."""
        if (addresses % size).any():
            raise Fault(f"address {_hex(addresses[addresses % size != 0])} is not a multiple of {size} bytes")
        latest = self._latest.get(id(instruction))
        if latest is not None and latest.holds(addresses, size).all():
            return [(latest, slice(None))]
        found, open_ = [], np.ones(len(addresses), bool)
        for region in self.regions:
            inside = open_ & region.holds(addresses, size)
            if inside.any():
                found.append((region, inside))
                self._latest[id(instruction)] = region
                open_ &= ~inside
        if open_.any():
            raise Fault(f"address {_hex(addresses[open_])} is in no tensor: {self._nearest(int(addresses[open_][0]))}")
        return found

    def read(self, addresses, size, count, programs, instruction):
        """(len(addresses), count) unsigned integers of `size` bytes, and what `find` says. programs: who reads."""
        found = self.find(addresses, size * count, instruction)
        values = np.empty((len(addresses), count), f"u{size}")
        for region, which in found:
            if region.written_by_another(addresses[which], size * count, programs[which]):
                raise Fault(f"a program reads elements of {region.name} that another writes")
            words, index = region.words(addresses[which], size, count)
            values[which] = words[index]
        return values, found

    def write(self, addresses, values, programs, instruction):
        """Writes values (len(addresses), count); returns what `find` says."""
        size, count = values.itemsize, values.shape[1]
        found = self.find(addresses, size * count, instruction)
        for region, which in found:
            region.claim(addresses[which], size * count, programs[which])
            words, index = region.words(addresses[which], size, count)
            words[index] = values[which]
        return found

    def _nearest(self, address):
        def distance(region):
            return max(region.base - address, address - region.base - region.size, 0)

        if not (regions := [region for region in self.regions if region.size]):
            return "the kernel has none"
        region = min(regions, key=distance)
        return f"nearest is {region.name}, {region.size} bytes from {region.base:#x}, offset {address - region.base}"


class Time:
    """Of some programs: how many instructions were executed, and for each its barriers and its latest proxy fence."""

    def __init__(self, programs):
        self.now = 0
        self.epoch = np.ones(programs, np.int32)  # barriers, from 1
        self.fenced = np.zeros(programs, np.int64)  # when fence.proxy.async was executed last


class _Tracked:
    """Memory of several programs that knows of each cell who touched it since its program's last barrier.

    A cell's owner is `epoch << 8 | warp` of its last writer, 0 if it was never written. Its reader is likewise the last
    reader, or MANY for several warps of one epoch. `written` is the time of the last write, `stored` that of a store.
    """

    name = ""

    def __init__(self, cells, dtype, time):
        self.time = time
        self.data = np.full(cells, np.iinfo(dtype).max, dtype)  # NaN in every type
        self.owner, self.reader = np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        self.written, self.stored = np.zeros(cells, np.int64), np.zeros(cells, np.int64)

    def _tags(self, programs, warps):
        """(the first tag of each program's epoch, that of each warp in it), as columns beside an index (N, cells)."""
        first = (self.time.epoch[programs] << 8)[:, None]
        return first, first | warps[:, None].astype(np.int32)

    def read(self, index, programs, warps):
        """The cells index (N, cells), read by the warps (N,) of programs (N,)."""
        first, mine = self._tags(programs, warps)
        self._check_read(self.owner[index], first, mine)
        reader = self.reader[index]
        shared = (reader >= first) & (reader != mine)
        self.reader[index] = np.where(shared, first | MANY, mine)
        lost = (self.reader[index] != mine) & ~shared  # two warps read the cell in this very instruction
        if lost.any():
            self.reader[index[lost]] = np.broadcast_to(first | MANY, index.shape)[lost]
        return self.data[index]

    def _check_read(self, owner, first, mine):
        wrong = (owner != mine) & ((owner >= first) | (owner == 0))
        if not wrong.any():
            return
        if (owner == COPYING).any():
            raise Fault(f"{self.name} is read before the asynchronous copy or store into it was waited for")
        if (owner == MULTIPLYING).any():
            raise Fault(f"{self.name} is read before the matrix product that makes it was waited for")
        if (owner == 0).any():
            raise Fault(f"{self.name} is read that was never written")
        raise Fault(f"{_warps(owner, mine, wrong)} write and read the same {self.name} with no barrier between")

    def write(self, index, programs, warps, values):
        self.claim(index, programs, warps)
        self.land(index, programs, warps, values)
        self.stored[index] = self.time.now

    def claim(self, index, programs, warps, product=False):
        """Checks that the cells are free to be written: no other warp has touched them since the last barrier."""
        first, mine = self._tags(programs, warps)
        owner, reader = self.owner[index], self.reader[index]
        wrong = (owner >= first) & (owner != mine)
        if product:  # of one that is under way already
            wrong &= owner != MULTIPLYING
        if wrong.any():
            if (owner[wrong] >= MULTIPLYING).any():
                raise Fault(f"{self.name} is written while an asynchronous copy, store or product into it is under way")
            raise Fault(f"{_warps(owner, mine, wrong)} write the same {self.name} with no barrier between")
        wrong = (reader >= first) & (reader != mine)
        if wrong.any():
            raise Fault(f"{_warps(reader, mine, wrong)} read and write the same {self.name} with no barrier between")

    def land(self, index, programs, warps, values):
        """Writes cells that were claimed."""
        _, mine = self._tags(programs, warps)
        self.data[index] = values
        self.owner[index] = mine
        self.written[index] = self.time.now
        # two warps may write a value that both of them hold
        if ((self.owner[index] != mine) & (self.data[index] != values)).any():
            raise Fault(f"two warps write different values into the same {self.name} at once")

    def start_copy(self, index, programs, warps):
        """An asynchronous copy or store into the cells begins: until `land` they may not be touched."""
        self.claim(index, programs, warps)
        self.owner[index] = COPYING
        self.written[index] = self.time.now

    def start_async_read(self, index, program, warp=None):
        """A matrix product begins to read the cells of one program, started by a warp, or by several if None."""
        first = self.time.epoch[program] << 8
        self._check_read(self.owner[index], first, first | warp if warp is not None else -1)

    def end_async_read(self, index, since):
        """The cells, which may not have been written since the read began at the time `since`."""
        if (self.written[index] > since).any():
            raise Fault(f"{self.name} is written while a matrix product that reads it is under way")
        return self.data[index]

    def mark_read(self, index, program):
        """Counts cells of one program as read now by several warps."""
        self.reader[index] = self.time.epoch[program] << 8 | MANY


class SharedMemory(_Tracked):
    """Shared memory of `programs` programs, `size` bytes each, in words of 2 bytes."""

    name = "shared memory"

    def __init__(self, programs, size, time):
        self.size = -(-size // 16) * 16
        self.words = self.size // 2
        super().__init__(programs * self.words, np.uint16, time)

    def index(self, programs, addresses, size):
        """(N, size / 2): which words N accesses of `size` bytes touch."""
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise Fault(f"shared address {_hex(addresses[addresses % size != 0])} is not a multiple of {size} bytes")
        offset = addresses - SHARED_BASE
        outside = (offset < 0) | (offset + size > self.size)
        if outside.any():
            raise Fault(f"shared address {_hex(addresses[outside])} is not in the {self.size} bytes of shared memory")
        return (programs * self.words + offset // 2)[:, None] + np.arange(size // 2)

    def start_async_read(self, index, program, warp=None):
        """The asynchronous proxy needs a fence after writes of the generic one, cp.async's too (9.7.13.4)."""
        super().start_async_read(index, program, warp)
        if (self.stored[index] > self.time.fenced[program]).any():
            raise Fault("a matrix product reads shared memory with no fence.proxy.async after the store")
        if (self.written[index] > self.time.fenced[program]).any():
            warnings.warn("a matrix product reads what cp.async copied with no fence.proxy.async between",
                          MissingFence, stacklevel=2)  # fmt: skip


class TensorMemory(_Tracked):
    """128 lanes of 512 columns of 32 bits for each program (9.7.16.1), handed out by tcgen05.alloc."""

    name = "tensor memory"
    LANES, COLUMNS = 128, 512

    def __init__(self, programs, time):
        super().__init__(programs * self.LANES * self.COLUMNS, np.uint32, time)
        self.allocated = np.zeros(programs, np.int64)  # columns, from the first
        # Triton loads what was never written where a loop has no steps, and looks at none of it: NaN will do
        self.owner[:] = ALL_WARPS

    def index(self, programs, lanes, columns):
        """The cells of lanes and columns, for arrays that are broadcast against each other."""
        if lanes.min() < 0 or lanes.max() >= self.LANES:
            raise Fault(f"tensor memory has {self.LANES} lanes, and lane {int(lanes.max())} is none of them")
        if columns.min() < 0 or (columns >= self.allocated[programs]).any():
            raise Fault(f"column {int(columns.max())} of tensor memory is not allocated")
        return (programs * self.LANES + lanes) * self.COLUMNS + columns

    def start_product(self, index, program, warp):
        """A matrix product into the cells begins. Products into the same cells follow each other in order."""
        self.claim(index.reshape(1, -1), np.array([program]), np.array([warp]), product=True)
        self.owner[index] = MULTIPLYING
        self.written[index] = self.time.now

    def end_product(self, index, values, since):
        """The sums are there, unless a product that began later adds to them."""
        self.data[index] = values
        self.owner[index] = np.where(self.written[index] == since, ALL_WARPS, MULTIPLYING)


def _hex(addresses):
    return f"{int(np.asarray(addresses).reshape(-1)[0]):#x}"


def _warps(tags, mine, wrong):
    other = int(tags[wrong][0]) & 255
    this = int(np.broadcast_to(mine, wrong.shape)[wrong][0]) & 255
    return f"warps {this} and {'others' if other == MANY else other}"

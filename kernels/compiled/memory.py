"""Global, shared and tensor memory of an emulated GPU, and what is wrong with an access.

Every access is checked: an address outside of every tensor or of shared memory, a misaligned vector, shared memory
that was never written, and shared memory that one warp writes and another touches with no barrier between. Shared
memory is kept in words of 2 bytes, for several programs side by side.
"""

import ctypes
import itertools
import warnings

import numpy as np

SHARED_BASE = 1024  # the first address of shared memory; the hardware keeps 1 kB too
IN_FLIGHT = 2**31 - 1  # the owner of words that an asynchronous copy has not filled yet
MANY = 255  # stands for "several warps" in place of a warp's number


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

    def elements(self, size):
        return self.bytes.view(f"u{size}")


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

    def read(self, addresses, size, count, instruction):
        """(len(addresses), count) unsigned integers of `size` bytes, and the regions they come from."""
        found = self.find(addresses, size * count, instruction)
        values = np.empty((len(addresses), count), f"u{size}")
        for region, which in found:
            index = (addresses[which] - region.start) // size
            values[which] = region.elements(size)[index[:, None] + np.arange(count)]
        return values, found

    def write(self, addresses, values, instruction):
        size, count = values.itemsize, values.shape[1]
        found = self.find(addresses, size * count, instruction)
        for region, which in found:
            index = (addresses[which] - region.start) // size
            region.elements(size)[index[:, None] + np.arange(count)] = values[which]
        return found

    def _nearest(self, address):
        def distance(region):
            return max(region.base - address, address - region.base - region.size, 0)

        if not (regions := [region for region in self.regions if region.size]):
            return "the kernel has none"
        region = min(regions, key=distance)
        return f"nearest is {region.name}, {region.size} bytes from {region.base:#x}, offset {address - region.base}"


class SharedMemory:
    """Shared memory of `programs` programs, `size` bytes each, and who touched what since the last barrier.

    A word's owner is `epoch << 8 | warp` of its last writer, where a program's epoch counts its barriers; 0 stands for
    never written. Likewise the last reader, with MANY for several warps of one epoch. `written` is when it was written.
    """

    def __init__(self, programs, size):
        self.size = -(-size // 16) * 16
        self.words = self.size // 2
        self.data = np.full(programs * self.words, 0xFFFF, np.uint16)  # NaN in every type
        self.owner = np.zeros(programs * self.words, np.int32)
        self.reader = np.zeros(programs * self.words, np.int32)
        self.written = np.zeros(programs * self.words, np.int64)
        self.stored = np.zeros(programs * self.words, np.int64)  # when it was written by st, not by a copy
        self.epoch = np.ones(programs, np.int32)
        self.fenced = np.zeros(programs, np.int64)  # when fence.proxy.async was executed last
        self.clock = 0

    def index(self, programs, addresses, size):
        """(N, size / 2): which words N accesses of `size` bytes touch."""
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise Fault(f"shared address {_hex(addresses[addresses % size != 0])} is not a multiple of {size} bytes")
        offset = addresses - SHARED_BASE
        outside = (offset < 0) | (offset + size > self.size)
        if outside.any():
            raise Fault(
                f"shared address {_hex(addresses[outside])} is outside of {self.size} bytes from {SHARED_BASE:#x}"
            )
        return (programs * self.words + offset // 2)[:, None] + np.arange(size // 2)

    def _now(self, programs, warps):
        now = (self.epoch[programs] << 8)[:, None]
        return now, now | warps[:, None].astype(np.int32)

    def read(self, index, programs, warps):
        now, mine = self._now(programs, warps)
        owner = self.owner[index]
        if ((owner != mine) & ((owner >= now) | (owner == 0))).any():
            self._explain_read(owner, mine, now)
        reader = self.reader[index]
        shared = (reader >= now) & (reader != mine)
        self.reader[index] = np.where(shared, now | MANY, mine)
        lost = (self.reader[index] != mine) & ~shared  # two warps read the word in this very instruction
        if lost.any():
            self.reader[index[lost]] = np.broadcast_to(now | MANY, index.shape)[lost]
        return self.data[index]

    def write(self, index, programs, warps, values):
        self.claim(index, programs, warps)
        self.land(index, programs, warps, values)
        self.stored[index] = self.clock

    def claim(self, index, programs, warps):
        """Checks that no other warp touched the words since the last barrier."""
        now, mine = self._now(programs, warps)
        owner, reader = self.owner[index], self.reader[index]
        wrong = (owner >= now) & (owner != mine)
        if wrong.any():
            if (owner[wrong] == IN_FLIGHT).any():
                raise Fault("shared memory is written while an asynchronous copy into it is under way")
            raise Fault(f"{_warps(owner, mine, wrong)} write the same shared memory with no barrier between")
        wrong = (reader >= now) & (reader != mine)
        if wrong.any():
            raise Fault(f"{_warps(reader, mine, wrong)} read and write the same shared memory with no barrier between")

    def land(self, index, programs, warps, values):
        _, mine = self._now(programs, warps)
        self.data[index] = values
        self.owner[index] = mine
        self.written[index] = self.clock
        if (
            (self.owner[index] != mine) & (self.data[index] != values)
        ).any():  # what is held twice may be written twice
            raise Fault("two warps write different values into the same shared memory at once")

    def start_copy(self, index, programs, warps):
        """An asynchronous copy into the words begins: until `land` they may not be touched."""
        self.claim(index, programs, warps)
        self.owner[index] = IN_FLIGHT
        self.written[index] = self.clock

    def start_async_read(self, index, program, warp=None):
        """The asynchronous proxy begins to read the words of one program for a warp, or for several if None.

        Writes of the generic proxy, cp.async's too, need a fence.proxy.async before (9.7.13.4).
        """
        owner = self.owner[index]
        now = self.epoch[program] << 8
        if (owner == 0).any():
            raise Fault("a matrix product reads shared memory that was never written")
        if (owner == IN_FLIGHT).any():
            raise Fault("a matrix product reads shared memory before a copy into it was waited for")
        if ((owner >= now) & (owner != (now | warp if warp is not None else -1))).any():
            raise Fault("a matrix product reads shared memory with no barrier after the write")
        if (self.stored[index] > self.fenced[program]).any():
            raise Fault("a matrix product reads shared memory with no fence.proxy.async after the store")
        if (self.written[index] > self.fenced[program]).any():
            warnings.warn(
                "a matrix product reads what cp.async copied with no fence.proxy.async between", MissingFence, 2
            )

    def end_async_read(self, index, since):
        """The words, which may not have been written since the read began at the time `since`."""
        if (self.written[index] > since).any():
            raise Fault("shared memory is written while a matrix product that reads it is under way")
        return self.data[index]

    def mark_read(self, index, program, warps):
        """Counts words of one program as read now by several warps."""
        self.reader[index] = self.epoch[program] << 8 | (MANY if len(warps) > 1 else warps[0])

    def _explain_read(self, owner, mine, now):
        if (owner == IN_FLIGHT).any():
            raise Fault("shared memory is read before an asynchronous copy into it was waited for")
        if (owner == 0).any():
            raise Fault("shared memory is read that was never written")
        wrong = (owner >= now) & (owner != mine)
        raise Fault(f"{_warps(owner, mine, wrong)} write and read the same shared memory with no barrier between")


class TensorMemory:
    """128 lanes of 512 columns of 32 bits for each program (9.7.16.1), handed out by tcgen05.alloc."""

    LANES, COLUMNS = 128, 512

    def __init__(self, programs):
        self.data = np.full((programs, self.LANES, self.COLUMNS), 0xFFFFFFFF, np.uint32)
        self.allocated = np.zeros(programs, np.int64)

    def check(self, program, lanes, columns):
        if lanes.min() < 0 or lanes.max() >= self.LANES or columns.min() < 0:
            raise Fault(f"tensor memory has {self.LANES} lanes: lane {int(lanes.max())} is none of them")
        if columns.max() >= self.allocated[program]:
            raise Fault(f"column {int(columns.max())} of tensor memory: {int(self.allocated[program])} are allocated")

    def read(self, program, lanes, columns):
        self.check(program, lanes, columns)
        return self.data[program, lanes, columns]

    def write(self, program, lanes, columns, values):
        self.check(program, lanes, columns)
        self.data[program, lanes, columns] = values


def _hex(addresses):
    return f"{int(np.asarray(addresses).reshape(-1)[0]):#x}"


def _warps(tags, mine, wrong):
    other = int(tags[wrong][0]) & 255
    this = int(np.broadcast_to(mine, wrong.shape)[wrong][0]) & 255
    return f"warps {this} and {'others' if other == MANY else other}"

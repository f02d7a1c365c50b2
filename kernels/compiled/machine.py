"""Runs a PTX program: registers, program counters, barriers and asynchronous groups of many threads in lockstep.

A `Machine` holds the warps of some programs of a grid side by side. At each step it takes the warps that stand at the
smallest program counter and runs them to the next branch, barrier or label, each instruction at once for all of their
threads: a register is an array (warps, 32). So warps that part ways meet again, as after a branch on real hardware.

Asynchronous operations happen as late as the program allows: a copy lands, and a product is added up, when it is
waited for. What depends on an earlier moment is a `Fault`. PTX ISA 8.7; numbers in parentheses are its sections.
"""

import functools
import re

import numpy as np

from . import data_movement, matrix_units, tcgen05
from .arithmetic import NUMPY, PAIRS, UNSIGNED, operation
from .memory import SHARED_BASE, Fault, SharedMemory, TensorMemory, Time
from .ptx import Immediate, Symbol

READY, AT_BARRIER, ASLEEP, EXITED = range(4)
LANES = 32


class UnknownOpcode(NotImplementedError):
    """An instruction that the emulator does not know, by name."""


class CommitGroups:
    """Asynchronous operations that a warp commits and waits for in groups: cp.async (9.7.9.25.3) and wgmma (9.7.15)."""

    def __init__(self, warps):
        self.committed = np.zeros(warps, np.int64)
        self.pending = []  # of [rows, the group of each, what happens at the end]

    def add(self, rows, finish):
        """finish(which of the rows) is called when their group is waited for."""
        self.pending.append([rows, self.committed[rows], finish])

    def commit(self, rows):
        self.committed[rows] += 1

    def wait(self, rows, most):
        """Finishes all but the latest `most` groups of the warps `rows`."""
        waiting = np.zeros(len(self.committed), bool)
        waiting[rows] = True
        left = []
        for entry in self.pending:
            which, groups, finish = entry
            done = waiting[which] & (groups < self.committed[which] - most)
            if done.any():
                finish(done)
            if not done.all():
                left.append([which[~done], groups[~done], _rest(finish, ~done)])
        self.pending = left


def _rest(finish, kept):
    """`finish` for the rows that are kept."""
    places = np.flatnonzero(kept)

    def later(done):
        which = np.zeros(len(kept), bool)
        which[places[done]] = True
        finish(which)

    return later if len(places) < len(kept) else finish


class Code:
    """A program whose instructions have found what executes them."""

    def __init__(self, program):
        self.program = program
        self.steps = [_bind(one) for one in program.instructions]
        labels = set(program.labels.values())
        self.ends = []  # for each instruction, where the straight piece that it begins ends
        end = len(self.steps)
        for at in reversed(range(len(self.steps))):
            if self.steps[at][2] == "control":
                end = at
            self.ends.append(end)
            if at in labels:
                end = at
        self.ends.reverse()


def _bind(one):
    """(function, its arguments, kind) for an instruction. Raises UnknownOpcode."""
    found = _executor(one.opcode, len(one.operands) - 1)
    if found is None:
        raise UnknownOpcode(f"the emulator does not know {one.opcode}: {one}")
    return found


@functools.cache
def _executor(opcode, sources):
    if found := operation(opcode, sources):
        return _arithmetic, (found,), "thread"
    matches = ((pattern.fullmatch(opcode), function, kind) for pattern, function, kind in _HANDLERS)
    return next(((function, match.groups(), kind) for match, function, kind in matches if match), None)


class Machine:
    READY, ASLEEP = READY, ASLEEP

    def __init__(self, code, arguments, memory, shared_bytes, ids, grid, counter=None, watch=None):
        """arguments: bits of the parameters by name; ids: numbers of the programs to run, of a grid of `grid`."""
        self.code, self.program, self.arguments, self.memory = code, code.program, arguments, memory
        warps = self.program.threads // LANES
        total = warps * len(ids)
        self.ids, self.grid, self.warps_each = np.asarray(ids), grid, warps
        self.program_of = np.repeat(np.arange(len(ids)), warps)
        self.warp_of = np.tile(np.arange(warps), len(ids))
        self.thread_program, self.thread_warp = (
            np.repeat(of[:, None], LANES, 1) for of in (self.program_of, self.warp_of)
        )
        self.time = Time(len(ids))
        self.shared = SharedMemory(len(ids), shared_bytes, self.time)
        uses_tensor_memory = any(one.opcode.startswith("tcgen05") for one in self.program.instructions)
        self.tensor_memory = TensorMemory(len(ids), self.time) if uses_tensor_memory else None
        self.registers = {}
        # {register: how many operations under way make it, or read it, for each warp}
        self.landing, self.loading, self.held = {}, {}, {}
        self.copies, self.products = CommitGroups(total), CommitGroups(total)
        self.tensor_stores, self.tensor_loads = CommitGroups(total), CommitGroups(total)
        self.mbarriers = {}  # {(program, address): tcgen05.Mbarrier}
        self.tensor_products = [[] for _ in ids]  # queues of tcgen05.mma and tcgen05.commit
        self.pc, self.state = np.zeros(total, np.int64), np.full(total, READY)
        self.rows, self.count, self.mask = slice(None), total, None
        self.executed = np.zeros(len(code.steps), np.int64)  # by instruction, how many warps
        self.at, self.counter, self.watch = 0, counter, watch
        self.constants = {}

    # which warps run

    def run(self):
        try:
            with np.errstate(all="ignore"):
                while (self.state != EXITED).any():
                    self._run_some()
        except Fault as fault:
            one = self.program.instructions[self.at]
            raise Fault(f"{self.program.name}: {fault}; at {one}") from None
        for program, columns in enumerate(self.tensor_memory.allocated if self.tensor_memory else ()):
            if columns:
                raise Fault(f"{self.program.name}: program {self.ids[program]} ends with tensor memory allocated")

    def _run_some(self):
        ready = self.state == READY
        if not ready.any():
            raise Fault("every warp waits and none can go on: a barrier or mbarrier that is never completed")
        at = int(self.pc[ready].min())
        chosen = ready & (self.pc == at)
        self.select(slice(None) if chosen.all() else np.flatnonzero(chosen))
        end = self.code.ends[at]
        for self.at in range(at, end):
            self._step(*self.code.steps[self.at])
        self.pc[self.rows] = end
        if end < len(self.code.steps) and self.code.steps[end][2] == "control":
            self.at = end
            self.pc[self.rows] = end + 1
            self._step(*self.code.steps[end])

    def select(self, rows):
        self.rows, self.count = rows, len(self.pc[rows])

    def _step(self, function, arguments, kind):
        one = self.program.instructions[self.at]
        self.time.now += 1
        self.executed[self.at] += self.count
        self.mask = None
        selected = self.rows
        if one.guard is not None:
            mask = self.register(one.guard.register) ^ one.guard.negated
            if not mask.any():
                return
            if not mask.all():
                if kind == "thread":
                    self.mask = mask
                else:
                    whole = mask.all(1)
                    if (mask.any(1) & ~whole).any():
                        raise Fault("threads of one warp part ways at an instruction that all must execute")
                    self.select(self.row_numbers()[whole])
        function(self, one, *arguments)
        if self.watch is not None:
            self.watch(self, one)
        if self.rows is not selected:
            self.select(selected)

    def row_numbers(self):
        return np.arange(len(self.pc)) if isinstance(self.rows, slice) else self.rows

    def active(self):
        """(program, warp) of each active thread, row after row."""
        return self.active_only(self.thread_program[self.rows]), self.active_only(self.thread_warp[self.rows])

    def active_ids(self):
        """The number in the grid of each active thread's program."""
        return self.ids[self.active()[0]]

    def active_only(self, values):
        """(rows, 32) values as one axis, of active threads only."""
        if values.shape != (self.count, LANES):
            values = np.broadcast_to(values, (self.count, LANES))
        return values.reshape(-1) if self.mask is None else values[self.mask]

    # registers

    def register(self, name):
        for pending in (self.landing, self.loading):
            if name in pending and pending[name][self.rows].any():
                raise Fault(f"{name} is read before the asynchronous operation that makes it was waited for")
        if name not in self.registers:
            if name.startswith("%") and not name[-1].isdigit():
                return self._special(name)
            # the compiler may leave half of a pair undefined that it does not use
            self.registers[name] = _undefined((len(self.pc), LANES), UNSIGNED.get(self.program.bits(name)))
        values = self.registers[name]
        return values if isinstance(self.rows, slice) else values[self.rows]

    def value(self, operand, type_):
        """An operand as an array of a PTX type: (rows, 32), for a pair such as f32x2 (rows, 64)."""
        if operand.__class__ is str:
            values, dtype = self.register(operand), NUMPY[type_]
            if dtype.itemsize < values.itemsize and type_ not in PAIRS:  # the lower bits of a wider register
                values = values.astype(UNSIGNED[8 * dtype.itemsize])
            return values.view(dtype)
        if (operand, type_) not in self.constants:
            self.constants[operand, type_] = self._constant(operand, type_)
        return self.constants[operand, type_]

    def threads(self, operand, type_):
        """An operand that is no pair as an array of one value a thread: (rows, 32), a constant's too."""
        values = self.value(operand, type_)
        if values.shape == (self.count, LANES):
            return values
        return np.ascontiguousarray(np.broadcast_to(values, (self.count, LANES)))

    def _constant(self, operand, type_):
        dtype = NUMPY[type_]
        if isinstance(operand, Symbol):
            if operand.name != "global_smem":
                raise Fault(f"{operand.name} is no variable that the emulator knows")
            operand = Immediate(SHARED_BASE)
        if type_ == "pred":
            return np.full((1, 1), operand.bits != 0)
        bits = dtype.itemsize * 8 * (2 if type_ in PAIRS else 1)
        values = np.array([[operand.bits & ((1 << bits) - 1)]], UNSIGNED[bits]).view(dtype)
        return np.tile(values, (1, LANES)) if type_ in PAIRS else values

    def _special(self, name):
        """Special registers (10), which depend on the thread, the warp or the program."""
        lane = np.broadcast_to(np.arange(LANES, dtype=np.uint32), (self.count, LANES))
        warp = self.warp_of[self.rows][:, None].astype(np.uint32)
        values = {
            "%tid.x": lambda: warp * np.uint32(LANES) + lane,
            "%laneid": lambda: lane,
            "%warpid": lambda: warp,
            "%ctaid.x": lambda: self.ids[self.program_of[self.rows]][:, None].astype(np.uint32),
            "%nctaid.x": lambda: np.uint32(self.grid),
            "%ntid.x": lambda: np.uint32(self.program.threads),
        }
        if name in ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"):
            return np.zeros((self.count, LANES), np.uint32)
        if name not in values:
            raise Fault(f"{name} is no special register that the emulator knows")
        return np.ascontiguousarray(np.broadcast_to(values[name](), (self.count, LANES)))

    def put(self, name, values):
        """Writes a register of the active threads. Integers are extended to its width by their sign."""
        if name == "_":
            return
        if self.held and name in self.held and self.held[name][self.rows].any():
            raise Fault(f"{name} is written while an asynchronous matrix product reads it")
        if self.landing and name in self.landing and self.landing[name][self.rows].any():
            raise Fault(f"{name} is written before the asynchronous operation that makes it was waited for")
        bits = self.program.bits(name)
        if bits > 1:
            dtype = UNSIGNED[bits]
            values = values.view(dtype) if values.itemsize * 8 == bits else values.astype(dtype)
        if values.shape != (self.count, LANES):
            values = np.broadcast_to(values, (self.count, LANES)).copy()
        if isinstance(self.rows, slice) and self.mask is None:
            self.registers[name] = values
            return
        old = self.registers.get(name)
        new = _undefined((len(self.pc), LANES), UNSIGNED.get(bits)) if old is None else old.copy()
        new[self.rows] = values if self.mask is None else np.where(self.mask, values, new[self.rows])
        self.registers[name] = new


def _undefined(shape, dtype):
    """What a register holds that was never written: NaN in every type; None is a predicate's dtype."""
    return np.zeros(shape, bool) if dtype is None else np.full(shape, np.iinfo(dtype).max, dtype)


def _arithmetic(m, one, known):
    sources = [m.value(operand, type_) for operand, type_ in zip(one.operands[1:], known.sources, strict=True)]
    result = known.function(*sources)
    if known.result in PAIRS:
        result = np.ascontiguousarray(result).view(UNSIGNED[result.itemsize * 16])
    m.put(one.operands[0], result)


# control flow (9.7.12) and synchronisation (9.7.13)


def _branch(m, one):
    target = one.operands[0]
    m.pc[m.rows] = m.program.labels[target.name if isinstance(target, Symbol) else target]


def _exit(m, one):
    m.state[m.rows] = EXITED


def _barrier(m, one):
    """bar.sync 0 (9.7.13.1): a program's warps go on when all have come, and see what the others wrote before."""
    if one.operands != (Immediate(0),):
        raise UnknownOpcode(f"the emulator knows only barrier 0 of all threads: {one}")
    m.state[m.rows] = AT_BARRIER
    waiting = (m.state == AT_BARRIER).reshape(-1, m.warps_each)
    if (waiting.any(1) & (m.state == EXITED).reshape(-1, m.warps_each).any(1)).any():
        raise Fault("a warp waits at a barrier after another has ended")
    complete = waiting.all(1)
    m.state[np.repeat(complete, m.warps_each)] = READY
    m.time.epoch[complete] += 1


def _fence_proxy(m, one):
    m.time.fenced[m.program_of[m.rows]] = m.time.now


def _nothing(m, one):
    pass


_HANDLERS = [
    (re.compile(pattern), function, kind)
    for pattern, function, kind in (
        (r"bra(?:\.uni)?", _branch, "control"),
        (r"ret|exit", _exit, "control"),
        (r"(?:bar|barrier)\.sync(?:\.aligned)?", _barrier, "control"),
        (r"fence\.proxy\.async\.shared::cta", _fence_proxy, "thread"),
        (r"bar\.warp\.sync|wgmma\.fence\.sync\.aligned|fence\.mbarrier_init\.release\.cluster", _nothing, "warp"),
        *data_movement.HANDLERS,
        *matrix_units.HANDLERS,
        *tcgen05.HANDLERS,
    )
]

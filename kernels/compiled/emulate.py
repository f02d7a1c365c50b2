"""Runs the compiled kernels without a GPU: inside `emulated(target)`, backend="triton" works on CPU tensors.

    from kernels.compiled import emulated
    with emulated("sm_90"):
        out = sliding_gqa_attention(q, k, v, 256, backend="triton")     # q, k, v on the CPU

The launchers choose their tiles as on the card named, Triton compiles to PTX, and the PTX is executed on the tensors'
own memory, thread by thread. docs/kernels.md says what that shows and what it cannot.
"""

import contextlib
import functools
import struct

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ..backends import triton as backend
from ..backends.triton import tile_configs
from .compile import TargetOnly, card_of
from .machine import Code, Machine
from .memory import GlobalMemory
from .ptx import parse

THREADS_AT_ONCE = 4096  # programs of so many threads run side by side: fewer, larger NumPy operations
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 170}


@contextlib.contextmanager
def emulated(target, *, counter=None, watch=None, edit=None):
    """Kernels launched inside run as compiled for `target`, "sm_80" to "sm_120". Not for several threads at a time.

    counter   a `counts.Counter` that receives what is executed.
    watch     called as watch(machine, instruction) after every instruction: to stop at a line of the kernel's source,
              look at instruction.source, and read machine.registers and machine.shared.
    edit      called as edit(kernel name, PTX text), returns the text to run: for deliberate faults.

    Results of torch.empty are NaN inside, so that what a kernel does not write is seen. Raises memory.Fault for what
    hardware forbids or leaves undefined, and machine.UnknownOpcode for instructions that the emulator lacks.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("kernels were decorated with TRITON_INTERPRET=1: emulate in a process without it")
    card = card_of(target)
    if target not in MULTIPROCESSORS:
        raise ValueError(f"{target} has no PTX to run: wanted one of {', '.join(MULTIPROCESSORS)}")
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    active, hook = driver._active, knobs.runtime.add_stages_inspection_hook
    replaced = [
        (backend, "why_not_on", lambda device: None if device.type == "cpu" else f"{target} is emulated on the CPU"),
        (tile_configs, "architecture", lambda device: card.number),
        (tile_configs, "processors", lambda device: MULTIPROCESSORS[target]),
    ]
    before = [getattr(module, name) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    driver.set_active(_Emulator(GPUTarget("cuda", card.number, card.warp_size), counter, watch, edit))
    knobs.runtime.add_stages_inspection_hook = _without_assembler
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        knobs.runtime.add_stages_inspection_hook = hook
        driver.set_active(active)
        for (module, name, _), value in zip(replaced, before, strict=True):
            setattr(module, name, value)


def _without_assembler(backend=None, stages=None, *others):
    """Triton's hook for its stages: PTX takes the place of machine code, so that nothing has to be assembled."""
    if stages is not None:
        stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return "kernels.compiled.emulate", "ptx instead of a cubin"


class _Emulator(TargetOnly):
    """Triton's driver for an emulated card: its own path from a launch to "the GPU" ends in `_launch`."""

    def __init__(self, target, counter, watch, edit):
        super().__init__(target)
        self.utils = self
        self.counter, self.watch, self.edit = counter, watch, edit

    def get_device_properties(self, device):
        return {"max_shared_mem": card_of(f"sm_{device}").shared_per_block}

    def load_binary(self, name, binary, shared, device):
        """(module, function, registers, spills, most threads), as the CUDA driver's."""
        return None, (name, binary), 0, 0, 1024

    def launcher_cls(self, source, metadata):
        return functools.partial(self._launch, source, metadata)

    def _launch(
        self, source, metadata, grid, grid_y, grid_z, stream, function, packed, launch_metadata, enter, leave, *values
    ):
        name, binary = function
        text = binary.decode()
        if self.edit is not None:
            text = self.edit(name, text)
        types = source.signature
        flat = [
            one for (path, type_), value in zip(types.items(), values, strict=True) for one in _flat(path, type_, value)
        ]
        run(code_of(text), grid, flat, metadata.shared, self.counter, self.watch)


def _flat(path, type_, value):
    """(name, type, value) of the parameters that an argument becomes: none of a constant, several of a tuple."""
    if isinstance(type_, tuple):
        for i, (one, part) in enumerate(zip(type_, value, strict=True)):
            yield from _flat(f"{path}[{i}]", one, part)
    elif type_ != "constexpr":
        yield path, type_, value


@functools.lru_cache(256)
def code_of(text):
    return Code(parse(text))


def run(code, grid, parameters, shared_bytes, counter=None, watch=None):
    """Runs a grid of programs. parameters: (name, Triton's type, value) in the order of the kernel's."""
    tensors = [(name, value) for name, _, value in parameters if isinstance(value, torch.Tensor)]
    memory = GlobalMemory(tensors)
    bits = [_bits(type_, value) for _, type_, value in parameters]
    # Triton appends pointers to scratch memory, which these kernels do not use
    names = [name for name, _ in code.program.parameters]
    arguments = dict(zip(names, bits + [0] * (len(names) - len(bits)), strict=True))
    side_by_side = max(1, THREADS_AT_ONCE // code.program.threads)
    if counter is not None:
        counter.begin(code.program)
    for first in range(0, grid, side_by_side):
        ids = range(first, min(first + side_by_side, grid))
        machine = Machine(code, arguments, memory, shared_bytes, ids, grid, counter, watch)
        machine.run()
        if counter is not None:
            counter.end(machine)


def _bits(type_, value):
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if type_ == "fp32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    if type_ == "fp64":
        return struct.unpack("<Q", struct.pack("<d", value))[0]
    if type_[0] in "iu":
        return int(value) & ((1 << 64) - 1)
    raise TypeError(f"a kernel's argument of type {type_}: {value!r}")

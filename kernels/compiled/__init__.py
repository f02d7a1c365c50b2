"""The kernels as compiled, on a machine without a GPU: compile for a card, read the machine code, run the PTX.

Nothing else in `kernels` imports this package.
"""

from .compile import LIMITS, Compiled, Launch, Limits, compile_launch, launches, limits, recorded
from .emulate import emulated
from .machine import UnknownOpcode
from .memory import Fault

__all__ = [
    "LIMITS",
    "Compiled",
    "Fault",
    "Launch",
    "Limits",
    "UnknownOpcode",
    "compile_launch",
    "emulated",
    "launches",
    "limits",
    "recorded",
]

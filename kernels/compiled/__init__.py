"""The kernels as compiled, on a machine without a GPU: compile for a card, read the machine code, run the PTX.

Nothing else in `kernels` imports this package.
"""

from .compile import CARDS, Card, Compiled, Launch, card_of, compile_launch, launches, recorded, resident_blocks
from .emulate import emulated
from .machine import UnknownOpcode
from .memory import Fault

__all__ = [
    "CARDS",
    "Card",
    "Compiled",
    "Fault",
    "Launch",
    "UnknownOpcode",
    "card_of",
    "compile_launch",
    "emulated",
    "launches",
    "recorded",
    "resident_blocks",
]

"""The kernels as compiled, on a machine without a GPU: compile for a card, read the machine code.

Nothing else in `kernels` imports this package.
"""

from .compile import CARDS, Card, Compiled, Launch, card_of, compile_launch, launches, recorded, resident_blocks

__all__ = [
    "CARDS",
    "Card",
    "Compiled",
    "Launch",
    "card_of",
    "compile_launch",
    "launches",
    "recorded",
    "resident_blocks",
]

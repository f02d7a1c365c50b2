"""The kernels as compiled, on a machine without a GPU: compile for a card, read the machine code.

Nothing else in `kernels` imports this package.
"""

from .compile import LIMITS, Compiled, Launch, Limits, compile_launch, launches, limits, recorded

__all__ = ["LIMITS", "Compiled", "Launch", "Limits", "compile_launch", "launches", "limits", "recorded"]

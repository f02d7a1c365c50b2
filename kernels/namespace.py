"""The namespace of this copy's operators in torch.ops.

Operators are of the process, and a name can be defined once. So each copy of this package has a namespace of its own,
made of the name that it is imported under and its version: a checkout, an installed wheel and copies of the Kernel Hub
can be loaded together.
"""

import re

import torch

from . import __version__

# a checkout is imported as `kernels`, which says little beside other operators
NAMESPACE = "sliding_gqa" if __package__ == "kernels" else re.sub(r"\W", "_", f"{__package__}_{__version__}")
OPERATORS = getattr(torch.ops, NAMESPACE)

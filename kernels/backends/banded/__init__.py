"""Attention, rotation and decoding in PyTorch with a cost linear in the length: the backend for CPUs."""

from . import token_step
from .attention import attend, attend_backward
from .decode import append, attend_to_cache
from .keeping import attend_keeping
from .qk_norm import norm_rotate, norm_rotate_backward
from .rope import rotate

READS_LENGTHS = False
BACKWARD_READS_LSE = False  # but with sinks, where lse is always made

__all__ = [
    "append",
    "attend",
    "attend_backward",
    "attend_keeping",
    "attend_to_cache",
    "norm_rotate",
    "norm_rotate_backward",
    "rotate",
    "token_step",
]


def why_not(device, dtype=None, head_dim=None):
    """It runs everywhere: None."""
    return None

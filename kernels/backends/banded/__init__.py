"""Attention, rotation and decoding in PyTorch with a cost linear in the length: the backend for CPUs."""

from .attention import attend, attend_backward, attend_keeping
from .decode import append, attend_to_cache
from .rope import rotate

READS_LENGTHS = False

__all__ = ["READS_LENGTHS", "append", "attend", "attend_backward", "attend_keeping", "attend_to_cache", "rotate"]


def why_not(device, dtype=None, head_dim=None):
    """It runs everywhere: None."""
    return None

"""What the launchers share on the host: strides, grids, packed heads and the scales of a softmax."""

import math

from .tiles import LOG2_E


def strides_of(*tensors):
    """(UNIT, a tuple of the first three strides of each tensor, in units of UNIT elements); of None they are 0.

    Tiles are loaded 128 bits a thread where the compiler knows that rows begin at multiples of 16 bytes, and of strides
    it learns whether 16 divides them, nothing finer. Heads of 72 or 120 elements need to know that 8 does.
    """
    strides = tuple([(0, 0, 0) if x is None else x.stride()[:3] for x in tensors])
    bits = 0  # of all strides: a power of two divides each of them if it divides this
    for first, second, third in strides:
        bits |= first | second | third
    if bits % 16 == 0 or bits % 8 != 0:
        return 1, strides
    return 8, tuple([(first // 8, second // 8, third // 8) for first, second, third in strides])


def blocks_of(length, block):
    """How many blocks of `block` cover `length`; triton.cdiv, made for kernels too, is slow on the host."""
    return -(-length // block)


def packed_heads(group, rows):
    """How many heads of a group share a tile of `rows` rows: the largest power of two that divides both."""
    return math.gcd(group & -group, rows)


def softmax_scales(scale, softcap):
    """(scale_log2, cap_scale) with which a score s weighs 2 ** (scale_log2 * t), t = s or tanh(s * cap_scale)."""
    return (scale * LOG2_E.value, None) if softcap is None else (softcap * LOG2_E.value, scale / softcap)

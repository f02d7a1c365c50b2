"""The tiles that tune_tiles.py tries, by pass: all combinations that could fit into a thread's registers."""

import itertools

from speed_of_light import padded

from kernels.tuning import TileConfig

LARGEST_HEAD = 256
ATTENTION = ("forward", "dq", "dkdv")
WIDTHS = {  # (edge, step)
    2: ((16, 32), (32, 32), (32, 64), (32, 128)),
    4: ((16, 16), (16, 32), (32, 32)),
}
OWN = {2: (128, 64, 32), 4: (64, 32, 16)}
# Numbers that a thread of 255 registers can be asked to hold. The compiler's own needs come on top: splitting fp32
# operands into TF32 pairs takes about as much again
MOST_NUMBERS = {2: 260, 4: 150}
# Of a thread: below that a tile is cut finer than its warps can use
FEWEST_SCORES = {2: 4, 4: 1}
ROTARY_PAIRS = (4, 8, 16)  # a thread's


def candidates(name, head_dim, element_bytes):
    """[TileConfig] of a pass; those that come first are preferred where the model says the same of two.

    Raises ValueError for a head size past 256 or an unknown pass.
    """
    if head_dim > LARGEST_HEAD:
        raise ValueError(f"head size {head_dim} is past {LARGEST_HEAD}")
    size = min(element_bytes, 4)
    if name in ATTENTION:
        found = [
            TileConfig(own, edge, step, warps, stages)
            for own, (edge, step), warps, stages in itertools.product(OWN[size], WIDTHS[size], (4, 8), (2, 1))
            if own * step >= FEWEST_SCORES[size] * 32 * warps
            and numbers(name, own, step, padded(head_dim), size) <= MOST_NUMBERS[size] * 32 * warps
        ]
        # one stage, which waits for every load, is for those whose second buffer does not fit
        return [one for one in found if one.num_stages == 2 or padded(head_dim) * size > 512]
    if name == "decode":
        return [
            TileConfig(own, step, step, warps, stages)
            for own, step, warps, stages in itertools.product((64, 32, 16), (32, 64, 128, 16), (4, 8), (3, 2, 4))
            if own * padded(head_dim) <= 128 * 32 * warps
        ]
    if name == "rotary":
        half = padded(head_dim) // 2
        return [
            TileConfig(tokens, heads, heads, warps, 1)
            for pairs, heads, warps in itertools.product(ROTARY_PAIRS, (4, 2, 8), (4, 8))
            if (tokens := pairs * 32 * warps // (heads * half)) > 0
        ]
    raise ValueError(f"there is no pass {name!r}")


def numbers(name, own, step, width, element_bytes):
    """32-bit numbers that a program keeps in registers: accumulators, what it owns of q and do, scores."""
    operand = own * width * element_bytes // 4
    return {
        "forward": own * width + operand + 2 * own * step,
        "dq": own * width + 2 * operand + 2 * own * step,
        "dkdv": 2 * own * width + 2 * own * step,
    }[name]

"""Tile shapes by pass, element size, architecture and head size: a table and one look-up, no search at run time.

A kernel's program owns `own` rows of its tile (packed queries in the forward and dq passes, keys in dk/dv) and walks
the others in steps: `edge` where a mask is needed, `step` in the interior. A narrow edge keeps the band tight, a wide
interior spreads what a step costs whatever its width.

Attention: `python benchmarks/tune_tiles.py`, with Triton 3.7.1, compiles candidates, drops what spills with or without
rope, sinks, softcap and a gradient of lse, and ranks the rest by a model of the card's pipes. No GPU has timed them.
  searched  bf16 at head sizes 64 and 128 on all cards (sm_89 has sm_86's entries), at 96 on sm_80 and sm_90; fp32 at 64
            and 128 on sm_80, its forward on all. None of those in bf16 spills.
  compiled  with everything at once and half of the head rotated: bf16 at 32, 96 and 256, on sm_80 and sm_90 at 16,
            which spill nowhere; fp32 at 32, 64, 96, 128 and 256; for gfx942, which has Ampere's tiles, bf16 at 64 and
            128.
  spills    then, in bytes a thread: fp32 dk/dv at 64, sm_80 16, sm_86 12, sm_100 20, sm_120 40 (what does not, steps of
            16 rows, takes 1.5 times as long in the model), at 32 44 to 132, at 96 12 to 40, at 128 12 on sm_120; fp32
            dq at 32 and 96 up to 16 on sm_100 and sm_120; fp32 forward at 128 on sm_90 16 (what does not: 1.3 times as
            long); all fp32 passes at 256: forward 4 to 72, dq 224 to 400, dk/dv 672 to 876; dq at 128 on gfx942 108.
`python benchmarks/kernel_report.py --features half-all` shows what all of them compile to.

Rotation: own tokens of step heads, 16 pairs for each of 128 threads at most, in 54 to 98 registers; there is no edge.
Decoding: own is the most rows; one token of a group of up to 16 heads takes 16. Memory is the limit: a tile of keys and
values has up to 32 kB, two are under way, and two programs (on consumer GPUs one) fit a multiprocessor's memory.
Compiled with everything at head sizes 16 to 256, 64 rows, on all cards but sm_89: only fp32 at 256 spills, 4 to 44
bytes.
"""

import functools
from typing import NamedTuple

import torch


class TileConfig(NamedTuple):
    own: int
    edge: int
    step: int
    num_warps: int
    num_stages: int


# Compute capabilities as numbers. An architecture takes the tiles of the last family that is not newer than itself, so
# that an unknown one takes those of its nearest kin; where a family has none of its own, those of the next one here.
AMPERE, CONSUMER, HOPPER, BLACKWELL, CONSUMER_BLACKWELL = 80, 86, 90, 100, 120
AMD = 942  # gfx942; every AMD GPU counts as one
FAMILIES = {
    AMPERE: (AMPERE,),
    CONSUMER: (CONSUMER, AMPERE),  # 99 kB of shared memory a program, in place of 163
    HOPPER: (HOPPER, AMPERE),  # 227 kB, and products of warp groups
    BLACKWELL: (BLACKWELL, HOPPER, AMPERE),  # 227 kB, and tensor memory
    CONSUMER_BLACKWELL: (CONSUMER_BLACKWELL, CONSUMER, AMPERE),  # 99 kB, and Ampere's products
    AMD: (AMD, AMPERE),  # 64 kB
}
# {(pass, bytes an element): {family: {largest head size: config}}}
CONFIGS = {
    ("forward", 2): {
        AMPERE: {
            64: TileConfig(128, 32, 64, 4, 2),
            96: TileConfig(128, 32, 64, 8, 3),
            128: TileConfig(128, 32, 64, 8, 2),
            256: TileConfig(64, 32, 32, 8, 2),
        },
        HOPPER: {
            64: TileConfig(128, 32, 64, 4, 2),
            96: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(128, 32, 64, 8, 3),
            256: TileConfig(64, 32, 32, 8, 2),
        },
    },
    ("dq", 2): {
        AMPERE: {
            64: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(128, 32, 32, 8, 2),
            256: TileConfig(32, 32, 32, 8, 2),
        },
        HOPPER: {
            64: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(128, 32, 64, 8, 2),
            256: TileConfig(64, 16, 32, 8, 2),
        },
    },
    ("dkdv", 2): {
        AMPERE: {
            64: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(64, 16, 32, 4, 2),
            256: TileConfig(32, 32, 32, 8, 2),
        },
        HOPPER: {
            64: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(64, 16, 32, 4, 2),
            256: TileConfig(32, 32, 32, 8, 2),
        },
        CONSUMER_BLACKWELL: {
            64: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(64, 32, 64, 8, 2),
            256: TileConfig(32, 32, 32, 8, 2),
        },
    },
    ("decode", 2): {
        AMPERE: {
            32: TileConfig(64, 64, 64, 4, 3),
            64: TileConfig(64, 128, 128, 4, 3),
            128: TileConfig(64, 64, 64, 4, 3),
            256: TileConfig(32, 32, 32, 8, 3),
        },
        CONSUMER: {
            32: TileConfig(64, 64, 64, 4, 3),
            64: TileConfig(64, 128, 128, 4, 3),
            128: TileConfig(32, 64, 64, 4, 3),
            256: TileConfig(32, 32, 32, 8, 3),
        },
        CONSUMER_BLACKWELL: {
            32: TileConfig(64, 64, 64, 4, 3),
            128: TileConfig(32, 64, 64, 4, 3),
            256: TileConfig(32, 32, 32, 8, 3),
        },
    },
    ("decode", 4): {
        AMPERE: {
            32: TileConfig(32, 32, 32, 4, 3),
            64: TileConfig(32, 64, 64, 8, 3),
            128: TileConfig(16, 32, 32, 8, 2),
            256: TileConfig(16, 16, 16, 8, 2),
        },
    },
    ("rotary", 2): {
        AMPERE: {
            16: TileConfig(64, 4, 4, 4, 1),
            32: TileConfig(32, 4, 4, 4, 1),
            64: TileConfig(16, 4, 4, 4, 1),
            128: TileConfig(8, 4, 4, 4, 1),
            256: TileConfig(4, 4, 4, 4, 1),
            512: TileConfig(2, 4, 4, 4, 1),
            1024: TileConfig(1, 4, 4, 4, 1),
        },
    },
    ("rotary", 4): {
        AMPERE: {
            16: TileConfig(64, 4, 4, 4, 1),
            32: TileConfig(32, 4, 4, 4, 1),
            64: TileConfig(16, 4, 4, 4, 1),
            128: TileConfig(8, 4, 4, 4, 1),
            256: TileConfig(4, 4, 4, 4, 1),
            512: TileConfig(2, 4, 4, 4, 1),
            1024: TileConfig(1, 4, 4, 4, 1),
        },
    },
    ("forward", 4): {
        AMPERE: {
            128: TileConfig(32, 16, 32, 4, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
        CONSUMER: {
            64: TileConfig(32, 16, 32, 4, 2),
            128: TileConfig(16, 16, 32, 4, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
        HOPPER: {
            64: TileConfig(64, 16, 32, 4, 2),
            128: TileConfig(32, 16, 32, 4, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
        BLACKWELL: {
            64: TileConfig(64, 32, 32, 8, 2),
            128: TileConfig(16, 16, 32, 4, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
        CONSUMER_BLACKWELL: {
            64: TileConfig(32, 16, 16, 4, 2),
            128: TileConfig(16, 16, 32, 4, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
    },
    ("dq", 4): {
        AMPERE: {
            64: TileConfig(32, 16, 32, 4, 2),
            128: TileConfig(16, 16, 16, 4, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
    },
    ("dkdv", 4): {
        AMPERE: {
            64: TileConfig(32, 16, 32, 4, 2),
            128: TileConfig(16, 16, 16, 4, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
    },
}
# Triton's interpreter costs time per operation, not per element; and fp64 only runs there
INTERPRETED = TileConfig(64, 32, 64, 4, 1)


@functools.cache
def architecture(device):
    """The compute capability of a CUDA device as a number, 90 for Hopper; 0 where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    if torch.version.hip is not None:
        return AMD
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device):
    """Multiprocessors of a CUDA device; 1 for the interpreter, which runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tile_config(name, head_dim, dtype, arch):
    """The TileConfig of a pass, "forward", "dq", "dkdv", "decode" or "rotary", for heads of head_dim elements on arch.

    For "rotary" head_dim counts what is rotated; its tile is small enough to be interpreted as it is.
    Raises ValueError for attention with heads that are larger than the table's.
    """
    if name == "rotary":
        arch = arch or AMPERE
    elif arch == 0 or dtype.itemsize > 4:
        return INTERPRETED
    by_family = CONFIGS[name, min(dtype.itemsize, 4)]
    sizes = sizes_of(by_family, max((family for family in FAMILIES if family <= arch), default=AMPERE))
    largest = max(sizes)
    if head_dim > largest and name != "rotary":
        raise ValueError(
            f"q has head size {head_dim}, expected at most {largest}, the largest that has tiles: use backend='banded'"
        )
    return next((config for size, config in sizes.items() if head_dim <= size), sizes[largest])


def sizes_of(by_family, family):
    """{largest head size: TileConfig} of a family in one entry of CONFIGS: its own, or its next kin's."""
    return next(by_family[kin] for kin in FAMILIES[family] if kin in by_family)


def dot_precision(dtype, arch):
    """How fp32 matrix products are made: from three TF32 ones, which give fp32's accuracy on the tensor cores.

    One TF32 product keeps 11 bits; fp32's own units ("ieee") take 4 to 8 times the instructions and spill at any size.
    """
    return "tf32x3" if dtype == torch.float32 and 0 < arch < AMD else "ieee"

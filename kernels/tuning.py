"""Tile shapes by pass, element size, architecture and head size: a table and one look-up, no search at run time.

A kernel's program owns `own` rows of its tile (packed queries in the forward and dq passes, keys in dk/dv) and walks
the others in steps: `edge` where a mask is needed, `step` in the interior. A narrow edge keeps the band tight, a wide
interior spreads what a step costs whatever its width.

`python benchmarks/tune_tiles.py --write` made the table, with Triton 3.7.1: all passes at head sizes 16, 32, 64, 96,
128, 256, in bf16 (checked in fp16 too) and fp32, for one card of each family; sm_89 has sm_86's. It compiles every tile
that a thread's registers could hold, drops what spills with rope, or with sinks, softcap, a gradient of lse and half a
rotation at once, and ranks the rest by a model of the card (benchmarks/speed_of_light.py, memory_bound.py). No GPU has
timed them.
Spills, in bytes a thread, with everything at once: fp32 at 256, whose 16 rows, the least of a product, are too many
(forward 4 to 28, dq 224 to 388, dk/dv 672 to 876, decoding 4 to 44; on gfx942 dk/dv, 308; the search did not come to
dk/dv, decoding and the rotation there); bf16 dk/dv at 256 on gfx942, 364; decoding one token in fp32 at 32 on sm_120,
24. Head sizes between take the tiles of the next larger one: those of 72 and 120 elements spill up to 28.
`python benchmarks/kernel_report.py --features half-all` shows what all of them compile to.

Rotation: own tokens of step heads; there is no edge. Sizes past 256 go on with 16 pairs for each of 128 threads.
Decoding: own is the most rows; one token of a group of up to 16 heads takes 16. A step is the keys of one copy.
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
            16: TileConfig(128, 32, 64, 4, 2),
            32: TileConfig(128, 16, 32, 4, 2),
            64: TileConfig(128, 32, 64, 4, 2),
            96: TileConfig(128, 32, 64, 8, 3),
            128: TileConfig(128, 32, 64, 8, 2),
            256: TileConfig(32, 16, 32, 4, 2),
        },
        CONSUMER: {
            16: TileConfig(128, 32, 64, 4, 2),
            32: TileConfig(64, 16, 32, 4, 2),
            64: TileConfig(128, 32, 64, 4, 2),
            96: TileConfig(128, 32, 64, 8, 3),
            128: TileConfig(128, 32, 64, 8, 2),
            256: TileConfig(32, 32, 32, 4, 2),
        },
        HOPPER: {
            64: TileConfig(128, 32, 64, 4, 2),
            96: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(128, 32, 64, 8, 3),
            256: TileConfig(64, 32, 64, 8, 2),
        },
        BLACKWELL: {
            64: TileConfig(128, 32, 64, 4, 2),
            96: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(128, 32, 64, 8, 3),
            256: TileConfig(64, 32, 32, 8, 2),
        },
        CONSUMER_BLACKWELL: {
            64: TileConfig(128, 32, 64, 4, 2),
            96: TileConfig(128, 32, 64, 8, 3),
            128: TileConfig(128, 32, 64, 8, 2),
            256: TileConfig(64, 32, 32, 8, 2),
        },
        AMD: {
            64: TileConfig(128, 32, 64, 4, 2),
            128: TileConfig(128, 32, 32, 4, 2),
            256: TileConfig(64, 16, 32, 4, 2),
        },
    },
    ("dq", 2): {
        AMPERE: {
            32: TileConfig(64, 32, 64, 4, 2),
            64: TileConfig(128, 32, 32, 4, 2),
            128: TileConfig(128, 32, 32, 8, 2),
            256: TileConfig(32, 32, 64, 4, 2),
        },
        CONSUMER: {
            64: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(128, 32, 32, 8, 2),
            256: TileConfig(32, 32, 32, 4, 2),
        },
        HOPPER: {
            64: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(128, 32, 64, 8, 2),
            256: TileConfig(64, 16, 32, 8, 2),
        },
        BLACKWELL: {
            32: TileConfig(64, 32, 64, 4, 2),
            64: TileConfig(128, 32, 32, 4, 2),
            96: TileConfig(64, 32, 128, 8, 2),
            128: TileConfig(128, 32, 64, 8, 2),
            256: TileConfig(64, 16, 32, 8, 2),
        },
        CONSUMER_BLACKWELL: {
            64: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(128, 32, 32, 8, 2),
            256: TileConfig(32, 32, 32, 8, 2),
        },
        AMD: {
            64: TileConfig(128, 16, 32, 4, 2),
            96: TileConfig(64, 32, 32, 4, 2),
            128: TileConfig(64, 16, 32, 4, 2),
            256: TileConfig(32, 16, 32, 4, 2),
        },
    },
    ("dkdv", 2): {
        AMPERE: {
            32: TileConfig(128, 32, 32, 4, 2),
            64: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(64, 16, 32, 4, 2),
            256: TileConfig(32, 32, 64, 8, 2),
        },
        CONSUMER: {
            64: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(64, 16, 32, 4, 2),
            256: TileConfig(32, 32, 32, 8, 2),
        },
        HOPPER: {
            64: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(64, 16, 32, 4, 2),
            256: TileConfig(32, 32, 64, 8, 2),
        },
        BLACKWELL: {
            64: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(64, 16, 32, 4, 2),
            256: TileConfig(64, 32, 32, 8, 2),
        },
        CONSUMER_BLACKWELL: {
            16: TileConfig(32, 32, 128, 4, 2),
            64: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(64, 32, 64, 8, 2),
            256: TileConfig(32, 32, 32, 8, 2),
        },
        AMD: {
            64: TileConfig(128, 16, 32, 4, 2),
            128: TileConfig(64, 16, 32, 4, 2),
            256: TileConfig(32, 16, 32, 4, 2),
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
        BLACKWELL: {
            32: TileConfig(64, 64, 64, 4, 3),
            64: TileConfig(64, 128, 128, 4, 3),
            128: TileConfig(64, 64, 64, 4, 3),
            256: TileConfig(32, 32, 32, 4, 4),
        },
        CONSUMER_BLACKWELL: {
            32: TileConfig(64, 64, 64, 4, 3),
            128: TileConfig(32, 64, 64, 4, 3),
            256: TileConfig(32, 32, 32, 8, 3),
        },
        AMD: {
            32: TileConfig(64, 64, 64, 4, 3),
            64: TileConfig(64, 128, 128, 4, 3),
            96: TileConfig(64, 64, 64, 4, 3),
            128: TileConfig(64, 16, 16, 4, 3),
            256: TileConfig(32, 32, 32, 8, 3),
        },
    },
    ("decode", 4): {
        AMPERE: {
            32: TileConfig(32, 32, 32, 4, 3),
            64: TileConfig(32, 64, 64, 8, 3),
            128: TileConfig(16, 32, 32, 4, 2),
            256: TileConfig(16, 16, 16, 8, 2),
        },
        CONSUMER: {
            32: TileConfig(32, 32, 32, 4, 3),
            64: TileConfig(32, 64, 64, 8, 3),
            128: TileConfig(16, 32, 32, 8, 2),
            256: TileConfig(16, 16, 16, 8, 2),
        },
        HOPPER: {
            32: TileConfig(32, 32, 32, 4, 3),
            64: TileConfig(32, 64, 64, 8, 3),
            128: TileConfig(16, 32, 32, 4, 3),
            256: TileConfig(16, 16, 16, 8, 2),
        },
        BLACKWELL: {
            32: TileConfig(32, 32, 32, 4, 3),
            64: TileConfig(16, 64, 64, 4, 2),
            128: TileConfig(32, 32, 32, 4, 3),
            256: TileConfig(16, 16, 16, 8, 2),
        },
        AMD: {
            32: TileConfig(32, 32, 32, 4, 3),
            64: TileConfig(64, 16, 16, 4, 3),
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
        AMD: {
            16: TileConfig(8, 8, 8, 4, 1),
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
        AMD: {
            16: TileConfig(8, 8, 8, 4, 1),
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
            32: TileConfig(64, 16, 32, 4, 2),
            64: TileConfig(64, 16, 16, 4, 2),
            96: TileConfig(16, 32, 32, 4, 2),
            128: TileConfig(32, 16, 32, 4, 2),
            256: TileConfig(16, 16, 32, 8, 2),
        },
        CONSUMER: {
            16: TileConfig(64, 16, 16, 4, 2),
            32: TileConfig(64, 16, 32, 4, 2),
            64: TileConfig(32, 16, 32, 4, 2),
            128: TileConfig(16, 16, 32, 4, 2),
            256: TileConfig(16, 16, 32, 8, 1),
        },
        HOPPER: {
            64: TileConfig(64, 16, 32, 4, 2),
            128: TileConfig(16, 32, 32, 4, 2),
            256: TileConfig(16, 16, 32, 8, 2),
        },
        BLACKWELL: {
            64: TileConfig(64, 32, 32, 4, 2),
            128: TileConfig(16, 16, 32, 4, 2),
            256: TileConfig(16, 16, 32, 8, 1),
        },
        CONSUMER_BLACKWELL: {
            16: TileConfig(32, 16, 16, 4, 2),
            32: TileConfig(16, 16, 32, 4, 2),
            64: TileConfig(32, 16, 16, 4, 2),
            128: TileConfig(16, 16, 32, 4, 2),
            256: TileConfig(16, 16, 32, 8, 1),
        },
        AMD: {
            16: TileConfig(64, 16, 16, 4, 2),
            128: TileConfig(32, 16, 32, 4, 2),
            256: TileConfig(64, 16, 16, 8, 2),
        },
    },
    ("dq", 4): {
        AMPERE: {
            16: TileConfig(64, 16, 32, 4, 2),
            64: TileConfig(64, 16, 16, 4, 2),
            128: TileConfig(16, 32, 32, 4, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
        CONSUMER: {
            16: TileConfig(64, 16, 32, 4, 2),
            64: TileConfig(32, 16, 32, 4, 2),
            128: TileConfig(16, 16, 16, 4, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
        HOPPER: {
            16: TileConfig(64, 32, 32, 4, 2),
            32: TileConfig(64, 16, 32, 4, 2),
            64: TileConfig(64, 32, 32, 4, 2),
            128: TileConfig(16, 32, 32, 4, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
        BLACKWELL: {
            16: TileConfig(32, 16, 32, 4, 2),
            32: TileConfig(16, 32, 32, 4, 2),
            64: TileConfig(32, 16, 32, 4, 2),
            128: TileConfig(16, 32, 32, 4, 2),
            256: TileConfig(16, 16, 32, 8, 1),
        },
        CONSUMER_BLACKWELL: {
            16: TileConfig(32, 16, 32, 4, 2),
            32: TileConfig(16, 16, 32, 4, 2),
            64: TileConfig(32, 16, 32, 4, 2),
            96: TileConfig(16, 32, 32, 8, 2),
            128: TileConfig(16, 16, 16, 4, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
        AMD: {
            32: TileConfig(32, 16, 32, 4, 2),
            64: TileConfig(64, 16, 16, 4, 2),
            256: TileConfig(16, 16, 16, 4, 2),
        },
    },
    ("dkdv", 4): {
        AMPERE: {
            32: TileConfig(64, 16, 16, 4, 2),
            64: TileConfig(32, 32, 32, 4, 2),
            96: TileConfig(16, 32, 32, 8, 2),
            128: TileConfig(16, 16, 16, 4, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
        CONSUMER: {
            16: TileConfig(64, 16, 16, 4, 2),
            64: TileConfig(16, 32, 32, 4, 2),
            96: TileConfig(16, 32, 32, 8, 2),
            128: TileConfig(16, 16, 16, 4, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
        HOPPER: {
            32: TileConfig(64, 32, 32, 4, 2),
            64: TileConfig(16, 32, 32, 4, 2),
            128: TileConfig(16, 32, 32, 8, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
        BLACKWELL: {
            16: TileConfig(64, 32, 32, 4, 2),
            32: TileConfig(64, 16, 16, 4, 2),
            64: TileConfig(64, 16, 32, 8, 2),
            128: TileConfig(16, 32, 32, 8, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
        CONSUMER_BLACKWELL: {
            16: TileConfig(32, 16, 32, 4, 2),
            64: TileConfig(16, 32, 32, 4, 2),
            128: TileConfig(16, 32, 32, 8, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
        AMD: {
            16: TileConfig(64, 16, 16, 4, 2),
            32: TileConfig(32, 16, 32, 4, 2),
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

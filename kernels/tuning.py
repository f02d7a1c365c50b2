"""Tile shapes by pass, element size, architecture and head size: a table and one look-up, no search at run time.

A kernel's program owns `own` rows of its tile (packed queries in the forward and dq passes, keys in dk/dv) and walks
the others in steps: `edge` where a mask is needed, `step` in the interior. A narrow edge keeps the band tight, a wide
interior spreads what a step costs whatever its width.

The table was made by compiling each candidate without and with rope, sinks and softcap (Triton 3.7.1, sm_80 and sm_90)
and taking, of those that spill no register, the fewest instructions per score. For fp16 and bf16 no entry spills at
head sizes that are powers of two, but for dq at 256 on Hopper; fp32 spills in the backward from 64 on, where smaller
tiles would cost more than they save.
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


# {(pass, bytes an element): {first architecture: {largest head size: config}}}
AMPERE, HOPPER = 80, 90
CONFIGS = {
    ("forward", 2): {
        AMPERE: {
            64: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(128, 32, 64, 8, 2),
            256: TileConfig(64, 32, 32, 8, 2),
        },
        HOPPER: {
            64: TileConfig(64, 32, 64, 4, 3),
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
            32: TileConfig(64, 32, 64, 4, 2),
            64: TileConfig(128, 32, 64, 8, 2),
            128: TileConfig(64, 32, 64, 8, 2),
            256: TileConfig(32, 32, 32, 8, 2),
        },
        HOPPER: {
            64: TileConfig(64, 32, 64, 4, 2),
            128: TileConfig(128, 32, 32, 8, 2),
            256: TileConfig(32, 32, 32, 8, 2),
        },
    },
    # own: the most rows; one token of a group of up to 16 heads takes 16. Memory is the limit: a tile of keys and
    # values has up to 32 kB, two are under way, and two programs (on consumer GPUs one) fit a multiprocessor's memory
    ("decode", 2): {
        AMPERE: {
            32: TileConfig(64, 64, 64, 4, 3),
            64: TileConfig(64, 128, 128, 4, 3),
            128: TileConfig(64, 64, 64, 4, 3),
            256: TileConfig(32, 32, 32, 8, 3),
        },
    },
    ("decode", 4): {
        AMPERE: {
            64: TileConfig(32, 64, 64, 8, 3),
            128: TileConfig(16, 32, 32, 8, 2),
            256: TileConfig(16, 16, 16, 8, 2),
        },
    },
    ("forward", 4): {
        AMPERE: {
            64: TileConfig(64, 32, 32, 8, 2),
            128: TileConfig(32, 16, 32, 8, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
    },
    ("dq", 4): {
        AMPERE: {
            64: TileConfig(32, 16, 32, 4, 2),
            128: TileConfig(32, 16, 32, 8, 2),
            256: TileConfig(16, 16, 16, 8, 1),
        },
    },
    ("dkdv", 4): {
        AMPERE: {
            64: TileConfig(32, 16, 32, 4, 2),
            128: TileConfig(32, 16, 32, 8, 2),
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
        return AMPERE  # 64 kB of shared memory, no asynchronous matrix unit: its tiles are the ones that fit
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile_config(name, head_dim, dtype, arch):
    """The TileConfig of pass `name` ("forward", "dq", "dkdv", "decode") for heads of head_dim elements on arch."""
    if arch == 0 or dtype.itemsize > 4:
        return INTERPRETED
    by_arch = CONFIGS[name, dtype.itemsize]
    # consumer Blackwell, sm_120, has the matrix instruction and the 99 kB of shared memory of consumer Ampere
    family = HOPPER if HOPPER <= arch < 120 and HOPPER in by_arch else AMPERE
    return next(config for largest, config in by_arch[family].items() if head_dim <= largest)


def dot_precision(dtype, arch):
    """How fp32 matrix products are made: from three TF32 ones, which give fp32's accuracy on the tensor cores.

    One TF32 product keeps 11 bits; fp32's own units ("ieee") take 4 to 8 times the instructions and spill at any size.
    """
    return "tf32x3" if dtype == torch.float32 and arch and torch.version.hip is None else "ieee"

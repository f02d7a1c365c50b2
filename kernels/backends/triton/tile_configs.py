"""Tile shapes by pass, element size, architecture and head size: one table and one look-up, no search at run time.

Forward and dq: a program owns BLOCK_M rows (packed queries) and walks keys, EDGE_N at a time where a mask is needed,
BLOCK_N in the interior. dk/dv: it owns BLOCK_N keys and walks rows, EDGE_M and BLOCK_M at a time. A narrow edge keeps
the band tight; a wide interior spreads the fixed cost of a step. Decoding: BLOCK_M is the most rows, one token of a
group of up to 16 heads takes 16; BLOCK_N keys are copied at a time.

`python benchmarks/tune_tiles.py --write` made the table with a model of each card, but for sm_90 in 16 bits at 64 and
128, which were timed. docs/kernels.md says how it searched, which entries spill, and by how much. A head size takes the
entry of the next larger one.
"""

import functools
from typing import NamedTuple

import torch
import triton

from . import LARGEST_HEAD


class RowTile(NamedTuple):
    """Of the forward and the dq kernel."""

    BLOCK_M: int
    EDGE_N: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class KeyTile(NamedTuple):
    """Of the dk/dv kernel."""

    BLOCK_N: int
    EDGE_M: int
    BLOCK_M: int
    num_warps: int
    num_stages: int


class DecodeTile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class RotaryTile(NamedTuple):
    BLOCK_T: int
    BLOCK_H: int
    num_warps: int


TILES = {"forward": RowTile, "dq": RowTile, "dkdv": KeyTile, "decode": DecodeTile}

# Compute capabilities as numbers. An architecture takes the tiles of the newest family that is not newer than itself;
# where that family has no entry, those of the next family listed here.
AMPERE, CONSUMER, HOPPER, BLACKWELL, CONSUMER_BLACKWELL = 80, 86, 90, 100, 120
AMD = 942  # gfx942; every AMD GPU counts as one
FAMILIES = {
    AMPERE: (AMPERE,),
    CONSUMER: (CONSUMER, AMPERE),  # 99 kB of shared memory a program instead of 163
    HOPPER: (HOPPER, AMPERE),  # 227 kB, and products of warp groups
    BLACKWELL: (BLACKWELL, HOPPER, AMPERE),  # 227 kB, and tensor memory
    CONSUMER_BLACKWELL: (CONSUMER_BLACKWELL, CONSUMER, AMPERE),  # 99 kB, and Ampere's products
    AMD: (AMD, AMPERE),  # 64 kB
}
# {(pass, bytes an element): {family: {largest head size: the fields of its tile}}}
# fmt: off
CONFIGS = {
    ("forward", 2): {
        AMPERE: {16: (128, 32, 64, 4, 2), 32: (128, 16, 32, 4, 2), 64: (128, 32, 64, 4, 2), 96: (128, 32, 64, 8, 3),
                 128: (128, 32, 64, 8, 2), 256: (32, 16, 32, 4, 2)},
        CONSUMER: {16: (128, 32, 64, 4, 2), 32: (64, 16, 32, 4, 2), 64: (128, 32, 64, 4, 2), 96: (128, 32, 64, 8, 3),
                   128: (128, 32, 64, 8, 2), 256: (32, 32, 32, 4, 2)},
        HOPPER: {64: (128, 32, 64, 8, 3), 96: (64, 32, 64, 4, 2), 128: (64, 16, 64, 4, 3), 256: (64, 32, 64, 8, 2)},
        BLACKWELL: {64: (128, 32, 64, 4, 2), 96: (64, 32, 64, 4, 2), 128: (128, 32, 64, 8, 3),
                    256: (64, 32, 32, 8, 2)},
        CONSUMER_BLACKWELL: {64: (128, 32, 64, 4, 2), 96: (128, 32, 64, 8, 3), 128: (128, 32, 64, 8, 2),
                             256: (64, 32, 32, 8, 2)},
        AMD: {64: (128, 32, 64, 4, 2), 128: (128, 32, 32, 4, 2), 256: (64, 16, 32, 4, 2)},
    },
    ("dq", 2): {
        AMPERE: {32: (64, 32, 64, 4, 2), 64: (128, 32, 32, 4, 2), 128: (128, 32, 32, 8, 2), 256: (32, 32, 64, 4, 2)},
        CONSUMER: {64: (64, 32, 64, 4, 2), 128: (128, 32, 32, 8, 2), 256: (32, 32, 32, 4, 2)},
        HOPPER: {64: (128, 32, 64, 8, 3), 128: (64, 32, 64, 4, 2), 256: (64, 16, 32, 8, 2)},
        BLACKWELL: {32: (64, 32, 64, 4, 2), 64: (128, 32, 32, 4, 2), 96: (64, 32, 128, 8, 2),
                    128: (128, 32, 64, 8, 2), 256: (64, 16, 32, 8, 2)},
        CONSUMER_BLACKWELL: {64: (64, 32, 64, 4, 2), 128: (128, 32, 32, 8, 2), 256: (32, 32, 32, 8, 2)},
        AMD: {64: (128, 16, 32, 4, 2), 96: (64, 32, 32, 4, 2), 128: (64, 16, 32, 4, 2), 256: (32, 16, 32, 4, 2)},
    },
    ("dkdv", 2): {
        AMPERE: {32: (128, 32, 32, 4, 2), 64: (64, 32, 64, 4, 2), 128: (64, 32, 32, 4, 2), 256: (32, 32, 64, 8, 2)},
        CONSUMER: {64: (64, 32, 64, 4, 2), 128: (64, 16, 32, 4, 2), 256: (32, 32, 32, 8, 2)},
        HOPPER: {64: (64, 64, 64, 4, 3), 128: (64, 32, 32, 4, 3), 256: (32, 32, 64, 8, 2)},
        BLACKWELL: {64: (64, 32, 64, 4, 2), 128: (64, 32, 32, 4, 2), 256: (64, 32, 32, 8, 2)},
        CONSUMER_BLACKWELL: {16: (32, 32, 128, 4, 2), 64: (64, 32, 64, 4, 2), 128: (64, 32, 64, 8, 2),
                             256: (32, 32, 32, 8, 2)},
        AMD: {64: (128, 16, 32, 4, 2), 128: (64, 16, 32, 4, 2), 256: (32, 16, 32, 4, 2)},
    },
    ("decode", 2): {
        AMPERE: {32: (64, 64, 4, 3), 64: (64, 128, 4, 3), 128: (64, 64, 4, 3), 256: (32, 32, 8, 3)},
        CONSUMER: {32: (64, 64, 4, 3), 64: (64, 128, 4, 3), 128: (32, 64, 4, 3), 256: (32, 32, 8, 3)},
        BLACKWELL: {32: (64, 64, 4, 3), 64: (64, 128, 4, 3), 128: (64, 64, 4, 3), 256: (32, 32, 4, 4)},
        CONSUMER_BLACKWELL: {32: (64, 64, 4, 3), 128: (32, 64, 4, 3), 256: (32, 32, 8, 3)},
        AMD: {32: (64, 64, 4, 3), 64: (64, 128, 4, 3), 96: (64, 64, 4, 3), 128: (64, 16, 4, 3), 256: (32, 32, 8, 3)},
    },
    ("forward", 4): {
        AMPERE: {32: (64, 16, 32, 4, 2), 64: (64, 16, 16, 4, 2), 96: (16, 32, 32, 4, 2), 128: (32, 16, 32, 4, 2),
                 256: (16, 16, 32, 8, 2)},
        CONSUMER: {16: (64, 16, 16, 4, 2), 32: (64, 16, 32, 4, 2), 64: (32, 16, 32, 4, 2), 128: (16, 16, 32, 4, 2),
                   256: (16, 16, 32, 8, 1)},
        HOPPER: {64: (64, 16, 32, 4, 2), 128: (16, 32, 32, 4, 2), 256: (16, 16, 32, 8, 2)},
        BLACKWELL: {64: (64, 32, 32, 4, 2), 128: (16, 16, 32, 4, 2), 256: (16, 16, 32, 8, 1)},
        CONSUMER_BLACKWELL: {16: (32, 16, 16, 4, 2), 32: (16, 16, 32, 4, 2), 64: (32, 16, 16, 4, 2),
                             128: (16, 16, 32, 4, 2), 256: (16, 16, 32, 8, 1)},
        AMD: {16: (64, 16, 16, 4, 2), 128: (32, 16, 32, 4, 2), 256: (64, 16, 16, 8, 2)},
    },
    ("dq", 4): {
        AMPERE: {16: (64, 16, 32, 4, 2), 64: (64, 16, 16, 4, 2), 128: (16, 32, 32, 4, 2), 256: (16, 16, 16, 8, 1)},
        CONSUMER: {16: (64, 16, 32, 4, 2), 64: (32, 16, 32, 4, 2), 128: (16, 16, 16, 4, 2), 256: (16, 16, 16, 8, 1)},
        HOPPER: {16: (64, 32, 32, 4, 2), 32: (64, 16, 32, 4, 2), 64: (64, 32, 32, 4, 2), 128: (16, 32, 32, 4, 2),
                 256: (16, 16, 16, 8, 1)},
        BLACKWELL: {16: (32, 16, 32, 4, 2), 32: (16, 32, 32, 4, 2), 64: (32, 16, 32, 4, 2), 128: (16, 32, 32, 4, 2),
                    256: (16, 16, 32, 8, 1)},
        CONSUMER_BLACKWELL: {16: (32, 16, 32, 4, 2), 32: (16, 16, 32, 4, 2), 64: (32, 16, 32, 4, 2),
                             96: (16, 32, 32, 8, 2), 128: (16, 16, 16, 4, 2), 256: (16, 16, 16, 8, 1)},
        AMD: {32: (32, 16, 32, 4, 2), 64: (64, 16, 16, 4, 2), 256: (16, 16, 16, 4, 2)},
    },
    ("dkdv", 4): {
        AMPERE: {32: (64, 16, 16, 4, 2), 64: (32, 32, 32, 4, 2), 96: (16, 32, 32, 8, 2), 128: (16, 16, 16, 4, 2),
                 256: (16, 16, 16, 8, 1)},
        CONSUMER: {16: (64, 16, 16, 4, 2), 64: (16, 32, 32, 4, 2), 96: (16, 32, 32, 8, 2), 128: (16, 16, 16, 4, 2),
                   256: (16, 16, 16, 8, 1)},
        HOPPER: {32: (64, 32, 32, 4, 2), 64: (16, 32, 32, 4, 2), 128: (16, 32, 32, 8, 2), 256: (16, 16, 16, 8, 1)},
        BLACKWELL: {16: (64, 32, 32, 4, 2), 32: (64, 16, 16, 4, 2), 64: (64, 16, 32, 8, 2), 128: (16, 32, 32, 8, 2),
                    256: (16, 16, 16, 8, 1)},
        CONSUMER_BLACKWELL: {16: (32, 16, 32, 4, 2), 64: (16, 32, 32, 4, 2), 128: (16, 32, 32, 8, 2),
                             256: (16, 16, 16, 8, 1)},
        AMD: {16: (64, 16, 16, 4, 2), 32: (32, 16, 32, 4, 2), 128: (16, 16, 16, 4, 2), 256: (16, 16, 16, 8, 1)},
    },
    ("decode", 4): {
        AMPERE: {32: (32, 32, 4, 3), 64: (32, 64, 8, 3), 128: (16, 32, 4, 2), 256: (16, 16, 8, 2)},
        CONSUMER: {32: (32, 32, 4, 3), 64: (32, 64, 8, 3), 128: (16, 32, 8, 2), 256: (16, 16, 8, 2)},
        HOPPER: {32: (32, 32, 4, 3), 64: (32, 64, 8, 3), 128: (16, 32, 4, 3), 256: (16, 16, 8, 2)},
        BLACKWELL: {32: (32, 32, 4, 3), 64: (16, 64, 4, 2), 128: (32, 32, 4, 3), 256: (16, 16, 8, 2)},
        AMD: {32: (32, 32, 4, 3), 64: (64, 16, 4, 3), 128: (16, 32, 8, 2), 256: (16, 16, 8, 2)},
    },
}
# fmt: on


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


@functools.cache
def tile_config(name, head_dim, dtype, arch):
    """The tile of a pass, "forward", "dq", "dkdv" or "decode", for heads of head_dim elements on arch.

    Raises ValueError for heads that are larger than the table's.
    """
    if arch == 0 or dtype.itemsize > 4:
        # Triton's interpreter costs time per operation, not per element; and fp64 only runs there
        return DecodeTile(64, 64, 4, 1) if name == "decode" else TILES[name](64, 32, 64, 4, 1)
    if head_dim > LARGEST_HEAD:
        raise ValueError(
            f"q has head size {head_dim}, expected at most {LARGEST_HEAD}, the largest that has tiles: "
            "use backend='banded'"
        )
    by_family = CONFIGS[name, 2 if dtype.itemsize <= 2 else 4]
    family = max((family for family in FAMILIES if family <= arch), default=AMPERE)
    sizes = next(by_family[relative] for relative in FAMILIES[family] if relative in by_family)
    return TILES[name](*next(tile for size, tile in sizes.items() if head_dim <= size))


@functools.cache
def rotary_tile(rotary_dim):
    """The tile of the rotation: 16 pairs for each of 128 threads, of 4 heads; 8 pairs are 16 bytes of bf16."""
    return RotaryTile(BLOCK_T=max(1, 512 // max(8, triton.next_power_of_2(rotary_dim // 2))), BLOCK_H=4, num_warps=4)


def norm_tile(head_dim, backward=False):
    """The tile of the rotation with a norm: that of whole heads; half of it backward, which holds two tensors."""
    tile = rotary_tile(head_dim)
    return tile._replace(BLOCK_T=max(1, tile.BLOCK_T // 2)) if backward else tile


def dot_precision(dtype, arch):
    """How fp32 matrix products are made: from three TF32 ones, which give fp32's accuracy on the tensor cores.

    One TF32 product keeps 11 bits; fp32's own units ("ieee") take 4 to 8 times the instructions and spill at any size.
    """
    return "tf32x3" if dtype == torch.float32 and 0 < arch < AMD else "ieee"


def partial_sums(config, arch):
    """How many sums of a row are kept apart until its walk is over.

    Products of mma.sync and wgmma put every 8th column on the same threads: 8 sums need nothing of another thread, and
    save two exchanges a row and tile. They would cost where warps share rows, and each sum goes through shared memory,
    and on Blackwell, whose tensor memory gives a thread whole rows.
    """
    columns_apart = arch < BLACKWELL or arch == CONSUMER_BLACKWELL
    return 8 if columns_apart and config.BLOCK_M >= 16 * config.num_warps else 1

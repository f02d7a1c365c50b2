"""Chooses the tiles of kernels/backends/triton/tile_configs.py by compiling candidates; it needs no GPU.

    python benchmarks/tune_tiles.py --jobs 2 --json tiles.json     # two hours on two cores; nothing is measured
    python benchmarks/tune_tiles.py --write                        # also rewrites the table in tile_configs.py
    python benchmarks/tune_tiles.py --arch sm_90 --pass dq --head-dim 128 --dtype bf16

The search takes these steps for every pass, architecture, head size and element size:

1. It compiles all candidates with rope. It drops those that spill registers or do not fit.
2. It ranks the others by the model of speed_of_light.py: attention at windows of 256, 1024 and 4096 keys, decoding for
   1, 8 and 64 sequences.
3. It compiles the best again with half of each head rotated, sinks, softcap and a gradient of lse; for A100 and H100
   also without any of it; 16-bit tiles in bf16 and fp16; decoding with as many new tokens as the tile has rows.
4. If that spills, it tries the next one. If all spill, it takes the one that spills least.

Triton caches what it compiled, so a search that was stopped continues where it was.
"""

import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import speed_of_light as model
import torch
from speed_of_light import CARDS

from kernels import compiled
from kernels.backends.triton import LARGEST_HEAD, tile_configs
from kernels.backends.triton.tile_configs import TILES, tile_config
from model.command import Parser

TABLE = Path(tile_configs.__file__)
# These cards have the matrix instructions of sm_80 with other limits and throughputs: the search ranks their candidates
# by the code for sm_80. The tile that is chosen is compiled for the card itself.
COMPILED_AS = {"sm_86": "sm_80", "sm_120": "sm_80"}
FAMILIES = ("sm_80", "sm_86", "sm_120", "sm_90", "sm_100", "gfx942")
HEAD_DIMS = (16, 32, 64, 96, 128, 256)
KERNELS = {"forward": "attention_forward", "dq": "attention_dq", "dkdv": "attention_dkdv", "decode": "decode"}
DECODE_SHAPES = [(1, 32, 8, 1024), (8, 32, 8, 4096), (64, 32, 8, 1024)]
WINDOWS = (256, 1024, 4096)  # of attention, at 4 x 32 heads on 8 and 8192 tokens
GROUP = 4
EVERYTHING = {"half_rope": True, "sinks": True, "softcap": 20.0, "grad_lse": True}
# The model is a third off published figures: the table's tile stays unless another one promises a quarter more
INERTIA = 0.8
SPILLING = 3  # candidates that spill with rope alone are checked up to this number, where nothing better is left

# The candidates. Sizes are for 2 and for 4 bytes an element: the rows (or keys) that a program owns, and its steps
OWN = {2: (128, 64, 32), 4: (64, 32, 16)}
STEPS = {  # (edge, interior)
    2: ((16, 32), (32, 32), (32, 64), (32, 128)),
    4: ((16, 16), (16, 32), (32, 32)),
}
# 32-bit numbers that a thread of 255 registers can be asked to hold. The compiler's own need comes on top: splitting
# fp32 operands into TF32 pairs takes about as much again
MOST_NUMBERS = {2: 260, 4: 150}
FEWEST_SCORES = {2: 4, 4: 1}  # of a thread: a smaller tile leaves warps without work


class Cell(NamedTuple):
    """One entry of the table."""

    target: str
    name: str  # of the pass
    dtype: torch.dtype
    head_dim: int


class Candidate(NamedTuple):
    tile: tuple
    spilled: int  # bytes
    fits: bool
    ms: float  # `expected_ms`, times INERTIA for the tile that the table has


def main(arguments=None):
    flags = Parser(prog="python benchmarks/tune_tiles.py", description=__doc__)
    flags.add_argument("--arch", metavar="LIST", default=",".join(FAMILIES), help="by comma (all families)")
    flags.add_argument("--pass", dest="passes", metavar="LIST", default=",".join(KERNELS), help="by comma (all)")
    flags.add_argument("--head-dim", metavar="LIST", default=",".join(map(str, HEAD_DIMS)), help="by comma")
    flags.add_argument("--dtype", metavar="LIST", default="bf16,fp32", help="by comma (bf16,fp32; fp16 is as bf16)")
    flags.add_argument("--jobs", type=int, default=1, help="processes, each of which searches one entry (1)")
    flags.add_argument("--json", metavar="FILE", help="write what was found")
    flags.add_argument("--write", action="store_true", help=f"write these entries into {TABLE.name}")
    options = flags.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        flags.error("TRITON_INTERPRET=1 is set, and interpreted kernels cannot be compiled: unset it")
    if options.jobs < 1:
        flags.error(f"--jobs is {options.jobs}, wanted at least 1")
    try:
        targets, passes = options.arch.split(","), options.passes.split(",")
        for target in targets:
            compiled.card_of(target)
        cells = [
            Cell(target, name, harness.DTYPES[dtype], int(head_dim))
            for dtype in options.dtype.split(",")
            for head_dim in options.head_dim.split(",")
            for name in passes
            for target in targets
        ]
        for cell in cells:
            candidates(cell.name, cell.head_dim, cell.dtype.itemsize)
    except (ValueError, KeyError) as error:
        flags.error(f"{error} (passes: {', '.join(KERNELS)}; dtypes: {', '.join(harness.DTYPES)})")
    found, started = [], time.perf_counter()
    # Spawned, since a fork would lose the threads of Triton's compiler. One process takes all targets of an entry, some
    # of which are ranked by the same code
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for cell, (chosen, tried) in zip(cells, pool.map(choose, cells, chunksize=len(targets)), strict=True):
            found.append(as_row(cell, chosen, tried))
            note = f"SPILLS {chosen.spilled} bytes" if chosen.spilled else "no spill"
            place = f"[{len(found)}/{len(cells)}, {time.perf_counter() - started:.0f} s] {cell.target} {cell.name}"
            dtype = harness.name_of(cell.dtype)
            harness.progress(f"{place} {dtype} D {cell.head_dim}: {tuple(chosen.tile)}, {note}")
            if options.json:
                Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    if options.write:
        TABLE.write_text(rewritten(TABLE.read_text(), found))
        harness.progress(f"{TABLE} was rewritten: run the tests")
    spilling = sum(row["spilled_bytes"] > 0 for row in found)
    print(json.dumps({"benchmark": "tune_tiles", "entries": len(found), "spilling": spilling, "json": options.json}))
    return 0


def candidates(name, head_dim, element_bytes):
    """The tiles of a pass that could fit into registers. Where the model sees no difference, the first one is taken.

    Raises ValueError for a head size that is not 1 to 256, or an unknown pass.
    """
    if not 1 <= head_dim <= LARGEST_HEAD:
        raise ValueError(f"head size {head_dim} is not 1 to {LARGEST_HEAD}")
    if name not in KERNELS:
        raise ValueError(f"there is no pass {name!r}")
    size, width = min(element_bytes, 4), model.padded(head_dim)
    if name == "decode":
        return [
            TILES[name](own, step, warps, stages)
            for own, step, warps, stages in itertools.product((64, 32, 16), (32, 64, 128, 16), (4, 8), (3, 2, 4))
            if own * width <= 128 * 32 * warps
        ]
    found = [
        TILES[name](own, edge, step, warps, stages)
        for own, (edge, step), warps, stages in itertools.product(OWN[size], STEPS[size], (4, 8), (2, 1))
        if own * step >= FEWEST_SCORES[size] * 32 * warps
        and numbers(name, own, step, width, size) <= MOST_NUMBERS[size] * 32 * warps
    ]
    # one stage waits for every load: it is for heads whose second buffer does not fit
    return [one for one in found if one.num_stages == 2 or width * size > 512]


def numbers(name, own, step, width, element_bytes):
    """32-bit numbers that a program keeps in registers: accumulators, its own rows of q and do, scores."""
    operand = own * width * element_bytes // 4
    return {
        "forward": own * width + operand + 2 * own * step,
        "dq": own * width + 2 * operand + 2 * own * step,
        "dkdv": 2 * own * width + 2 * own * step,
    }[name]


def choose(cell):
    """(the best `Candidate`, all of them)."""
    now = tile_config(cell.name, cell.head_dim, cell.dtype, CARDS[cell.target].number)
    possible = candidates(cell.name, cell.head_dim, cell.dtype.itemsize)
    tried = [weigh(cell, tile) for tile in dict.fromkeys([now, *possible])]
    tried = [one._replace(ms=one.ms * INERTIA) if one.tile == now else one for one in tried]
    checked = []
    for candidate in sorted((one for one in tried if one.fits), key=lambda one: (one.spilled, one.ms)):
        if candidate.spilled and sum(one.spilled > 0 for one in checked) >= SPILLING:
            break
        made = [compile_tile(check, candidate.tile, features) for check, features in checks(cell)]
        spilled = max([candidate.spilled] + [one.spilled_bytes + one.stack_bytes for one in made if one])
        fits = all(one and one.blocks_per_multiprocessor for one in made)
        checked.append(candidate._replace(spilled=spilled, fits=fits))
        if fits and not spilled:
            break
    fitting = [one for one in checked if one.fits]
    if not fitting:
        raise ValueError(f"no candidate fits {cell}")
    return min(fitting, key=lambda one: (one.spilled, one.ms)), tried


def checks(cell):
    """[(Cell, features)] that the chosen tile must compile with: all features at once; on A100 and H100 also none."""
    dtypes = (torch.bfloat16, torch.float16) if cell.dtype.itemsize == 2 else (cell.dtype,)
    features = [EVERYTHING] + [{}] * (cell.target in ("sm_80", "sm_90"))
    return [(cell._replace(dtype=dtype), one) for dtype in dtypes for one in features]


def weigh(cell, tile):
    """The `Candidate` of a tile: compiled with rope, ranked by the model."""
    made = compile_tile(cell._replace(target=COMPILED_AS.get(cell.target, cell.target)), tile, {"rope": True}, rows=16)
    if made is None:
        return Candidate(tile, 0, False, math.inf)
    if cell.target in COMPILED_AS:
        card = CARDS[cell.target]
        blocks, _ = compiled.resident_blocks(card, made.registers, tile.num_warps, made.shared_bytes)
        made = made._replace(target=cell.target, blocks_per_multiprocessor=blocks)
    spilled, fits = made.spilled_bytes + made.stack_bytes, made.blocks_per_multiprocessor > 0
    return Candidate(tile, spilled, fits, expected_ms(made, cell) if fits else math.inf)


def compile_tile(cell, tile, features, rows=None):
    """The `Compiled` of a cell's kernel with that tile; None where the compiler refuses it.

    rows: of a tile of decoding, by default all that it has.
    """
    new_tokens = max(1, (rows or tile.BLOCK_M) // GROUP) if cell.name == "decode" else 1
    launches = compiled.launches(
        cell.target, head_dim=cell.head_dim, dtype=cell.dtype, group=GROUP, new_tokens=new_tokens,
        configs={cell.name: tile}, **features,
    )  # fmt: skip
    launch = next(one for one in launches if one.name == KERNELS[cell.name])
    try:
        return compiled.compile_launch(launch, cell.target)
    except Exception as failure:
        harness.progress(f"{cell.target} {cell.name} {tuple(tile)}: {harness.in_a_line(failure)}")
        return None


def expected_ms(made, cell):
    """A time to rank by, the geometric mean over the pass's shapes; infinite if the model found no loops."""
    size, D = cell.dtype.itemsize, cell.head_dim
    if cell.name == "decode":
        times = [model.decode_ms(made, model.Shape(*shape, D, None), size) for shape in DECODE_SHAPES]
    else:
        times = []
        for W in WINDOWS:
            estimate = model.attention_estimate(made, model.Shape(4, 32, 8, 8192, D, W), size, rope=True)
            if estimate is None:
                return math.inf
            times.append(model.between(estimate.serial_ms, estimate.overlapped_ms, made.blocks_per_multiprocessor))
    return math.prod(times) ** (1 / len(times))


def as_row(cell, chosen, tried):
    return {
        "target": cell.target, "pass": cell.name, "dtype": harness.name_of(cell.dtype), "head_dim": cell.head_dim,
        "tile": list(chosen.tile), "spilled_bytes": chosen.spilled,
        "candidates": [
            {"tile": list(one.tile), "spilled_bytes": one.spilled, "fits": one.fits,
             "model_ms": None if math.isinf(one.ms) else round(one.ms, 4)}
            for one in tried
        ],
    }  # fmt: skip


def rewritten(source, rows):
    """The text of tile_configs.py with these rows in its table.

    A family that has tiles of a pass has them for all head sizes, since the look-up asks no other family then. A family
    whose tiles all equal those of the next family it would ask is left out. Of neighbouring head sizes with the same
    tile the largest is written.
    """
    names = {value: name for name, value in vars(tile_configs).items() if name.isupper() and isinstance(value, int)}
    families = tile_configs.FAMILIES
    table = {}
    for key, by_family in tile_configs.CONFIGS.items():
        sizes = sorted({*HEAD_DIMS, *(size for of_family in by_family.values() for size in of_family)})
        table[key] = {family: {D: in_table(by_family, family, D) for D in sizes} for family in families}
    for row in rows:
        key = row["pass"], harness.DTYPES[row["dtype"]].itemsize
        table[key][CARDS[row["target"]].number][row["head_dim"]] = tuple(row["tile"])
    lines = ["CONFIGS = {"]
    for (name, size), by_family in table.items():
        lines.append(f'    ("{name}", {size}): {{')
        kept = set()
        for family, of_family in by_family.items():
            asked_next = next((one for one in families[family][1:] if one in kept), None)
            if asked_next is None or by_family[asked_next] != of_family:
                kept.add(family)
                lines += entry_lines(names[family], of_family)
        lines.append("    },")
    lines.append("}\n")
    new, count = re.subn(r"^CONFIGS = \{\n.*?^\}\n", "\n".join(lines), source, flags=re.DOTALL | re.MULTILINE)
    if count != 1:
        raise ValueError(f"{TABLE} has no table CONFIGS = {{...}}")
    return new


def entry_lines(family, tiles):
    """The lines of one family, several tiles to a line of under 120 characters."""
    ordered = sorted(tiles.items())
    larger = [tile for _, tile in ordered[1:]] + [None]
    entries = [f"{D}: {tile}" for (D, tile), after in zip(ordered, larger, strict=True) if tile != after]
    indent = " " * 8
    lines = [f"{indent}{family}: {{{entries[0]}"]
    for entry in entries[1:]:
        if len(f"{lines[-1]}, {entry}}},") < 120:
            lines[-1] += f", {entry}"
        else:
            lines[-1] += ","
            lines.append(f"{indent}{' ' * len(family)}   {entry}")
    lines[-1] += "},"
    return lines


def in_table(by_family, family, head_dim):
    """The tile that the look-up finds for a family and a head size."""
    sizes = next(by_family[one] for one in tile_configs.FAMILIES[family] if one in by_family)
    return tuple(sizes[min(size for size in sizes if head_dim <= size)])


if __name__ == "__main__":
    sys.exit(main())

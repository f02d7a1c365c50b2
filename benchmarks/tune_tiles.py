"""Chooses the tiles of kernels/tuning.py by compiling candidates, on a machine without a GPU.

    python benchmarks/tune_tiles.py --json tiles.json             # about half an hour on one core; nothing is measured
    python benchmarks/tune_tiles.py --write                       # also rewrites the table in kernels/tuning.py
    python benchmarks/tune_tiles.py --arch sm_90 --pass dq --head-dim 128 --dtype bf16

For every pass, architecture, head size and element size: candidates are compiled with rope, those that spill or do not
fit are dropped, and the others ranked by the model of speed_of_light.py at windows of 256, 1024 and 4096 keys. The
best is compiled again with half of each head rotated, sinks, softcap and a gradient of lse, for A100 and H100 also
without any of it; if it spills there, the next one is tried. If all spill, the one that spills least is taken. What
Triton compiled once comes from its cache, so a search that was stopped goes on where it was.

Decoding and the rotation are limited by memory, which the model cannot rank: their tiles stay.
"""

import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import speed_of_light as model
import torch

from kernels.tuning import TileConfig, tile_config
from train.flags import Parser

# Candidates of consumer cards are weighed by their code for sm_80, which has the same matrix instructions: limits and
# throughputs differ. What is chosen is compiled for the card itself.
COMPILED_AS = {"sm_86": "sm_80", "sm_120": "sm_80"}
FAMILIES = ("sm_80", "sm_90", "sm_86", "sm_120", "sm_100", "gfx942")
HEAD_DIMS = (64, 96, 128, 256)
WINDOWS = (256, 1024, 4096)
EVERYTHING = {"sinks": True, "softcap": 20.0, "grad_lse": True}
KERNELS = {"forward": "attention_forward", "dq": "attention_dq", "dkdv": "attention_dkdv"}

# (own, edge, step, warps, stages), by pass and largest head size; 16-bit elements, then fp32
WIDE = {
    "forward": {
        64: [(64, 32, 64, 4, 2), (64, 32, 64, 4, 3), (128, 32, 64, 4, 2), (128, 32, 128, 8, 2)],
        128: [(128, 32, 64, 8, 2), (128, 32, 64, 8, 3), (64, 32, 32, 4, 2), (64, 32, 64, 4, 2)],
        256: [(64, 32, 32, 8, 2), (128, 32, 32, 8, 2), (64, 32, 64, 8, 2), (32, 16, 32, 4, 2)],
    },
    "dq": {
        64: [(64, 32, 64, 4, 2), (128, 32, 64, 8, 2), (64, 32, 32, 4, 2)],
        128: [(128, 32, 32, 8, 2), (128, 32, 64, 8, 2), (64, 32, 32, 4, 2), (64, 32, 64, 8, 2)],
        256: [(64, 16, 32, 8, 2), (32, 32, 32, 8, 2), (32, 16, 32, 4, 2), (64, 32, 32, 8, 1)],
    },
    "dkdv": {
        64: [(64, 32, 64, 4, 2), (128, 32, 64, 8, 2), (128, 32, 32, 8, 2), (64, 32, 32, 4, 2)],
        128: [(64, 32, 64, 8, 2), (128, 32, 32, 8, 2), (64, 16, 32, 4, 2), (64, 32, 32, 8, 2)],
        256: [(32, 32, 32, 8, 2), (64, 16, 32, 8, 2), (64, 16, 16, 8, 2), (32, 16, 32, 4, 2)],
    },
}  # fmt: skip
NARROW = {
    "forward": {
        64: [(32, 16, 32, 4, 2), (32, 16, 16, 4, 2), (64, 16, 32, 4, 2), (64, 32, 32, 8, 2)],
        128: [(32, 16, 32, 4, 2), (32, 16, 16, 4, 2), (16, 16, 32, 4, 2), (32, 16, 32, 8, 2)],
        256: [(16, 16, 16, 8, 1), (32, 16, 16, 8, 2), (16, 16, 16, 4, 2)],
    },
    "dq": {
        64: [(32, 16, 32, 4, 2), (32, 16, 16, 4, 2), (32, 16, 16, 8, 2), (16, 16, 16, 4, 2)],
        128: [(32, 16, 32, 8, 2), (32, 16, 16, 8, 2), (16, 16, 16, 8, 2), (16, 16, 16, 4, 2)],
        256: [(16, 16, 16, 8, 1), (16, 16, 16, 4, 1)],
    },
    "dkdv": {
        64: [(32, 16, 32, 4, 2), (32, 16, 16, 4, 2), (32, 16, 16, 8, 2), (16, 16, 16, 4, 2)],
        128: [(32, 16, 32, 8, 2), (32, 16, 16, 8, 2), (16, 16, 16, 8, 2), (16, 16, 16, 4, 2)],
        256: [(16, 16, 16, 8, 1), (16, 16, 16, 4, 1)],
    },
}


# The ranking rests on a model and a guess: what the table has stays unless another tile promises a tenth more
INERTIA = 0.9


class Cell(NamedTuple):
    """One entry of the table."""

    target: str
    name: str  # of the pass
    dtype: torch.dtype
    head_dim: int


class Candidate(NamedTuple):
    config: TileConfig
    spilled: int  # bytes
    fits: bool
    ms: float  # `expected_ms`, geometric mean over WINDOWS; times INERTIA for the tile that the table has


def main(arguments=None):
    flags = Parser(prog="python benchmarks/tune_tiles.py", description=__doc__)
    flags.add_argument("--arch", metavar="LIST", default=",".join(FAMILIES), help="by comma (all families)")
    flags.add_argument("--pass", dest="passes", metavar="LIST", default=",".join(KERNELS), help="by comma (all)")
    flags.add_argument("--head-dim", metavar="LIST", default=",".join(map(str, HEAD_DIMS)), help="by comma")
    flags.add_argument("--dtype", metavar="LIST", default="bf16,fp32", help="by comma (bf16,fp32; fp16 is as bf16)")
    flags.add_argument("--json", metavar="FILE", help="write what was found")
    flags.add_argument("--write", action="store_true", help="rewrite these entries of the table in kernels/tuning.py")
    options = flags.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        flags.error("TRITON_INTERPRET=1 is set, and what is interpreted cannot be compiled: unset it")
    from kernels import offline

    try:
        targets, passes = options.arch.split(","), options.passes.split(",")
        for target in targets:
            offline.limits(target)
        cells = [
            Cell(target, name, harness.DTYPES[dtype], int(head_dim))
            for dtype in options.dtype.split(",")
            for target in targets
            for head_dim in options.head_dim.split(",")
            for name in passes
        ]
        for cell in cells:
            candidates_of(cell)
    except (ValueError, KeyError) as error:
        flags.error(f"{error} (passes: {', '.join(KERNELS)}; dtypes: {', '.join(harness.DTYPES)})")
    found, started = [], time.perf_counter()
    for i, cell in enumerate(cells, 1):
        chosen, tried = choose(cell)
        found.append(as_row(cell, chosen, tried))
        note = f"SPILLS {chosen.spilled} bytes" if chosen.spilled else "no spill"
        place = f"[{i}/{len(cells)}, {time.perf_counter() - started:.0f} s] {cell.target} {cell.name}"
        dtype = harness.name_of(cell.dtype)
        harness.progress(f"{place} {dtype} D {cell.head_dim}: {tuple(chosen.config)}, {note}")
        if options.json:
            Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    if options.write:
        path = harness.ROOT / "kernels" / "tuning.py"
        path.write_text(rewritten(path.read_text(), found))
        harness.progress(f"{path} rewritten: ruff format it, and run the tests")
    print(json.dumps({"benchmark": "tune_tiles", "modelled": True, "machine": harness.machine("cpu"), "rows": found}))
    return 0


def candidates_of(cell):
    """[TileConfig] for a cell, the most promising first. Raises ValueError for a head size past 256."""
    by_size = (WIDE if cell.dtype.itemsize == 2 else NARROW)[cell.name]
    size = next((size for size in by_size if cell.head_dim <= size), None)
    if size is None:
        raise ValueError(f"head size {cell.head_dim} is past 256")
    return [TileConfig(*numbers) for numbers in by_size[size]]


def choose(cell):
    """(the best Candidate, what all of them came to)."""
    now = tile_config(cell.name, cell.head_dim, cell.dtype, architecture_of(cell.target))
    tried = [weigh(cell, config) for config in dict.fromkeys([now, *candidates_of(cell)])]
    tried = [one._replace(ms=one.ms * INERTIA) if one.config == now else one for one in tried]
    checks = [{"half_rope": True, **EVERYTHING}] + [{}] * (cell.target in ("sm_80", "sm_90") and cell.head_dim != 256)
    checked = []
    for candidate in sorted((one for one in tried if one.fits), key=lambda one: (one.spilled > 0, one.ms)):
        made = [compiled(cell, cell.target, candidate.config, features) for features in checks]
        spilled = max([candidate.spilled] + [one.spilled_bytes + one.stack_bytes for one in made if one])
        fits = all(one and one.blocks_per_multiprocessor for one in made)
        checked.append(candidate._replace(spilled=spilled, fits=fits))
        if fits and not spilled:
            break
    fitting = [one for one in checked if one.fits]
    if not fitting:
        raise ValueError(f"no candidate fits {cell}")
    return min(fitting, key=lambda one: (one.spilled, one.ms)), tried


def architecture_of(target):
    from kernels import offline

    return offline.LIMITS[target].number


def weigh(cell, config):
    """The `Candidate` of a tile: compiled with rope, weighed by the model."""
    from kernels import offline

    made = compiled(cell, COMPILED_AS.get(cell.target, cell.target), config, {"rope": True})
    if made is None:
        return Candidate(config, 0, False, math.inf)
    card = offline.LIMITS[cell.target]
    blocks, _ = offline.resident_blocks(card, made.registers, config.num_warps, made.shared_bytes)
    made = made._replace(target=cell.target, blocks_per_multiprocessor=blocks)
    spilled = made.spilled_bytes + made.stack_bytes
    return Candidate(config, spilled, blocks > 0, expected_ms(made, cell) if blocks else math.inf)


def compiled(cell, target, config, features):
    """The `Compiled` of a cell's kernel with that tile; None where the compiler does not take it."""
    from kernels import offline

    launches = offline.launches(
        target, head_dim=cell.head_dim, dtype=cell.dtype, configs={cell.name: config}, **features
    )
    launch = next(one for one in launches if one.name == KERNELS[cell.name])
    try:
        return offline.compile_launch(launch, target)
    except Exception as failure:
        harness.progress(f"{cell.target} {cell.name} {tuple(config)}: {harness.in_a_line(failure)}")
        return None


def expected_ms(made, cell):
    """A time to rank by: the serial bound for one program a multiprocessor, nearer to the overlapped one for several.

    Programs that share a multiprocessor fill each other's gaps; that n of them leave 1 / n of the gaps is a guess. The
    model knows no AMD card: there, instructions for each score count.
    """
    if made.target not in model.CARDS:
        return instructions_a_score(made)
    times = []
    for W in WINDOWS:
        shape = model.Shape(4, 32, 8, 8192, cell.head_dim, W)
        estimate = model.attention_estimate(made, shape, cell.dtype.itemsize, rope=True)
        if estimate is None:
            return math.inf
        gap = estimate.serial_ms - estimate.overlapped_ms
        times.append(estimate.overlapped_ms + gap / made.blocks_per_multiprocessor)
    return math.prod(times) ** (1 / len(times))


def instructions_a_score(made):
    """Instructions that the lanes of a program issue for each score of the interior."""
    interior = next((loop for loop in made.loops if not loop.masked), None)
    if interior is None:
        return math.inf
    scores = (
        made.tile.get("BLOCK_N", made.tile["BLOCK_M"]) * made.tile["BLOCK_M" if "BLOCK_N" in made.tile else "BLOCK_K"]
    )
    return interior.instructions * made.tile["num_warps"] * 64 / scores


def as_row(cell, chosen, tried):
    return {
        "target": cell.target, "pass": cell.name, "dtype": harness.name_of(cell.dtype), "head_dim": cell.head_dim,
        "config": list(chosen.config), "spilled_bytes": chosen.spilled,
        "candidates": [
            {"config": list(one.config), "spilled_bytes": one.spilled, "fits": one.fits,
             "model_ms": None if math.isinf(one.ms) else round(one.ms, 4)}
            for one in tried
        ],
    }  # fmt: skip


def rewritten(source, rows):
    """The text of kernels/tuning.py with these rows in its table; those equal to the next larger head size's go."""
    from kernels import offline, tuning
    from kernels.tuning import CONFIGS

    families = {value: name for name, value in vars(tuning).items() if name.isupper() and isinstance(value, int)}
    table = {key: {arch: dict(sizes) for arch, sizes in by_arch.items()} for key, by_arch in CONFIGS.items()}
    for row in rows:
        key = row["pass"], harness.DTYPES[row["dtype"]].itemsize
        arch = offline.LIMITS[row["target"]].number
        table.setdefault(key, {}).setdefault(arch, {})[row["head_dim"]] = TileConfig(*row["config"])
    lines = ["CONFIGS = {"]
    for (name, size), by_arch in table.items():
        lines.append(f'    ("{name}", {size}): {{')
        for arch, sizes in sorted(by_arch.items()):
            lines.append(f"        {families[arch]}: {{")
            ordered = sorted(sizes)
            for head_dim, larger in zip(ordered, [*ordered[1:], None], strict=True):
                if larger is None or sizes[head_dim] != sizes[larger]:
                    lines.append(f"            {head_dim}: TileConfig{tuple(sizes[head_dim])},")
            lines.append("        },")
        lines.append("    },")
    lines.append("}\n")
    new, count = re.subn(r"^CONFIGS = \{\n.*?^\}\n", "\n".join(lines), source, flags=re.DOTALL | re.MULTILINE)
    if count != 1:
        raise ValueError("kernels/tuning.py has no table CONFIGS = {...}")
    return new


if __name__ == "__main__":
    sys.exit(main())

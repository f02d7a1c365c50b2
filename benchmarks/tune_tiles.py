"""Chooses the tiles of kernels/tuning.py by compiling candidates, on a machine without a GPU.

    python benchmarks/tune_tiles.py --jobs 2 --json tiles.json     # two hours on two cores; nothing is measured
    python benchmarks/tune_tiles.py --write                        # also rewrites the table in kernels/tuning.py
    python benchmarks/tune_tiles.py --arch sm_90 --pass dq --head-dim 128 --dtype bf16

For every pass, architecture, head size and element size: the candidates of tile_candidates.py are compiled, with rope;
those that spill or do not fit are dropped, and the others ranked by a model, attention by speed_of_light.py at windows
of 256, 1024 and 4096 keys, decoding by memory_bound.py for 1, 8 and 64 sequences, the rotation by the same. The best is
compiled again with half of each head rotated, sinks, softcap and a gradient of lse, for A100 and H100 also without any
of it, 16-bit tiles in bf16 and fp16, decoding with as many new tokens as a tile has rows for; if it spills there, the
next one is tried. If all spill, the one that spills least is taken. What Triton compiled once comes from its cache, so
a search that was stopped goes on where it was.
"""

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
import memory_bound
import speed_of_light as model
import torch
from tile_candidates import candidates

from kernels.tuning import TileConfig, tile_config
from model.command import Parser

# Candidates of consumer cards are weighed by their code for sm_80, which has the same matrix instructions: limits and
# throughputs differ. What is chosen is compiled for the card itself.
COMPILED_AS = {"sm_86": "sm_80", "sm_120": "sm_80"}
FAMILIES = ("sm_80", "sm_86", "sm_120", "sm_90", "sm_100", "gfx942")
HEAD_DIMS = (16, 32, 64, 96, 128, 256)
KERNELS = {
    "forward": "attention_forward",
    "dq": "attention_dq",
    "dkdv": "attention_dkdv",
    "decode": "decode",
    "rotary": "rope",
}
# What the model is asked of a pass: shapes for each head size
SHAPES = {
    "decode": [(1, 32, 8, 1024), (8, 32, 8, 4096), (64, 32, 8, 1024)],
    "rotary": [(4, 32, 8, 8192)],
}
WINDOWS = (256, 1024, 4096)  # of attention, at 4 x 32 heads on 8 and 8192 tokens
GROUP = 4
EVERYTHING = {"half_rope": True, "sinks": True, "softcap": 20.0, "grad_lse": True}
# The ranking rests on a model that is a third off published figures: what the table has stays unless another tile
# promises a quarter more
INERTIA = 0.8
SPILLING = 3  # how many are checked of those that spill already, where nothing better is left


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
    ms: float  # `expected_ms`, times INERTIA for the tile that the table has


def main(arguments=None):
    flags = Parser(prog="python benchmarks/tune_tiles.py", description=__doc__)
    flags.add_argument("--arch", metavar="LIST", default=",".join(FAMILIES), help="by comma (all families)")
    flags.add_argument("--pass", dest="passes", metavar="LIST", default=",".join(KERNELS), help="by comma (all)")
    flags.add_argument("--head-dim", metavar="LIST", default=",".join(map(str, HEAD_DIMS)), help="by comma")
    flags.add_argument("--dtype", metavar="LIST", default="bf16,fp32", help="by comma (bf16,fp32; fp16 is as bf16)")
    flags.add_argument("--jobs", type=int, default=1, help="entries that are searched at a time, a process each (1)")
    flags.add_argument("--json", metavar="FILE", help="write what was found")
    flags.add_argument("--write", action="store_true", help="rewrite these entries of the table in kernels/tuning.py")
    options = flags.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        flags.error("TRITON_INTERPRET=1 is set, and what is interpreted cannot be compiled: unset it")
    if options.jobs < 1:
        flags.error(f"--jobs is {options.jobs}, wanted at least 1")
    from kernels import offline

    try:
        targets, passes = options.arch.split(","), options.passes.split(",")
        for target in targets:
            offline.limits(target)
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
    # Spawned, since Triton's compiler has threads of its own, which a fork would lose. One process takes all targets of
    # an entry, some of which are weighed by the same code
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for cell, (chosen, tried) in zip(cells, pool.map(choose, cells, chunksize=len(targets)), strict=True):
            found.append(as_row(cell, chosen, tried))
            note = f"SPILLS {chosen.spilled} bytes" if chosen.spilled else "no spill"
            place = f"[{len(found)}/{len(cells)}, {time.perf_counter() - started:.0f} s] {cell.target} {cell.name}"
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


def choose(cell):
    """(the best Candidate, what all of them came to)."""
    now = tile_config(cell.name, cell.head_dim, cell.dtype, architecture_of(cell.target))
    possible = candidates(cell.name, cell.head_dim, cell.dtype.itemsize)
    tried = [weigh(cell, config) for config in dict.fromkeys([now, *possible])]
    tried = [one._replace(ms=one.ms * INERTIA) if one.config == now else one for one in tried]
    checked = []
    for candidate in sorted((one for one in tried if one.fits), key=lambda one: (one.spilled, one.ms)):
        if candidate.spilled and sum(one.spilled > 0 for one in checked) >= SPILLING:
            break
        made = [compiled(check, candidate.config, features) for check, features in checks(cell)]
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
    """[(Cell, features)] that what is chosen must bear: everything at once, and for A100 and H100 nothing."""
    dtypes = (torch.bfloat16, torch.float16) if cell.dtype.itemsize == 2 else (cell.dtype,)
    features = [EVERYTHING] + [{}] * (cell.target in ("sm_80", "sm_90"))
    return [(cell._replace(dtype=dtype), one) for dtype in dtypes for one in features]


def architecture_of(target):
    from kernels import offline

    return offline.LIMITS[target].number


def weigh(cell, config):
    """The `Candidate` of a tile: compiled with rope, weighed by the model."""
    from kernels import offline

    made = compiled(cell._replace(target=COMPILED_AS.get(cell.target, cell.target)), config, {"rope": True}, rows=16)
    if made is None:
        return Candidate(config, 0, False, math.inf)
    card = offline.LIMITS[cell.target]
    if cell.target in COMPILED_AS:
        blocks, _ = offline.resident_blocks(card, made.registers, config.num_warps, made.shared_bytes)
        made = made._replace(target=cell.target, blocks_per_multiprocessor=blocks)
    spilled, fits = made.spilled_bytes + made.stack_bytes, made.blocks_per_multiprocessor > 0
    return Candidate(config, spilled, fits, expected_ms(made, cell) if fits else math.inf)


def compiled(cell, config, features, rows=None):
    """The `Compiled` of a cell's kernel with that tile; None where the compiler does not take it.

    rows: how many a tile of decoding has, all that it is for unless said otherwise.
    """
    from kernels import offline

    launches = offline.launches(
        cell.target, head_dim=cell.head_dim, dtype=cell.dtype, group=GROUP,
        new_tokens=max(1, (rows or config.own) // GROUP) if cell.name == "decode" else 1,
        configs={cell.name: config}, **features,
    )  # fmt: skip
    launch = next(one for one in launches if one.name == KERNELS[cell.name])
    try:
        return offline.compile_launch(launch, cell.target)
    except Exception as failure:
        harness.progress(f"{cell.target} {cell.name} {tuple(config)}: {harness.in_a_line(failure)}")
        return None


def expected_ms(made, cell):
    """A time to rank by, the geometric mean over the pass's shapes; infinite if the model cannot say."""
    size, D = cell.dtype.itemsize, cell.head_dim
    if cell.name == "rotary":
        times = [memory_bound.rope_ms(made, model.Shape(*shape, D, None), size) for shape in SHAPES["rotary"]]
    elif cell.name == "decode":
        times = [memory_bound.decode_ms(made, model.Shape(*shape, D, None), size) for shape in SHAPES["decode"]]
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
        "config": list(chosen.config), "spilled_bytes": chosen.spilled,
        "candidates": [
            {"config": list(one.config), "spilled_bytes": one.spilled, "fits": one.fits,
             "model_ms": None if math.isinf(one.ms) else round(one.ms, 4)}
            for one in tried
        ],
    }  # fmt: skip


def rewritten(source, rows):
    """The text of kernels/tuning.py with these rows in its table.

    A family that has tiles of a pass has them for all head sizes, since the look-up asks no other family then; one
    whose tiles are all its kin's has none. Of head sizes with the same tile the largest is written.
    """
    from kernels import offline, tuning

    names = {value: name for name, value in vars(tuning).items() if name.isupper() and isinstance(value, int)}
    table = {}
    for key, by_family in tuning.CONFIGS.items():
        sizes = sorted({*HEAD_DIMS, *(size for of_family in by_family.values() for size in of_family)})
        table[key] = {family: {D: in_table(by_family, family, D) for D in sizes} for family in tuning.FAMILIES}
    for row in rows:
        key = row["pass"], harness.DTYPES[row["dtype"]].itemsize
        table[key][offline.LIMITS[row["target"]].number][row["head_dim"]] = TileConfig(*row["config"])
    lines = ["CONFIGS = {"]
    for (name, size), by_family in table.items():
        lines.append(f'    ("{name}", {size}): {{')
        kept = set()
        for family, of_family in by_family.items():
            kin = next((one for one in tuning.FAMILIES[family][1:] if one in kept), None)
            if kin is not None and by_family[kin] == of_family:
                continue
            kept.add(family)
            lines.append(f"        {names[family]}: {{")
            ordered = sorted(of_family)
            for head_dim, larger in zip(ordered, [*ordered[1:], None], strict=True):
                if larger is None or of_family[head_dim] != of_family[larger]:
                    lines.append(f"            {head_dim}: TileConfig{tuple(of_family[head_dim])},")
            lines.append("        },")
        lines.append("    },")
    lines.append("}\n")
    new, count = re.subn(r"^CONFIGS = \{\n.*?^\}\n", "\n".join(lines), source, flags=re.DOTALL | re.MULTILINE)
    if count != 1:
        raise ValueError("kernels/tuning.py has no table CONFIGS = {...}")
    return new


def in_table(by_family, family, head_dim):
    from kernels import tuning

    sizes = tuning.sizes_of(by_family, family)
    return sizes[min((size for size in sizes if head_dim <= size), default=max(sizes))]


if __name__ == "__main__":
    sys.exit(main())

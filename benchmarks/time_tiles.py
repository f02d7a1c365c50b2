"""Which tiles are the fastest on the GPU that is here?

    python benchmarks/time_tiles.py                             # bf16, heads of 64 and 128: two minutes on 16 CPU cores
    python benchmarks/time_tiles.py --head-dim 96 --pass dkdv --json tiles.json

tune_tiles.py ranks candidates by a model, for cards that are absent. This script times them: forward alone, and dq and
dk/dv as part of the whole backward pass with the other kernel as shipped. All candidates are compiled first, by one
process a core, into Triton's cache. Each line names the shipped tile, its time and its rank, and the six fastest.

What is fast in a plain call may still spill with rope, sinks and a softcap: compile it before it goes into the table
(kernel_report.py --features half-all).
"""

import itertools
import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
from measure import GpuTimer

from kernels.backends.triton import attend, attend_backward, tile_configs
from kernels.backends.triton.tile_configs import TILES, tile_config
from model.command import Parser

SHAPES = [(4, 4096, 256, 32, 8), (4, 8192, 1024, 32, 8), (4, 8192, 4096, 16, 4)]  # B, T, window, Hq, Hkv
SMALL = (1, 512, 128, 8, 2)  # compiles the same kernels
PASSES = ("forward", "dq", "dkdv")
CALLS = 7
MOST_NUMBERS = 235  # 32-bit numbers of accumulators and scores for each thread, of 255 registers


def main(arguments=None):
    flags = Parser(prog="python benchmarks/time_tiles.py", description=__doc__)
    flags.add_argument("--head-dim", metavar="LIST", default="64,128", help="by comma (64,128)")
    flags.add_argument("--pass", dest="passes", metavar="LIST", default=",".join(PASSES), help="by comma (all)")
    flags.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    flags.add_argument("--json", metavar="FILE", help="write all times")
    options = flags.parse_args(arguments)
    if not torch.cuda.is_available():
        flags.error("no GPU is here, and this script only measures: tune_tiles.py ranks tiles by a model")
    dtype, passes = harness.DTYPES[options.dtype], options.passes.split(",")
    if unknown := set(passes) - set(PASSES):
        flags.error(f"there is no pass {unknown.pop()!r} (passes: {', '.join(PASSES)})")
    cells = [(int(D), name, dtype) for D in options.head_dim.split(",") for name in passes]
    jobs = [(*cell, tile) for cell in cells for tile in candidates(*cell)]
    harness.progress(f"compiling {len(jobs)} kernels")
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        compiled = dict(zip(jobs, pool.map(compiles, jobs), strict=True))
    rows = []
    for cell in cells:
        tiles = [tile for tile in candidates(*cell) if compiled[(*cell, tile)]]
        for shape in SHAPES:
            rows += time_all(cell, shape, tiles)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "time_tiles", "device": torch.cuda.get_device_name(), "times": len(rows)}))
    return 0


def candidates(head_dim, name, dtype):
    """The tiles of a pass that a thread's registers can hold."""
    found = []
    for own, edge, step, warps, stages in itertools.product((64, 128), (16, 32, 64), (32, 64, 128), (4, 8), (2, 3)):
        width = 2 * head_dim if name == "dkdv" else head_dim
        numbers = own * (width + step * (2 if name == "dkdv" else 1)) / (32 * warps)
        if edge <= step and numbers <= MOST_NUMBERS and own * step >= 8 * 32 * warps:
            found.append(TILES[name](own, edge, step, warps, stages))
    return found


def compiles(job):
    """Whether the tile of a job compiles and fits this card; the compiled kernel is in Triton's cache afterwards."""
    head_dim, name, dtype, tile = job
    try:
        call_of(name, tile, problem(SMALL, head_dim, dtype))()
        torch.cuda.synchronize()
    except Exception:  # Triton, LLVM and the driver each fail in ways of their own
        return False
    return True


def problem(shape, head_dim, dtype):
    """(q, k, v, gradient of out, out, lse, window) with random inputs."""
    B, T, window, Hq, Hkv = shape
    q, k, v, grad = (
        torch.randn(B, T, H, head_dim, device="cuda", dtype=dtype).transpose(1, 2) for H in (Hq, Hkv, Hkv, Hq)
    )
    return q, k, v, grad, *attend(q, k, v, window, scale=head_dim**-0.5), window


def call_of(name, tile, problem):
    """The forward pass with this tile, or the backward pass with it in one of its kernels; None: the shipped one."""
    q, k, v, grad, out, lse, window = problem
    scale = q.shape[3] ** -0.5
    if name == "forward":
        return lambda: attend(q, k, v, window, scale=scale, config=tile)
    configs = (tile, None) if name == "dq" else (None, tile)
    return lambda: attend_backward(grad, None, q, k, v, out, lse, window, scale=scale, configs=configs)


def time_all(cell, shape, tiles):
    """A row for each tile; prints the shipped one and the fastest."""
    head_dim, name, dtype = cell
    inputs, timer = problem(shape, head_dim, dtype), GpuTimer(torch.device("cuda"))
    calls = {tile: call_of(name, tile, inputs) for tile in tiles}
    times = {tile: [] for tile in tiles}
    for call in calls.values():
        call()  # loads the kernel
    for _ in range(CALLS):  # in turns
        for tile, call in calls.items():
            times[tile].append(1e3 * timer(call))
    ms = {tile: statistics.median(of_tile) for tile, of_tile in times.items()}
    ranked = sorted(tiles, key=ms.get)
    shipped = tile_config(name, head_dim, dtype, tile_configs.architecture(torch.device("cuda")))
    place = f"{ms[shipped]:.3f} ms, rank {ranked.index(shipped) + 1} of {len(ranked)}" if shipped in ms else "not timed"
    best = "  ".join(f"{ms[tile]:.3f} {tuple(tile)}" for tile in ranked[:6])
    print(f"D {head_dim} {shape} {name}: shipped {tuple(shipped)} {place}; {best}", flush=True)
    B, T, window, Hq, Hkv = shape
    facts = {"pass": name, "D": head_dim, "B": B, "T": T, "window": window, "Hq": Hq, "Hkv": Hkv}
    return [{**facts, "tile": list(tile), "ms": round(ms[tile], 4)} for tile in ranked]


if __name__ == "__main__":
    sys.exit(main())

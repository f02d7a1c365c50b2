"""How fast are this CPU's matrix products and its memory? docs/banded.md compares attention with these limits.

    python benchmarks/machine_speed.py                       # half a minute
    OMP_NUM_THREADS=1 python benchmarks/machine_speed.py     # of one core

Products of fp32 by MKL and by oneDNN (kernels/cpu.py says when), and of bf16: a large one, and batches of small ones as
attention makes them. Memory: copying, reading (a sum) and filling 256 MB. Calls take turns. Columns:

    what       batch x (rows x inner size x columns), or bytes
    ms         median of the calls (20th to 80th percentile)
    rate       GFLOP/s of a product; GB/s of memory, bytes read and written
"""

import sys
from functools import partial

import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
from measure import alternate, shown, table, three_digits

from kernels.cpu import has_bf16_products, onednn_is_exact, through_onednn

PRODUCTS = [(1, 2048, 2048, 2048), (64, 128, 64, 384), (14, 128, 64, 288), (40, 64, 64, 144)]  # batch, m, k, n
MEMORY_BYTES = 2**28
SECONDS = {"quick": 6.0, "default": 20.0}


def main(arguments=None):
    return harness.run(harness.parser("machine_speed", __doc__), prepare, arguments)


def prepare(options, device):
    if device.type != "cpu":
        raise harness.BadInput("machine_speed measures CPUs only: give --device cpu")
    points = {name_of(shape): partial(products, shape) for shape in PRODUCTS} | {"memory": memory}
    return partial(measure, harness.budget(options, points, SECONDS))


def name_of(shape):
    batch, m, k, n = shape
    return f"{batch} x ({m} x {k} x {n})"


def products(shape):
    """(what, unit, amount, {contestant: call, or why not}) of a batch of products."""
    batch, m, k, n = shape
    calls = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(batch, m, k).to(dtype), torch.randn(batch, k, n).to(dtype)
        out = torch.empty(batch, m, n, dtype=dtype)
        calls[dtype] = partial(torch.bmm, a, b, out=out)
    return (
        name_of(shape),
        "GFLOP/s",
        2 * batch * m * k * n,
        {
            "fp32, MKL": calls[torch.float32],
            "fp32, oneDNN": through_onednn(calls[torch.float32]) if onednn_is_exact() else "it would round to bf16",
            "bf16": calls[torch.bfloat16] if has_bf16_products() else "this CPU has no units for bf16",
        },
    )


def memory():
    """The same for the memory: a call moves `amount` bytes, a copy twice as many."""
    x, y = torch.zeros(MEMORY_BYTES // 4), torch.zeros(MEMORY_BYTES // 4)
    calls = {"copy": partial(y.copy_, x), "read": partial(torch.sum, x), "fill": partial(y.fill_, 1.0)}
    return f"{MEMORY_BYTES // 2**20} MB", "GB/s", MEMORY_BYTES, calls


def measure(budget):
    rows = []
    for make in budget:
        what, unit, amount, contestants = make()
        calls = {name: call for name, call in contestants.items() if callable(call)}
        for call in calls.values():
            call()
        times = alternate(calls, "cpu", budget.share())
        for name, call in contestants.items():
            row = {"contestant": name, "shape": what, "unit": unit, "not_timed": None if name in calls else call}
            if name in times:
                moved = 2 * amount if name == "copy" else amount
                row |= times[name].as_dict() | {"per_second": moved / times[name].median}
            rows.append(row)
    columns = {
        "what": lambda row: row["shape"],
        "how": lambda row: row["contestant"],
        "ms": shown,
        "rate": lambda row: f"{three_digits(row['per_second'] / 1e9)} {row['unit']}",
    }
    return {"rows": rows, "tables": [table("Limits of this machine", rows, columns)], "plots": []}


if __name__ == "__main__":
    sys.exit(main())

"""How fast are q and k rotated, and how close to the memory's speed?

    python benchmarks/rope_speed.py                      # a minute on a CPU; --quick: half of it
    python benchmarks/rope_speed.py --shapes 4096,32,8,128,4 --dtype bf16

Rotation computes next to nothing, so the yardstick is memory traffic: q and k read once and written once, and the same
for their gradients in the backward pass. Every contestant is checked against the reference first. Calls take turns.

    shape     T, query heads / KV heads x head size; the batch before it if it is not 1
    ms        median of the calls (20th to 80th percentile)
    host ms   on a GPU only: until the call returns to Python, which a small model pays (gpu_timer.py)
    GB/s      of that traffic, whatever a contestant really moves
    of copy   the share of what copying q and k reached in the same turns
    MB        memory that a call takes at its peak, inputs not counted
"""

import sys
from functools import partial
from typing import NamedTuple

import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
from measure import alternate, peak_memory, shown, three_digits, with_host_times

from kernels import apply_rope, resolve_backend, rope_tables

# T, Hq, Hkv, D[, B]
QUICK = {"cpu": "1024,8,2,64 4096,8,2,64", "cuda": "4096,32,8,128,4 8192,8,2,64"}
DEFAULT = {
    "cpu": "256,8,2,64 1024,8,2,64 4096,8,2,64 16384,8,2,64 2048,4,2,32,32 4096,32,8,128",
    "cuda": "2048,32,8,128,4 4096,32,8,128,4 8192,32,8,128,4 16384,32,8,128,4 "
    "8192,8,2,64 4096,32,8,64,4 4096,16,4,256,4",
}
SECONDS = {"quick": 8.0, "default": 30.0}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # tables may be in the inputs' dtype


class Problem(NamedTuple):
    T: int
    Hq: int
    Hkv: int
    D: int
    B: int = 1
    backward: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    def inputs(self):
        """q, k and the gradients of the rotated ones, as projections give them: (B, T, H, D) seen as (B, H, T, D)."""
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(heads):
            x = torch.randn(self.B, self.T, heads, self.D, generator=generator, device=self.device)
            return x.to(self.dtype).transpose(1, 2)

        q, k = (draw(heads).requires_grad_(self.backward) for heads in (self.Hq, self.Hkv))
        return q, k, (draw(self.Hq), draw(self.Hkv))

    @property
    def bytes_moved(self):
        elements = self.B * self.T * (self.Hq + self.Hkv) * self.D
        return 2 * elements * self.dtype.itemsize * (2 if self.backward else 1)

    def tables(self):
        return rope_tables(self.T, self.D, device=self.device)


def ours(problem):
    cos, sin = problem.tables()
    return lambda q, k: apply_rope(q, k, cos, sin)


def eager(problem):
    """Rotation as models write it: the two halves, four products, one concatenation."""
    cos, sin = (table.to(problem.dtype) for table in problem.tables())

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    return lambda q, k: (rotate(q), rotate(k))


def compiled(problem):
    torch._dynamo.reset()  # each shape is compiled for itself, and past 8 of them Dynamo would run it uncompiled
    return torch.compile(eager(problem), dynamic=False)


def hugging_face(problem):
    from transformers.models.starcoder2.modeling_starcoder2 import apply_rotary_pos_emb

    cos, sin = _repeated_tables(problem)
    return lambda q, k: apply_rotary_pos_emb(q, k, cos, sin)


def liger(problem):
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    cos, sin = _repeated_tables(problem)
    # it rotates the caller's q and k in place: a timed call turns them further, which costs the same
    return lambda q, k: liger_rotary_pos_emb(q, k, cos, sin)


def _repeated_tables(problem):
    """cos and sin as Hugging Face's models hold them: (1, T, D) in the dtype of q, both halves alike."""
    return (torch.cat((table, table), dim=-1)[None].to(problem.dtype) for table in problem.tables())


CONTESTANTS = {
    "ours": (ours, lambda problem: None),
    "eager": (eager, lambda problem: None),
    "torch.compile": (compiled, lambda problem: harness.why_not_compile(problem.device)),
    "Hugging Face": (hugging_face, lambda problem: harness.not_installed("transformers")),
    "Liger": (
        liger,
        lambda problem: (
            harness.not_installed("liger_kernel") or (None if problem.device.type == "cuda" else "it runs on GPUs only")
        ),
    ),
}


def main(arguments=None):
    flags = harness.parser("rope_speed", __doc__)
    flags.add_argument("--shapes", nargs="+", metavar="T,HQ,HKV,D[,B]", help="points of the grid")
    harness.add_only(flags, CONTESTANTS)
    flags.add_argument("--dtype", choices=harness.DTYPES, help="fp32 on a CPU, bf16 on a GPU by default")
    return harness.run(flags, prepare, arguments)


def prepare(options, device):
    dtype = harness.DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    shapes = options.shapes or (QUICK if options.quick else DEFAULT)[device.type].split()
    problems = [
        parse(shape)._replace(dtype=dtype, device=device, backward=backward)
        for backward in (False, True)
        for shape in shapes
    ]
    seconds = options.seconds or SECONDS["quick" if options.quick else "default"]
    points = {f"{label(problem)}, {name_of_pass(problem)}": problem for problem in problems}
    budget = harness.Budget(points, seconds, options.deadline)
    return partial(measure, budget, harness.chosen(options.only, CONTESTANTS))


def measure(budget, contestants):
    rows = []
    for problem in budget:
        rows += measure_point(problem, contestants, budget.share())
    return {
        "settings": {
            "dtype": harness.name_of(problem.dtype),
            "backend of ours": resolve_backend("auto", problem.device)[0],
        },
        "rows": rows,
        "tables": [table(rows, name) for name in ("fwd", "fwd+bwd")],
        "plots": [plot(rows, name) for name in ("fwd", "fwd+bwd")],
        "left_out": budget.left_out,
        "failed": [
            f"ours at {row['shape']}, {row['pass']}: {row['not_timed']}"
            for row in rows
            if row["contestant"] == "ours" and row["not_timed"]
        ],
    }


def call_of(rotate, problem, inputs):
    """What is timed: one forward, or one forward and backward, on the inputs."""
    q, k, gradients = inputs

    def forward():
        with torch.no_grad():
            return rotate(q, k)

    def forward_and_backward():
        out = rotate(q, k)
        return (*out, *torch.autograd.grad(out, (q, k), gradients))

    return forward_and_backward if problem.backward else forward


def objection(rotate, problem):
    """What the reference, in fp64, says against a contestant and its gradients, in a few words; None for nothing."""
    inputs = problem.inputs()
    exact = [x.detach().double().requires_grad_(problem.backward) for x in inputs[:2]]
    gradients = tuple(x.double() for x in inputs[2])
    cos, sin = problem.tables()

    def reference(q, k):
        return apply_rope(q, k, cos, sin, backend="reference")

    expected = call_of(reference, problem, (*exact, gradients))()
    got = call_of(rotate, problem, inputs)()
    for name, mine, right in zip(("q", "k", "dq", "dk"), got, expected, strict=False):
        error = (mine.detach().double() - right.detach()).abs().max().item()
        if not error <= TOLERANCE[problem.dtype] * 8:  # elements are of size 1, the largest of them below 8
            return f"{name} is off by {error:.2g}, tolerance {TOLERANCE[problem.dtype] * 8:g}"
    return None


def measure_point(problem, contestants, seconds):
    """Check, then time, all contestants on one problem: a row each."""
    inputs = problem.inputs()
    calls, rows = {}, []
    for name, (make, why_not) in contestants.items():
        row = {
            "contestant": name,
            "shape": label(problem),
            **{field: getattr(problem, field) for field in ("T", "Hq", "Hkv", "D", "B")},
            "pass": name_of_pass(problem),
            "not_timed": why_not(problem),
        }
        rows.append(row)
        if row["not_timed"]:
            continue
        try:
            rotate = make(problem)
            row["not_timed"] = objection(rotate, problem)
        except Exception as failure:  # a contestant may fail in any way of its own: its line says so
            row["not_timed"] = harness.in_a_line(failure)
        if row["not_timed"]:
            row["not_timed"] = f"failed the check: {row['not_timed']}"
            continue
        calls[name] = call_of(rotate, problem, inputs)
        row["peak_mb"] = peak_memory(calls[name], problem.device) / 1e6
    q, k = (x.detach() for x in inputs[:2])
    copies = [torch.empty_like(x) for x in (q, k)]

    def copy():
        copies[0].copy_(q)
        copies[1].copy_(k)

    copy()
    times = alternate({**calls, "copy": copy}, problem.device, seconds)
    forward_bytes = problem._replace(backward=False).bytes_moved
    for row in rows:
        if time := times.get(row["contestant"]):
            row |= time.as_dict()
            row["bytes_per_second"] = problem.bytes_moved / time.median
            row["of_copy"] = row["bytes_per_second"] / (forward_bytes / times["copy"].median)
    return rows


def table(rows, name):
    rows = [row for row in rows if row["pass"] == name]
    lines = [
        [
            row["shape"],
            row["contestant"],
            shown(row),
            three_digits(row["bytes_per_second"] / 1e9),
            f"{row['of_copy']:.0%}",
            three_digits(row["peak_mb"]),
        ]
        for row in rows
        if "median_ms" in row
    ]
    made = {
        "title": f"Rotation of q and k, {name}",
        "columns": ["shape", "contestant", "ms", "GB/s", "of copy", "MB"],
        "rows": lines,
        "notes": harness.not_timed(rows),
    }
    return with_host_times(made, rows)


def plot(rows, name):
    """GB/s against the traffic of a call."""
    series = {}
    for row in rows:
        if row["pass"] == name and "median_ms" in row:
            megabytes = row["bytes_per_second"] * row["median_ms"] / 1e9
            series.setdefault(row["contestant"], []).append([round(megabytes, 3), row["bytes_per_second"] / 1e9])
    return {"title": f"Rotation, {name}", "x": "MB read and written", "y": "GB/s", "series": series}


def parse(shape):
    """A `Problem` from T,Hq,Hkv,D[,B]. Raises BadInput."""
    try:
        numbers = [int(word) for word in shape.split(",")]
    except ValueError:
        numbers = []
    if not 4 <= len(numbers) <= 5 or min(numbers) < 1 or numbers[3] % 2:
        raise harness.BadInput(f"--shapes has {shape!r}, wanted T,HQ,HKV,D[,B] with an even D, such as 4096,8,2,64")
    return Problem(*numbers)


def name_of_pass(problem):
    return "fwd+bwd" if problem.backward else "fwd"


def label(problem):
    batch = f"{problem.B} x " if problem.B > 1 else ""
    return f"{batch}{problem.T}, {problem.Hq}/{problem.Hkv} x {problem.D}"


if __name__ == "__main__":
    sys.exit(main())

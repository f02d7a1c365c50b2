"""How fast are q and k rotated, and how close to the memory's speed?

    python benchmarks/rope_speed.py                      # a minute on a CPU; --quick: half of it
    python benchmarks/rope_speed.py --shapes 4096,32,8,128,4 --dtype bf16
    python benchmarks/rope_speed.py --norm               # q and k are normalised before: fused against separate calls

Rotation computes next to nothing, so we count memory traffic: q and k are read once and written once, and the same for
their gradients in the backward pass. With --norm the backward also has to read q and k again. Every contestant is
checked against the reference first. Calls take turns.

    shape     T, query heads / KV heads x head size; the batch size in front if it is not 1
    ms        median of the calls (20th to 80th percentile)
    host ms   on a GPU only: until the call returns to Python (measure.py)
    faults    on a CPU only: page faults a call
    GB/s      of that traffic, whatever a contestant really moves
    of copy   share of the bandwidth that copying q and k reached in the same turns
    MB        memory that a call takes at its peak, without its inputs
"""

import sys
from functools import partial

import drawing
import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
import torch.nn.functional as F
from attn_contestants import Problem
from measure import alternate, call_of, peak_memory, random_heads, shown, table, three_digits

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


def inputs_of(problem):
    """(q, k), with --norm also their weights, and the gradients of the rotated ones."""
    q, k, *gradients = random_heads(problem, problem.Hq, problem.Hkv, problem.Hq, problem.Hkv)
    weights = [1 + q[0, 0, 0] / 4, 1 + k[0, 0, 0] / 4] if problem.norm else []
    return tuple(x.detach().requires_grad_(problem.backward) for x in (q, k, *weights)), tuple(gradients)


def bytes_moved(problem):
    elements = problem.B * problem.T * (problem.Hq + problem.Hkv) * problem.D
    backward = (3 if problem.norm else 2) if problem.backward else 0
    return elements * problem.dtype.itemsize * (2 + backward)


def tables_of(problem):
    return rope_tables(problem.T, problem.D, device=problem.device)


def ours(problem):
    cos, sin = tables_of(problem)
    return lambda q, k: apply_rope(q, k, cos, sin)


def eager(problem):
    """Rotation as models write it: the two halves, four products, one concatenation."""
    cos, sin = (table.to(problem.dtype) for table in tables_of(problem))

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    return lambda q, k: (rotate(q), rotate(k))


def compiled(problem):
    torch._dynamo.reset()  # each shape is compiled alone; after 8 shapes Dynamo would run it uncompiled
    return torch.compile(eager(problem), dynamic=False)


def hugging_face(problem):
    from transformers.models.starcoder2.modeling_starcoder2 import apply_rotary_pos_emb

    cos, sin = _repeated_tables(problem)
    return lambda q, k: apply_rotary_pos_emb(q, k, cos, sin)


def liger(problem):
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    cos, sin = _repeated_tables(problem)
    # it rotates the caller's q and k in place: the next timed call rotates them further, which costs the same
    return lambda q, k: liger_rotary_pos_emb(q, k, cos, sin)


def _repeated_tables(problem):
    """cos and sin as Hugging Face's models hold them: (1, T, D) in the dtype of q, both halves equal."""
    return (torch.cat((table, table), dim=-1)[None].to(problem.dtype) for table in tables_of(problem))


EPS = 1e-6


def ours_fused(problem):
    cos, sin = tables_of(problem)
    return lambda q, k, q_weight, k_weight: apply_rope(q, k, cos, sin, norm=(q_weight, k_weight, EPS))


def ours_apart(problem):
    rotate, size = ours(problem), (problem.D,)
    return lambda q, k, q_weight, k_weight: rotate(
        F.rms_norm(q, size, q_weight, EPS), F.rms_norm(k, size, k_weight, EPS)
    )


def eager_norm(problem):
    """The norm as models write it, in fp32 and rounded before the weight, then the eager rotation."""
    rotate = eager(problem)

    def norm(x, weight):
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)

    return lambda q, k, q_weight, k_weight: rotate(norm(q, q_weight), norm(k, k_weight))


def compiled_norm(problem):
    torch._dynamo.reset()
    return torch.compile(eager_norm(problem), dynamic=False)


NORM_CONTESTANTS = {
    "ours": (ours_fused, lambda problem: None),
    "F.rms_norm, then ours": (ours_apart, lambda problem: None),
    "eager": (eager_norm, lambda problem: None),
    "torch.compile": (compiled_norm, lambda problem: harness.why_not_compile(problem.device)),
}
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
    flags.add_argument("--norm", action="store_true", help="normalise q and k before, with weights")
    harness.add_only(flags, CONTESTANTS | NORM_CONTESTANTS)
    harness.add_dtype(flags)
    return harness.run(flags, prepare, arguments)


def prepare(options, device):
    shapes = options.shapes or (QUICK if options.quick else DEFAULT)[device.type].split()
    problems = [
        parse(shape)._replace(
            dtype=harness.dtype_of(options, device), device=device, backward=backward, norm=options.norm
        )
        for backward in (False, True)
        for shape in shapes
    ]
    contestants = NORM_CONTESTANTS if options.norm else CONTESTANTS
    points = {f"{label(problem)}, {problem.pass_name}": problem for problem in problems}
    return partial(measure, harness.budget(options, points, SECONDS), harness.chosen(options.only, contestants))


def measure(budget, contestants):
    rows = [row for problem in budget for row in measure_point(problem, contestants, budget.share())]
    problem = next(iter(budget.points.values()))
    backend = resolve_backend("auto", problem.device)[0]
    passes = {name: [row for row in rows if row["pass"] == name] for name in ("fwd", "fwd+bwd")}
    return {
        "settings": {"dtype": harness.name_of(problem.dtype), "backend of ours": backend, "norm": problem.norm},
        "rows": rows,
        "tables": [table(f"Rotation of q and k, {name}", of_pass, COLUMNS) for name, of_pass in passes.items()],
        "plots": [plot(of_pass, name) for name, of_pass in passes.items()],
        "left_out": budget.left_out,
    }


COLUMNS = {
    "shape": lambda row: row["shape"],
    "contestant": lambda row: row["contestant"],
    "ms": shown,
    "GB/s": lambda row: three_digits(row["bytes_per_second"] / 1e9),
    "of copy": lambda row: f"{row['of_copy']:.0%}",
    "MB": lambda row: three_digits(row["peak_mb"]),
}


def objection(rotate, problem):
    """What the reference, in fp64, finds wrong in a contestant or its gradients, in a few words; None for nothing."""
    inputs, gradients = inputs_of(problem)
    exact = tuple(x.detach().double().requires_grad_(problem.backward) for x in inputs)
    cos, sin = tables_of(problem)

    def reference(q, k, *weights):
        norm = (*weights, EPS) if weights else None
        return apply_rope(q, k, cos, sin, norm=norm, backend="reference")

    expected = call_of(reference, exact, tuple(x.double() for x in gradients), problem.backward)()
    names = ("q", "k", "dq", "dk", "dq_weight", "dk_weight")
    got = call_of(rotate, inputs, gradients, problem.backward)()
    for name, mine, right in zip(names, got, expected, strict=False):
        # elements are of size 1, the largest below 8; a weight's gradient is a sum of many
        size = max(1.0, right.detach().abs().max().item() / 8) if name.endswith("weight") else 1.0
        error = (mine.detach().double() - right.detach()).abs().max().item() / size
        if not error <= TOLERANCE[problem.dtype] * 8:
            return f"{name} is off by {error:.2g}, tolerance {TOLERANCE[problem.dtype] * 8:g}"
    return None


def measure_point(problem, contestants, seconds):
    """Check, then time, all contestants on one problem: a row each."""
    inputs, gradients = inputs_of(problem)
    calls, rows = {}, []
    for name, (make, why_not) in contestants.items():
        row = {
            "contestant": name,
            "shape": label(problem),
            **{field: getattr(problem, field) for field in ("T", "Hq", "Hkv", "D", "B")},
            "pass": problem.pass_name,
            "not_timed": why_not(problem),
        }
        rows.append(row)
        if row["not_timed"]:
            continue
        try:
            rotate = make(problem)
            row["not_timed"] = objection(rotate, problem)
        except Exception as failure:  # whatever a contestant raises: its line says it
            row["not_timed"] = harness.in_a_line(failure)
        if row["not_timed"]:
            row["not_timed"] = f"failed the check: {row['not_timed']}"
            continue
        calls[name] = call_of(rotate, inputs, gradients, problem.backward)
        row["peak_mb"] = peak_memory(calls[name], problem.device) / 1e6
    q, k = (x.detach() for x in inputs[:2])
    copies = [torch.empty_like(x) for x in (q, k)]

    def copy():
        copies[0].copy_(q)
        copies[1].copy_(k)

    copy()
    times = alternate({**calls, "copy": copy}, problem.device, seconds)
    forward_bytes = bytes_moved(problem._replace(backward=False))
    for row in rows:
        if time := times.get(row["contestant"]):
            row |= time.as_dict()
            row["bytes_per_second"] = bytes_moved(problem) / time.median
            row["of_copy"] = row["bytes_per_second"] / (forward_bytes / times["copy"].median)
    return rows


def plot(rows, name):
    """GB/s against the traffic of a call."""
    series = drawing.series(
        rows,
        lambda row: round(row["bytes_per_second"] * row["median_ms"] / 1e9, 3),
        lambda row: row["bytes_per_second"] / 1e9,
    )
    return {"title": f"Rotation, {name}", "x": "MB read and written", "y": "GB/s", "series": series}


def parse(shape):
    """A `Problem` from T,Hq,Hkv,D[,B]. Raises BadInput."""
    try:
        numbers = [int(word) for word in shape.split(",")]
    except ValueError:
        numbers = []
    if not 4 <= len(numbers) <= 5 or min(numbers) < 1 or numbers[3] % 2:
        raise harness.BadInput(f"--shapes has {shape!r}, wanted T,HQ,HKV,D[,B] with an even D, such as 4096,8,2,64")
    return Problem(numbers[0], None, *numbers[1:])


def label(problem):
    batch = f"{problem.B} x " if problem.B > 1 else ""
    return f"{batch}{problem.T}, {problem.Hq}/{problem.Hkv} x {problem.D}"


if __name__ == "__main__":
    sys.exit(main())

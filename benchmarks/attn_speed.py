"""How fast is sliding-window attention, against what else there is?

    python benchmarks/attn_speed.py                            # under 10 minutes on two CPU cores, --quick under 2
    python benchmarks/attn_speed.py --shapes 4096,256 8192,256,32,8,128 --dtype bf16

Every contestant is checked against the reference, output and gradients, in fp64; who is wrong is named and not timed.
Calls take turns. Columns:

    shape        T, window, query heads / KV heads x head size; the batch before it if it is not 1
    ms           median of the calls (20th to 80th percentile); fwd+bwd is one forward and one backward together
    host ms      on a GPU only: until the call returns to Python, which a small model pays (gpu_timer.py)
    TFLOP/s      over visible pairs only (GFLOP/s on a CPU): 4 D a pair forward, 3.5 times that with the backward
    of matmul    the share of what a large matrix product of the same dtype reached in the same turns
    MB           memory that a call takes at its peak, inputs not counted, masks and results counted
    growth       by which factor the time grew since half the T, all else equal; ^ its exponent (1 linear, 2 quadratic)
    x masked     how many times as fast as SDPA with a mask; x causal: as SDPA causal, which ignores the window
"""

import math
import sys
from collections import Counter
from functools import partial

import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
from attn_contestants import CONTESTANTS, Oracle, Problem, backend_of_ours, call_of
from measure import alternate, large_matmul, peak_memory, shown, three_digits, with_host_times, with_memory_held

# T, window[, Hq, Hkv, D[, B]]
QUICK = {
    "cpu": "256,25 1024,128 2048,128 4096,256",
    "cuda": "1024,128,32,8,128,4 4096,256,32,8,128,4 8192,1024,32,8,128,4 8192,256",
}
DEFAULT = {
    "cpu": "256,25 1024,128 2048,128 2048,256 4096,256 8192,256 16384,256 32768,256 "  # lengths
    "4096,64 4096,1024 1024,none "  # windows
    "2048,128,8,8 2048,128,6,2 2048,128,8,1 "  # groups of 1, 3 and 8 query heads
    "2048,128,8,2,32 2048,128,8,2,128",  # head sizes
    "cuda": "256,25 1024,128 2048,128 4096,256 8192,256 "
    "2048,1024,32,8,128,4 4096,1024,32,8,128,4 8192,1024,32,8,128,4 16384,1024,32,8,128,4 32768,1024,32,8,128,4 "
    "8192,128,32,8,128,4 8192,256,32,8,128,4 8192,4096,32,8,128,4 4096,none,32,8,128,4 "
    "8192,1024,32,32,128,4 8192,1024,24,8,128,4 8192,1024,32,1,128,4 "
    "8192,1024,32,8,64,4 8192,1024,16,4,256,4",
}
PASSES = {"fwd": False, "fwd+bwd": True}
SECONDS = {"quick": 25.0, "default": 150.0}  # of timing; checks, compilations and the least rounds come on top


def main(arguments=None):
    flags = harness.parser("attn_speed", __doc__)
    flags.add_argument(
        "--shapes", nargs="+", metavar="T,W[,HQ,HKV,D[,B]]", help="points of the grid; W none: no window (8,2,64,1)"
    )
    flags.add_argument("--dtype", choices=harness.DTYPES, help="fp32 on a CPU, bf16 on a GPU by default")
    harness.add_only(flags, CONTESTANTS)
    flags.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="both by default")
    return harness.run(flags, prepare, arguments)


def prepare(options, device):
    dtype = harness.DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    contestants = harness.chosen(options.only, CONTESTANTS)
    shapes = options.shapes or (QUICK if options.quick else DEFAULT)[device.type].split()
    problems = [
        parse(shape)._replace(dtype=dtype, device=device, backward=PASSES[name])
        for name in options.passes
        for shape in shapes
    ]
    seconds = options.seconds or SECONDS["quick" if options.quick else "default"]
    points = {f"{label(problem)}, {name_of_pass(problem)}": problem for problem in problems}
    return partial(measure, harness.Budget(points, seconds, options.deadline), contestants, options.passes)


def measure(budget, contestants, passes):
    rows = []
    for problem in budget:
        device, dtype = problem.device, problem.dtype
        try:
            rows += measure_point(problem, contestants, budget.share())
        except torch.OutOfMemoryError:  # of the check in fp64, or of the inputs: contestants' own are caught
            budget.left_out.append(f"{label(problem)} (the check does not fit into memory)")
    add_growth(rows)
    return {
        "settings": {"dtype": harness.name_of(dtype), "backend of ours": backend_of_ours(device)},
        "rows": rows,
        "tables": [table(rows, name, device) for name in passes],
        "plots": plots(rows, passes),
        "left_out": budget.left_out,
        "failed": [
            f"ours at {row['shape']}, {row['pass']}: {row['not_timed']}"
            for row in rows
            if row["contestant"] == "ours" and row["not_timed"]
        ],
    }


def measure_point(problem, contestants, seconds):
    """Check, then time, all contestants on one problem: a row each."""
    inputs = problem.inputs()
    oracles, calls, rows = {}, {}, []
    for name, contestant in contestants.items():
        row = {
            "contestant": name,
            "way": "",
            "shape": label(problem),
            **{field: getattr(problem, field) for field in ("T", "window", "Hq", "Hkv", "D", "B")},
            "pass": name_of_pass(problem),
            "not_timed": contestant.why_not(problem),
        }
        rows.append(row)
        if row["not_timed"]:
            continue
        if contestant.windowed not in oracles:
            oracles[contestant.windowed] = Oracle(problem, inputs, contestant.windowed)
        facts, call = best_way(contestant, problem, inputs, oracles[contestant.windowed])
        row |= facts
        if call is not None:
            calls[name] = call
    if calls:
        matmul, matmul_flops = large_matmul(problem.device, problem.dtype)
        matmul()
        times = alternate({**calls, "matmul": matmul}, problem.device, seconds)
        add_figures(rows, times, problem.flops, matmul_flops)
    return rows


def best_way(contestant, problem, inputs, oracle):
    """({way, error, peak_mb, not_timed}, call) of the contestant's fastest way that is right; call None if none is."""
    objections, right = [], []
    for way, prepare in contestant.ways.items():
        try:
            attend, held = with_memory_held(partial(prepare, problem), problem.device)
            error, objection = oracle.objection(attend)
        except Exception as failure:  # a contestant may fail in any way of its own: its line says so
            error, objection = None, harness.in_a_line(failure)
        if objection:
            objections.append(objection + (f" ({way})" if way else ""))
            continue
        call = call_of(attend, problem, inputs)
        # slow ones are slow to compare: one turn each, and none where there is nothing to choose
        time = alternate({way: call}, problem.device, 0, least=1)[way].median if len(contestant.ways) > 1 else 0
        right.append((time, way, call, error, held))
    if not right:
        return {"not_timed": "failed the check: " + "; ".join(objections)}, None
    _, way, call, error, held = min(right, key=lambda entry: entry[0])
    memory = held + peak_memory(call, problem.device)
    facts = {"way": way, "error": error, "peak_mb": memory / 1e6, "refused_ways": objections}
    facts["first_ms_of_ways"] = {entry[1]: entry[0] * 1e3 for entry in right if len(contestant.ways) > 1}
    return facts, call


def add_figures(rows, times, flops, matmul_flops):
    """Put what was measured, and what follows from it, into the rows of one problem."""
    reached = matmul_flops / times["matmul"].median
    for row in rows:
        time = times.get(row["contestant"])
        if time is None:
            continue
        row |= time.as_dict()
        row["flops_per_second"] = flops / time.median
        row["of_matmul"] = row["flops_per_second"] / reached
        for name, key in (("SDPA masked", "x_masked"), ("SDPA causal", "x_causal")):
            if name in times:
                row[key] = times[name].median / time.median


def add_growth(rows):
    """Where the same contestant was timed at half the length, the factor by which its time has grown since."""

    def key(row, T):
        return (row["contestant"], row["pass"], row["window"], row["Hq"], row["Hkv"], row["D"], row["B"], T)

    by_length = {key(row, row["T"]): row for row in rows if "median_ms" in row}
    for row in by_length.values():
        half = by_length.get(key(row, row["T"] / 2))
        if half is not None:
            row["growth"] = row["median_ms"] / half["median_ms"]
            row["exponent"] = math.log2(row["growth"])


def table(rows, name, device):
    rows = [row for row in rows if row["pass"] == name]
    unit, scale = ("TFLOP/s", 1e12) if device.type == "cuda" else ("GFLOP/s", 1e9)
    columns = ["shape", "contestant", "ms", unit, "of matmul", "MB", "growth", "x masked", "x causal"]
    lines = [
        [
            row["shape"],
            row["contestant"],
            shown(row),
            three_digits(row["flops_per_second"] / scale),
            f"{row['of_matmul']:.0%}",
            three_digits(row["peak_mb"]),
            f"{row['growth']:.2f} ^{row['exponent']:.2f}" if "growth" in row else "",
            f"{row['x_masked']:.2f}" if "x_masked" in row else "",
            f"{row['x_causal']:.2f}" if "x_causal" in row else "",
        ]
        for row in rows
        if "median_ms" in row
    ]
    ways = Counter((row["contestant"], row["way"]) for row in rows if row["way"])
    notes = harness.not_timed(rows)
    notes += [f"{who} with {way}: its fastest at {points} points" for (who, way), points in sorted(ways.items())]
    made = {"title": f"Attention, {name}", "columns": columns, "rows": lines, "notes": notes}
    return with_host_times(made, rows)


def plots(rows, passes):
    """Time against length, for the window and heads that have the most lengths."""
    drawn = []
    for name in passes:
        families = {}
        for row in rows:
            if row["pass"] == name and "median_ms" in row:
                families.setdefault((row["window"], row["Hq"], row["Hkv"], row["D"], row["B"]), []).append(row)
        if not families:
            continue
        (window, Hq, Hkv, D, B), family = max(families.items(), key=lambda item: len({row["T"] for row in item[1]}))
        series = {}
        for row in family:
            series.setdefault(row["contestant"], []).append([row["T"], row["median_ms"]])
        title = f"Attention, {name}, window {window}, B {B}, heads {Hq}/{Hkv} x {D}"
        drawn.append({"title": title, "x": "T, tokens", "y": "milliseconds a call", "series": series})
    return drawn


def parse(shape):
    """A `Problem` from T,W[,Hq,Hkv[,D[,B]]]. Raises BadInput."""
    words = shape.split(",")
    try:
        numbers = [None if i == 1 and word == "none" else int(word) for i, word in enumerate(words)]
    except ValueError:
        numbers = []
    if not 2 <= len(numbers) <= 6 or len(numbers) == 3 or any(n is not None and n < 1 for n in numbers):
        raise harness.BadInput(f"--shapes has {shape!r}, wanted T,W[,HQ,HKV[,D[,B]]] such as 2048,128 (W may be none)")
    problem = Problem(*numbers)
    if problem.Hq % problem.Hkv:
        raise harness.BadInput(f"--shapes has {shape!r}, whose {problem.Hkv} KV heads do not divide {problem.Hq} heads")
    return problem


def name_of_pass(problem):
    return "fwd+bwd" if problem.backward else "fwd"


def label(problem):
    batch = f"{problem.B} x " if problem.B > 1 else ""
    return f"{batch}{problem.T}, W {problem.window}, {problem.Hq}/{problem.Hkv} x {problem.D}"


if __name__ == "__main__":
    sys.exit(main())

"""How fast is sliding-window attention, compared with other implementations?

    python benchmarks/attn_speed.py                            # under 10 minutes on two CPU cores, --quick under 2
    python benchmarks/attn_speed.py --shapes 4096,256 8192,256,32,8,128 --dtype bf16
    python benchmarks/attn_speed.py --documents                # a packed row: documents that do not see each other

Every contestant is checked first: output and gradients against the reference in fp64, within the error that the dtype
explains (`Oracle`). A wrong one is named and not timed. Calls take turns. Columns:

    shape        T, window, query heads / KV heads x head size; the batch size in front if it is not 1
    ms           median of the calls (20th to 80th percentile); fwd+bwd is one forward and one backward together
    host ms      on a GPU only: until the call returns to Python (measure.py)
    busy ms      on a CPU only: of ours while another process keeps a core busy; faults: page faults a call
    TFLOP/s      over visible pairs only (GFLOP/s on a CPU): 4 D a pair forward, 3.5 times that with the backward
    of matmul    share of the FLOP/s of a large matrix product in the same dtype and the same turns
    MB           memory that a call takes at its peak: masks and results count, inputs do not
    growth       the time over the time at half the T, all else equal; ^ its exponent (1 linear, 2 quadratic)
    x masked     how many times as fast as SDPA with a mask; x causal: as SDPA causal, which ignores the window;
                 x loop: as a loop of SDPA over the documents

The lengths of documents are drawn from a log-normal distribution with a sigma of 1.
"""

import math
import sys
from collections import Counter
from functools import partial

import drawing
import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
from attn_contestants import CONTESTANTS, Oracle, Problem, backend_of_ours
from document_contestants import DOCUMENT_CONTESTANTS, MEAN_LENGTH, document_lengths
from measure import (
    add_busy,
    alternate,
    call_of,
    large_matmul,
    peak_memory,
    ratio,
    shown,
    table,
    three_digits,
    with_memory_held,
)

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
DOCUMENTS = "8192,256 8192,none"  # with --documents
PASSES = {"fwd": False, "fwd+bwd": True}
SECONDS = {"quick": 25.0, "default": 150.0}  # of timing; checks and compilations come on top


def main(arguments=None):
    flags = harness.parser("attn_speed", __doc__)
    flags.add_argument(
        "--shapes", nargs="+", metavar="T,W[,HQ,HKV,D[,B]]", help="points of the grid; W none: no window (8,2,64,1)"
    )
    harness.add_dtype(flags)
    flags.add_argument(
        "--documents", nargs="?", type=int, const=MEAN_LENGTH, metavar="TOKENS",
        help=f"rows of documents of this mean length ({MEAN_LENGTH}), and contestants for them",
    )  # fmt: skip
    harness.add_only(flags, CONTESTANTS | DOCUMENT_CONTESTANTS)
    flags.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="both by default")
    return harness.run(flags, prepare, arguments)


def prepare(options, device):
    dtype = harness.dtype_of(options, device)
    documents = options.documents
    if documents is not None and documents < 1:
        raise harness.BadInput(f"--documents is {documents}, wanted a mean length of at least 1")
    contestants = harness.chosen(options.only, DOCUMENT_CONTESTANTS if documents else CONTESTANTS)
    default = DOCUMENTS if documents else (QUICK if options.quick else DEFAULT)[device.type]
    shapes = options.shapes or default.split()
    problems = [
        parse(shape)._replace(dtype=dtype, device=device, backward=PASSES[name])
        for name in options.passes
        for shape in shapes
    ]
    if documents:
        problems = [problem._replace(lengths=document_lengths(problem.T, documents)) for problem in problems]
    points = {f"{label(problem)}, {problem.pass_name}": problem for problem in problems}
    return partial(measure, harness.budget(options, points, SECONDS), contestants, options.passes)


def measure(budget, contestants, passes):
    rows = []
    for problem in budget:
        try:
            rows += measure_point(problem, contestants, budget.share())
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:  # a contestant's own is caught
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            budget.left_out.append(f"{label(problem)} (the check does not fit into memory)")
    add_growth(rows)
    return {
        "settings": {"dtype": harness.name_of(problem.dtype), "backend of ours": backend_of_ours(problem.device)},
        "rows": rows,
        "tables": [table_of(rows, name, problem.device) for name in passes],
        "plots": plots(rows, passes),
        "left_out": budget.left_out,
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
            **{field: getattr(problem, field) for field in Problem._fields[:6]},
            "documents": problem.lengths and len(problem.lengths),
            "pass": problem.pass_name,
            "not_timed": contestant.why_not(problem),
        }
        rows.append(row)
        if row["not_timed"]:
            continue
        sees = contestant.windowed, contestant.in_documents
        if sees not in oracles:
            oracles[sees] = Oracle(problem, inputs, *sees)
        facts, call = best_way(contestant, problem, inputs, oracles[sees])
        row |= facts
        if call is not None:
            calls[name] = call
    if calls:
        matmul, matmul_flops = large_matmul(problem.device, problem.dtype)
        matmul()
        times = alternate({**calls, "matmul": matmul}, problem.device, seconds)
        add_figures(rows, times, problem.flops, matmul_flops)
        add_busy(rows, calls, problem.device)
    return rows


def best_way(contestant, problem, inputs, oracle):
    """({way, error, peak_mb, not_timed}, call) of the contestant's fastest correct way; call None without one."""
    objections, right = [], []
    for way, prepare in contestant.ways.items():
        try:
            attend, held = with_memory_held(partial(prepare, problem), problem.device)
            error, objection = oracle.objection(attend)
        except Exception as failure:  # whatever a contestant raises: its line says it
            error, objection = None, harness.in_a_line(failure)
        if objection:
            objections.append(objection + (f" ({way})" if way else ""))
            continue
        call = call_of(attend, inputs[:3], inputs[3:], problem.backward)
        # one turn each, which is enough to choose; none where there is nothing to choose
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
    """Add the measured times, and what follows from them, to the rows of one problem."""
    reached = matmul_flops / times["matmul"].median
    for row in rows:
        time = times.get(row["contestant"])
        if time is None:
            continue
        row |= time.as_dict()
        row["flops_per_second"] = flops / time.median
        row["of_matmul"] = row["flops_per_second"] / reached
        for name, key in (("SDPA masked", "x_masked"), ("SDPA causal", "x_causal"), ("SDPA in a loop", "x_loop")):
            if name in times:
                row[key] = times[name].median / time.median


def add_growth(rows):
    """Add the factor by which a contestant's time grew since half the length, where that was timed too."""

    def key(row, T):
        return (row["contestant"], row["pass"], row["window"], row["Hq"], row["Hkv"], row["D"], row["B"], T)

    by_length = {key(row, row["T"]): row for row in rows if "median_ms" in row}
    for row in by_length.values():
        half = by_length.get(key(row, row["T"] / 2))
        if half is not None:
            row["growth"] = row["median_ms"] / half["median_ms"]
            row["exponent"] = math.log2(row["growth"])


def table_of(rows, name, device):
    unit, scale = ("TFLOP/s", 1e12) if device.type == "cuda" else ("GFLOP/s", 1e9)
    rows = [row for row in rows if row["pass"] == name]
    columns = {
        "shape": lambda row: row["shape"],
        "contestant": lambda row: row["contestant"],
        "ms": shown,
        unit: lambda row: three_digits(row["flops_per_second"] / scale),
        "of matmul": lambda row: f"{row['of_matmul']:.0%}",
        "MB": lambda row: three_digits(row["peak_mb"]),
        "growth": lambda row: f"{row['growth']:.2f} ^{row['exponent']:.2f}" if "growth" in row else "",
        "x masked": ratio("x_masked"),
        "x causal": ratio("x_causal"),
    }
    in_documents = any(row.get("documents") for row in rows)
    if in_documents:  # of one length, and nothing is compared with causal attention across them
        del columns["growth"], columns["x causal"]
        columns["x loop"] = ratio("x_loop")
    made = table(f"Attention{' in documents' * in_documents}, {name}", rows, columns)
    ways = Counter((row["contestant"], row["way"]) for row in rows if row["way"])
    made["notes"] += [
        f"{who} with {way}: its fastest at {points} points" for (who, way), points in sorted(ways.items())
    ]
    return made


def plots(rows, passes):
    """A pass each: lines over the length for the window and heads with the most lengths; bars where no line has two."""

    def family_of(row):
        return tuple(row[field] for field in ("window", "Hq", "Hkv", "D", "B"))

    drawn = []
    for name in passes:
        timed = [row for row in rows if row["pass"] == name and "median_ms" in row]
        lengths = {}
        for row in timed:
            lengths.setdefault(family_of(row), set()).add(row["T"])
        longest = max(lengths, key=lambda family: len(lengths[family]), default=None)
        what = {"fwd": "forward", "fwd+bwd": "forward + backward"}[name]
        if longest is None:
            continue
        if len(lengths[longest]) == 1:
            bars = drawing.bars(timed, lambda row: row["median_ms"])
            title = f"{what}\n{next(iter(bars))}" if len(bars) == 1 else what
            drawn.append({"title": title, "x": "ms a call", "bars": bars})
            continue
        window, Hq, Hkv, D, B = longest
        title = f"{what}\nwindow {window}, {Hq} heads on {Hkv} KV heads of {D}" + (f", batch {B}" if B > 1 else "")
        family = [row for row in timed if family_of(row) == longest]
        series = drawing.series(family, lambda row: row["T"], lambda row: row["median_ms"])
        drawn.append({"title": title, "x": "tokens", "y": "milliseconds a call", "series": series})
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


def label(problem):
    batch = f"{problem.B} x " if problem.B > 1 else ""
    documents = f", {len(problem.lengths)} documents" if problem.lengths else ""
    return f"{batch}{problem.T}, W {problem.window}, {problem.Hq}/{problem.Hkv} x {problem.D}{documents}"


if __name__ == "__main__":
    sys.exit(main())

"""What do tokens that are always seen cost, beside a window?

    python benchmarks/prefix_speed.py                    # a minute on a CPU core; --quick: the smaller half

A prefix is composed of two attentions (kernels/prefix.py). All three contestants take turns. Attention is timed with
rotation inside. A decoding step is `append_to_cache` and `sliding_gqa_decode` of one token after T others, and its ring
has no slot to spare.

    ours, prefix 4      the first 4 positions are seen besides the window
    ours, no prefix     the window alone: the difference is what the prefix costs
    ours, bounded       as the first, with `prefix_distance` half of T: q is rotated twice, and decoding composes

    shape     T, query heads / KV heads x head size, window
    ms        median of the calls (20th to 80th percentile)
    x         the time against that without a prefix
    operators that PyTorch runs in the forward or the step, views and empty tensors left out. On a GPU each of PyTorch's
              own is a launch at least, and one of ours one to three
"""

import sys
from functools import partial

import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
from attn_contestants import Problem
from attn_speed import label
from measure import alternate, call_of, random_heads, ratio, shown, table
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import append_to_cache, resolve_backend, rope_tables, sliding_gqa_attention, sliding_gqa_decode

PREFIX = 4
SHAPES = {"quick": [(2048, 256)], "default": [(2048, 256), (8192, 512)]}
CONTESTANTS = {"ours, prefix 4": (PREFIX, False), "ours, no prefix": (0, False), "ours, bounded": (PREFIX, True)}
SECONDS = {"quick": 12.0, "default": 45.0}


def options_of(problem, prefix, bounded):
    distance = {"prefix_distance": problem.T // 2} if bounded else {}
    return {"prefix": prefix, "rope": rope_tables(problem.T + 1, problem.D, device=problem.device), **distance}


def attention_call(problem, prefix, bounded):
    q, k, v, gradient = random_heads(problem, problem.Hq, problem.Hkv, problem.Hkv, problem.Hq)
    inputs = tuple(x.requires_grad_(problem.backward) for x in (q, k, v))
    attend = partial(sliding_gqa_attention, window=problem.window, **options_of(problem, prefix, bounded))
    return call_of(attend, inputs, (gradient,), problem.backward)


def decoding_call(problem, prefix, bounded):
    token = problem._replace(T=1)
    q, k, v = random_heads(token, problem.Hq, problem.Hkv, problem.Hkv)
    slots = token._replace(T=prefix + problem.window)
    rings = [x.contiguous() for x in random_heads(slots, problem.Hkv, problem.Hkv)]
    lengths = torch.full((problem.B,), problem.T + 1, dtype=torch.int32, device=problem.device)
    options = options_of(problem, prefix, bounded)

    def step():
        append_to_cache(k, v, *rings, lengths, prefix=prefix, rope=options["rope"])
        return sliding_gqa_decode(q, *rings, lengths, problem.window, **options)

    return step


class Operators(TorchDispatchMode):
    """Counts the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if not (function.is_view or "empty" in name or "_unsafe_view" in name or "detach" in name):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def count_operators(call):
    with Operators() as counted:
        call()
    return len(counted.names)


def prepare(options, device):
    shapes = SHAPES["quick" if options.quick else "default"]
    dtype = harness.dtype_of(options, device)
    points = {}
    for T, window in shapes:
        for name in ("fwd", "fwd+bwd", "token"):
            problem = Problem(T, window, 8, 2, 64)._replace(dtype=dtype, device=device, backward=name == "fwd+bwd")
            points[f"{label(problem)}, {name}"] = name, problem
    return partial(measure, harness.budget(options, points, SECONDS))


def measure(budget):
    rows = [row for name, problem in budget for row in measure_point(name, problem, budget.share())]
    problem = next(iter(budget.points.values()))[1]
    columns = {
        "shape": lambda row: row["shape"],
        "pass": lambda row: row["pass"],
        "contestant": lambda row: row["contestant"],
        "ms": shown,
        "x": ratio("x_without"),
        "operators": lambda row: str(row["operators"]),
    }
    groups = {}
    for row in rows:
        groups.setdefault(f"{row['shape']}, {row['pass']}", {})[row["contestant"]] = row["x_without"]
    return {
        "settings": {
            "dtype": harness.name_of(problem.dtype),
            "backend of ours": resolve_backend("auto", problem.device)[0],
        },
        "rows": rows,
        "tables": [table("Cost of a prefix", rows, columns)],
        "plots": [{"title": "Time with a prefix", "x": "time against that without a prefix", "bars": groups}],
        "left_out": budget.left_out,
    }


def measure_point(name, problem, seconds):
    make = decoding_call if name == "token" else attention_call
    calls = {contestant: make(problem, *settings) for contestant, settings in CONTESTANTS.items()}
    for call in calls.values():
        call()
    forward = calls if name == "token" else {}
    for contestant, settings in CONTESTANTS.items():
        forward.setdefault(contestant, attention_call(problem._replace(backward=False), *settings))
    operators = {contestant: count_operators(call) for contestant, call in forward.items()}
    times = alternate(calls, problem.device, seconds)
    rows = []
    for contestant, time in times.items():
        row = {"contestant": contestant, "shape": label(problem), "pass": name, "not_timed": None} | time.as_dict()
        row |= {"T": problem.T, "window": problem.window, "operators": operators[contestant]}
        rows.append(row | {"x_without": time.median / times["ours, no prefix"].median})
    return rows


def main(arguments=None):
    flags = harness.parser("prefix_speed", __doc__)
    harness.add_dtype(flags)
    return harness.run(flags, prepare, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""What do the logits of a large vocabulary cost in a training step, and what is saved by making them in pieces?

    python benchmarks/loss_speed.py                      # vocabularies of GPT-2 and Qwen, 2,048 tokens; 5 minutes
    python benchmarks/loss_speed.py --shapes 2048,128256,4096 --dtype bf16

A call is the head of a model, forward and backward: x (T, C) and weight (V, C), random, to the gradients of both. With
--dtype bf16 it runs under autocast, as training does. Every contestant's loss and gradients are compared with the plain
ones first. Calls take turns. --quick: GPT-2 only.

    shape     T tokens, vocabulary V, width C
    ms        median of the calls (20th to 80th percentile)
    x plain   time over that of all logits
    MB        memory that a call takes at its peak, without x and weight, with their gradients
"""

import sys
from functools import partial
from typing import NamedTuple

import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
import torch.nn.functional as F
from measure import alternate, peak_memory, ratio, shown, table, three_digits

from model.linear_loss import linear_loss

SHAPES = {"quick": "2048,50257,256", "default": "2048,50257,256 2048,151936,256"}
SECONDS = {"quick": 20.0, "default": 150.0}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}  # of the gradients' norms


class Shape(NamedTuple):
    T: int
    V: int
    C: int


def plain(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight), targets)


def torch_in_pieces(x, weight, targets):
    return F.linear_cross_entropy(x, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


WHY_NOT_TORCH = None if hasattr(F, "linear_cross_entropy") else f"PyTorch {torch.__version__} lacks it"
CONTESTANTS = {  # name: (loss, why it is not there)
    "all logits": (plain, None),
    "ours, pieces": (linear_loss, None),
    "torch, linear_cross_entropy": (getattr(F, "linear_cross_entropy", None), WHY_NOT_TORCH),
    "torch, in pieces": (torch_in_pieces, WHY_NOT_TORCH),
}


def main(arguments=None):
    flags = harness.parser("loss_speed", __doc__)
    flags.add_argument("--shapes", nargs="+", metavar="T,V,C", help="points of the grid")
    harness.add_only(flags, CONTESTANTS)
    harness.add_dtype(flags)
    flags.set_defaults(plot="none")
    return harness.run(flags, prepare, arguments)


def prepare(options, device):
    shapes = [parse(text) for text in options.shapes or SHAPES["quick" if options.quick else "default"].split()]
    budget = harness.budget(options, {label(shape): shape for shape in shapes}, SECONDS)
    return partial(
        measure, budget, harness.chosen(options.only, CONTESTANTS), harness.dtype_of(options, device), device
    )


def measure(budget, contestants, dtype, device):
    rows = [row for shape in budget for row in measure_point(shape, contestants, dtype, device, budget.share())]
    columns = {
        "shape": lambda row: row["shape"],
        "contestant": lambda row: row["contestant"],
        "ms": shown,
        "x plain": ratio("x_plain"),
        "MB": lambda row: three_digits(row["peak_mb"]),
    }
    return {
        "settings": {"dtype": harness.name_of(dtype), "threads": torch.get_num_threads()},
        "rows": rows,
        "tables": [table("Head and loss, forward and backward", rows, columns)],
        "plots": [],
        "left_out": budget.left_out,
    }


def step_of(loss, shape, dtype, device):
    """A call that returns (loss, gradients of x and weight)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.T, shape.C, generator=generator).to(device).requires_grad_()
    weight = (0.02 * torch.randn(shape.V, shape.C, generator=generator)).to(device).requires_grad_()
    targets = torch.randint(shape.V, (shape.T,), generator=generator).to(device)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            value = loss(x, weight, targets)
        return value.detach(), *torch.autograd.grad(value, (x, weight))

    return step


def objection(found, expected, dtype):
    """What is wrong with a loss or its gradients, in a few words; None for nothing."""
    for name, mine, right in zip(("loss", "dx", "dweight"), found, expected, strict=True):
        error = ((mine.double() - right.double()).norm() / right.double().norm()).item()
        if not error <= TOLERANCE[dtype]:
            return f"{name} is off by {error:.2g} of its size, tolerance {TOLERANCE[dtype]:g}"
    return None


def measure_point(shape, contestants, dtype, device, seconds):
    """Check, then time, all contestants on one shape: a row each."""
    expected, calls, rows = step_of(plain, shape, dtype, device)(), {}, []
    for name, (loss, why_not) in contestants.items():
        row = {"contestant": name, "shape": label(shape), **shape._asdict(), "not_timed": why_not}
        rows.append(row)
        if why_not:
            continue
        step = step_of(loss, shape, dtype, device)
        if wrong := objection(step(), expected, dtype):
            row["not_timed"] = f"failed the check: {wrong}"
            continue
        calls[name] = step
        row["peak_mb"] = peak_memory(step, device) / 1e6
    del expected
    times = alternate(calls, device, seconds)
    for row in rows:
        if time := times.get(row["contestant"]):
            row |= time.as_dict()
            if "all logits" in times:
                row["x_plain"] = time.median / times["all logits"].median
    return rows


def parse(text):
    """A `Shape` from T,V,C. Raises BadInput."""
    try:
        shape = Shape(*(int(word) for word in text.split(",")))
    except (ValueError, TypeError):
        shape = Shape(0, 0, 0)
    if min(shape) < 1:
        raise harness.BadInput(f"--shapes has {text!r}, wanted T,V,C such as 2048,50257,256")
    return shape


def label(shape):
    return f"{shape.T:,} of {shape.V:,}, width {shape.C}"


if __name__ == "__main__":
    sys.exit(main())

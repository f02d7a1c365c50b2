"""Where does the time of a default training step go, and that of a written token?

    python benchmarks/time_spent.py                          # half a minute
    OMP_NUM_THREADS=1 python benchmarks/time_spent.py        # the shares of the processor time

The model, the batch and the precision are those of `python -m train`; the token is `generate`'s. PyTorch's profiler
counts the operators, each with the time that it spends itself. The profiler adds about a microsecond an operator, and
time between operators is Python's: the notes have the whole time without the profiler. Columns:

    us a call    microseconds of the operator in a step or a token, all its calls together
    share        of the time in PyTorch
    times        how often it is called
"""

import sys
from collections import deque
from functools import partial
from itertools import islice
from time import perf_counter

import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
from measure import three_digits
from torch.profiler import ProfilerActivity, profile
from train_speed import VOCABULARY

from model import GPT, generate
from model.command import use_fast_products
from train import Trainer, TrainerConfig
from train.config import RunConfig
from train.data import TokenDataset

CALLS = {"a training step": 20, "a token": 500}
LINES = 16  # of a table; the other operators share one


def main(arguments=None):
    return harness.run(harness.parser("time_spent", __doc__), prepare, arguments)


def prepare(options, device):
    return partial(measure, device, 1 if options.quick else 3)


def measure(device, repeats):
    use_fast_products(device)
    rows, tables = [], []
    for what, make in (("a training step", steps), ("a token", tokens)):
        table, seconds = time_spent(what, make(device, CALLS[what] * repeats), CALLS[what] * repeats)
        tables.append(table)
        rows.append({"contestant": "ours", "shape": what, "median_ms": seconds * 1e3, "not_timed": None})
    return {"rows": rows, "tables": tables, "plots": []}


def steps(device, count):
    """A function that takes `count` steps of the default run, on a text of random tokens."""
    run, config = RunConfig(), TrainerConfig(device=str(device), max_steps=count, eval_every=count, log_every=count)
    text = torch.randint(VOCABULARY, (100_000,), generator=torch.Generator().manual_seed(0))
    dataset = TokenDataset(text, run.context_size, None)
    model = GPT(run.model_config(VOCABULARY), seed=0)
    return lambda: Trainer(model, dataset, None, config).train()


def tokens(device, count):
    """A function that writes `count` tokens of a text."""
    model = GPT(RunConfig().model_config(VOCABULARY), seed=0).to(device).eval()
    written = generate(model, [[0] * 20], 10**6, seed=0)
    return lambda: deque(islice(written, count), maxlen=0)


def time_spent(what, run, calls):
    """(the table, the seconds of a call without the profiler); run() makes `calls` calls."""
    run()
    started = perf_counter()
    run()
    seconds = (perf_counter() - started) / calls
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)

    def line(name, events):
        spent = sum(event.self_cpu_time_total for event in events)
        count = sum(event.count for event in events)
        return [name, three_digits(spent / calls), f"{spent / whole:.1%}", three_digits(count / calls)]

    lines = [line(event.key, [event]) for event in events[:LINES]]
    lines += [line("others", events[LINES:]), line("all", events)]
    title = f"Where the time of {what} goes"
    notes = [f"{what} takes {three_digits(seconds * 1e3)} ms without the profiler"]
    return {
        "title": title,
        "columns": ["operator", "us a call", "share", "times"],
        "rows": lines,
        "notes": notes,
    }, seconds


if __name__ == "__main__":
    sys.exit(main())

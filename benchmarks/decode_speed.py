"""How fast does a sliding-window model generate text, and does its speed depend on the length of the text?

    python benchmarks/decode_speed.py                     # three minutes on two CPU cores; --quick: under one
    python benchmarks/decode_speed.py --positions 500 20000 --batch-sizes 1 8 --windows 128 512

The same random weights are run by our sampler, by recomputing the window for every token (the original sampler), by an
SDPA model whose cache grows, and by Hugging Face's generate. All choose the likeliest token; their tokens are checked
against the model without a cache first. They take turns, all positions of a row of the grid together.

    position   tokens before the first timed one
    ms         of a token (of a step, all rows of the batch): median of the turns (20th to 80th percentile)
    busy ms    on a CPU: of ours while another process keeps a core busy
    tokens/s   batch / ms
    x ours     its time over that of ours at the same position
    growth     its time over its own at the first position
    GB/s       on a GPU: weights and the keys and values in the window, read once a step; of the card's peak

Then ours generates one text from the first token to the last position, and the table shows the memory of the process.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

import drawing
import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
from decoders import DECODERS, objection, why_not
from measure import add_busy, alternate, peak_of_device, ratio, shown, table, three_digits

from model import GPT, GPTConfig, generate

MODEL = {
    "cpu": dict(n_layer=4, d_model=256, n_head=8, n_kv_head=2, vocab_size=65),
    "cuda": dict(n_layer=12, d_model=768, n_head=12, n_kv_head=4, vocab_size=50304),
}
# (batch, window, positions)
QUICK = {
    "cpu": [(1, 128, (500, 4000)), (4, 128, (500,))],
    "cuda": [(1, 1024, (2000, 16000)), (16, 1024, (2000,))],
}
DEFAULT = {
    "cpu": [(1, 128, (500, 2000, 4000, 20000)), (8, 128, (500, 4000)), (1, 32, (4000,)), (1, 512, (4000,))],
    "cuda": [
        (1, 1024, (500, 2000, 8000, 20000)),
        (16, 1024, (2000, 8000)),
        (64, 1024, (2000,)),
        (1, 256, (8000,)),
        (1, 4096, (8000,)),
    ],
}
LONG_RUN = {"quick": (500, 2000), "default": (500, 20000)}
SECONDS = {"quick": 15.0, "default": 80.0}
# A turn begins with tokens that are not timed: after the turns of others, the CPU caches hold their weights
UNTIMED, TOKENS_A_TURN, MOST_ROUNDS = 8, 16, 20
ROOM = (UNTIMED + TOKENS_A_TURN) * (3 * MOST_ROUNDS + 2)  # quiet, and twice beside a neighbour
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def main(arguments=None):
    flags = harness.parser("decode_speed", __doc__)
    for name, meaning in {
        "positions": "context positions",
        "batch_sizes": "rows of a batch",
        "windows": "keys a query sees",
        "long_run": "two positions at which the memory is measured; 0 0: none",
    }.items():
        count = 2 if name == "long_run" else "+"
        flags.add_argument("--" + name.replace("_", "-"), type=int, nargs=count, metavar="N", help=meaning)
    for name in MODEL["cpu"]:
        flags.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help="of the model")
    harness.add_only(flags, DECODERS)
    harness.add_dtype(flags)
    return harness.run(flags, prepare, arguments)


def prepare(options, device):
    grid = (QUICK if options.quick else DEFAULT)[device.type]
    positions = options.positions or (grid[0][2] if options.batch_sizes or options.windows else None)
    if positions:
        grid = [
            (batch_size, window, tuple(positions))
            for batch_size in options.batch_sizes or [grid[0][0]]
            for window in options.windows or [grid[0][1]]
        ]
    long_run = options.long_run or LONG_RUN["quick" if options.quick else "default"]
    if min(min(b, w, *p) for b, w, p in grid) < 1 or min(long_run) < 0 or long_run[1] < long_run[0]:
        raise harness.BadInput("positions, batch sizes and windows must be at least 1; --long-run must not decrease")
    given = {name: getattr(options, name) for name in MODEL[device.type]}
    sizes = MODEL[device.type] | {name: size for name, size in given.items() if size is not None}
    dtype = harness.dtype_of(options, device)
    try:
        configs = {window: GPTConfig(**sizes, window=window, context_length=window) for _, window, _ in grid}
    except ValueError as error:
        raise harness.BadInput(str(error)) from None
    decoders = harness.chosen(options.only, DECODERS)
    points = {f"batch {point[0]}, window {point[1]}, position {', '.join(map(str, point[2]))}": point for point in grid}
    return partial(measure, harness.budget(options, points, SECONDS), configs, decoders, long_run, dtype, device)


def measure(budget, configs, decoders, long_run, dtype, device):
    grid, rows = list(budget.points.values()), []
    models = {window: GPT(config, seed=0).to(device, dtype).eval() for window, config in configs.items()}
    model, memory = models[grid[0][1]], None
    if long_run[1]:  # first, before the other contestants take memory
        harness.progress(f"generating {long_run[1]:,} tokens")
        memory = measure_memory(model, *long_run)
    for batch_size, window, positions in budget:
        rows += measure_point(models[window], decoders, batch_size, positions, dtype, budget.share())
    tables = [table_of(rows, device)] + ([memory_table(memory)] if memory else [])
    return {
        "settings": {
            "dtype": harness.name_of(dtype),
            "parameters": model.num_parameters(),
            "model": {name: getattr(model.config, name) for name in MODEL["cpu"]},
        },
        "rows": rows,
        "long_run": memory,
        "tables": tables,
        "plots": plots(rows, grid),
        "left_out": budget.left_out,
    }


def measure_point(model, decoders, batch_size, positions, dtype, seconds):
    """Check the decoders, then time them at all positions in turns: a row each."""
    config, device = model.config, model.wte.weight.device
    generator = torch.Generator(device).manual_seed(0)
    text = torch.randint(config.vocab_size, (batch_size, max(positions)), generator=generator, device=device)
    running, rows = {}, []
    for name, decoder in decoders.items():
        reason = why_not(name, config)
        if reason is None:
            try:
                reason = objection(decoder, model, batch_size, TOLERANCE[dtype])
            except Exception as failure:  # whatever a contestant raises: its line says it
                reason = harness.in_a_line(failure)
            reason = f"failed the check: {reason}" if reason else None
        for position in positions:
            rows.append({
                "contestant": name,
                "shape": f"batch {batch_size}, window {config.window}, position {position}",
                "batch": batch_size,
                "window": config.window,
                "position": position,
                "not_timed": reason,
            })  # fmt: skip
            if reason is None:
                running[name, position] = decoder(model, text[:, :position], ROOM)
                running[name, position].take(TOKENS_A_TURN)  # the first one reads the prompt
    turns = dict(most=MOST_ROUNDS, timer=one_turn, turn_seconds=0)
    times = alternate(running, device, seconds, **turns)
    add_figures(rows, times, model)
    add_busy(rows, running, device, lambda row: (row["contestant"], row["position"]), **turns)
    return sorted(rows, key=lambda row: row["position"])


def one_turn(decoder):
    """Seconds a token of a decoder that continues its text."""
    decoder.take(UNTIMED)
    return decoder.seconds_a_token(TOKENS_A_TURN)


def add_figures(rows, times, model):
    for row in rows:
        time = times.get((row["contestant"], row["position"]))
        if time is None:
            continue
        first = times[row["contestant"], min(r["position"] for r in rows)]
        row |= time.as_dict()
        row["tokens_per_second"] = row["batch"] / time.median
        row["bytes_per_second"] = bytes_a_step(model, row["batch"], row["position"]) / time.median
        row["growth"] = time.median / first.median
        if ("ours", row["position"]) in times:
            row["x_ours"] = time.median / times["ours", row["position"]].median


def bytes_a_step(model, batch_size, position):
    """Bytes of the weights, and of the keys and values in the window, each read once."""
    config, itemsize = model.config, model.wte.weight.dtype.itemsize
    weights = model.num_parameters() - (0 if config.tie_weights else model.wte.weight.numel())
    windows = (config.layer_window(layer) or position for layer in range(config.n_layer))
    keys = sum(min(position, window) for window in windows) * config.n_kv_head * config.head_dim
    return itemsize * (weights + 2 * batch_size * keys)


def measure_memory(model, first, last):
    """Generate one text up to `last` tokens; the memory of the process at `first` and at `last` tokens."""
    device, looks = model.wte.weight.device, []
    started = time.perf_counter()
    prompt = torch.zeros(1, 1, dtype=torch.long, device=device)
    for position, _ in enumerate(generate(model, prompt, last, temperature=0), 1):
        if position in (first, last):
            look = {"position": position, "rss_mb": resident_bytes() / 1e6}
            if device.type == "cuda":
                look["allocated_mb"] = torch.cuda.memory_allocated(device) / 1e6
            look["seconds"] = time.perf_counter() - started
            looks.append(look)
    return looks


def resident_bytes():
    """Memory of this process in RAM; its peak so far on systems without /proc."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table_of(rows, device):
    peak = peak_of_device(device)

    def bandwidth(row):
        reached = row["bytes_per_second"] / 1e9
        return three_digits(reached) + (f" ({reached / peak.gb_per_second:.0%})" if peak else "")

    columns = {
        "where": lambda row: row["shape"],
        "contestant": lambda row: row["contestant"],
        "ms": shown,
        "tokens/s": lambda row: three_digits(row["tokens_per_second"]),
        "x ours": ratio("x_ours"),
        "growth": ratio("growth"),
    }
    return table("Generation", rows, columns | ({"GB/s": bandwidth} if device.type == "cuda" else {}))


def memory_table(looks):
    columns = {"position": "position", "rss_mb": "resident MB", "allocated_mb": "GPU MB", "seconds": "seconds in all"}
    columns = {key: heading for key, heading in columns.items() if key in looks[0]}
    lines = [[str(look["position"]), *(f"{look[key]:.1f}" for key in list(columns)[1:])] for look in looks]
    title = "One text, generated by ours: memory of the process"
    return {"title": title, "columns": [*columns.values()], "rows": lines}


def plots(rows, grid):
    """Time against position, for the batch and window of the grid that have the most positions."""
    batch_size, window, _ = max(grid, key=lambda point: len(point[2]))
    of_point = [row for row in rows if (row["batch"], row["window"]) == (batch_size, window)]
    series = drawing.series(of_point, lambda row: row["position"], lambda row: row["median_ms"])
    title = f"Generation, batch {batch_size}, window {window}"
    return [{"title": title, "x": "position", "y": "ms a token", "series": series}]


if __name__ == "__main__":
    sys.exit(main())

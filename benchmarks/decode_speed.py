"""How fast does a sliding-window model write, and does it stay fast, however long the text gets?

    python benchmarks/decode_speed.py                     # three minutes on two CPU cores; --quick: under one
    python benchmarks/decode_speed.py --positions 500 20000 --batch-sizes 1 8 --windows 128 512

The same random weights are written with by our sampler, by recomputing the window for every token (the original
sampler), by an SDPA model whose cache grows, and by Hugging Face's generate. All choose the likeliest token; what they
choose is checked against the model without a cache first. They take turns, all positions of a row of the grid together.

    position   tokens before the first one that is timed
    ms         of a token (of a step, all rows of the batch): median of the turns (20th to 80th percentile)
    tokens/s   batch / that
    x ours     how many times as long as ours takes there
    growth     its time over its own at the first position
    GB/s       on a GPU: weights and the keys and values in the window, read once a step; of the card's peak

Then one text is written by ours from the first token to the last position, and the memory of the process is looked at.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
from decoders import DECODERS, objection, why_not
from measure import alternate, peak_of_device, shown, three_digits

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
# A turn begins with tokens that are not timed: the turns of the others have put their own weights into the caches.
UNTIMED, TOKENS_A_TURN, MOST_ROUNDS = 8, 16, 20
ROOM = (UNTIMED + TOKENS_A_TURN) * (MOST_ROUNDS + 2)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def main(arguments=None):
    flags = harness.parser("decode_speed", __doc__)
    for name, meaning in {
        "positions": "context positions",
        "batch_sizes": "rows that are written at once",
        "windows": "keys a query sees",
        "long_run": "two positions at which the memory is looked at; 0 0: not at all",
    }.items():
        count = 2 if name == "long_run" else "+"
        flags.add_argument("--" + name.replace("_", "-"), type=int, nargs=count, metavar="N", help=meaning)
    for name in MODEL["cpu"]:
        flags.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help="of the model")
    harness.add_only(flags, DECODERS)
    flags.add_argument("--dtype", choices=harness.DTYPES, help="fp32 on a CPU, bf16 on a GPU by default")
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
        raise harness.BadInput("positions, batch sizes and windows are wanted at least 1, and a long run forwards")
    sizes = {name: getattr(options, name) or size for name, size in MODEL[device.type].items()}
    dtype = harness.DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    try:
        configs = {window: GPTConfig(**sizes, window=window, context_length=window) for _, window, _ in grid}
    except ValueError as error:
        raise harness.BadInput(str(error)) from None
    seconds = options.seconds or SECONDS["quick" if options.quick else "default"]
    decoders = harness.chosen(options.only, DECODERS)
    points = {f"batch {point[0]}, window {point[1]}, position {', '.join(map(str, point[2]))}": point for point in grid}
    budget = harness.Budget(points, seconds, options.deadline)
    return partial(measure, budget, configs, decoders, long_run, dtype, device)


def measure(budget, configs, decoders, long_run, dtype, device):
    grid, rows = list(budget.points.values()), []
    models = {window: GPT(config, seed=0).to(device, dtype).eval() for window, config in configs.items()}
    memory = None
    if long_run[1]:  # first: the others have not taken memory yet
        harness.progress(f"writing {long_run[1]:,} tokens")
        memory = measure_memory(models[grid[0][1]], *long_run)
    for batch_size, window, positions in budget:
        rows += measure_point(models[window], decoders, batch_size, positions, dtype, budget.share())
    tables = [table(rows, device)]
    if memory is not None:
        tables.append(memory_table(memory))
    model = models[grid[0][1]]
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
        "failed": [
            f"ours at {row['shape']}: {row['not_timed']}"
            for row in rows
            if row["contestant"] == "ours" and row["not_timed"]
        ],
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
            except Exception as failure:  # a contestant may fail in any way of its own: its line says so
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
    times = alternate(
        running,
        device,
        seconds,
        most=MOST_ROUNDS,
        timer=one_turn,
        turn_seconds=0,
    )
    add_figures(rows, times, model)
    return sorted(rows, key=lambda row: row["position"])


def one_turn(decoder):
    """Seconds a token, of a decoder that goes on writing."""
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
    """Weights, and the keys and values that the window holds, each read once."""
    config, itemsize = model.config, model.wte.weight.dtype.itemsize
    weights = model.num_parameters() - (0 if config.tie_weights else model.wte.weight.numel())
    windows = (config.layer_window(layer) or position for layer in range(config.n_layer))
    keys = sum(min(position, window) for window in windows) * config.n_kv_head * config.head_dim
    return itemsize * (weights + 2 * batch_size * keys)


def measure_memory(model, first, last):
    """Write one text from its first token to `last`, and look at the process at `first` and at `last` tokens."""
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
    """Memory of this process that is in RAM; where the system does not say, the most that it ever was."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table(rows, device):
    cuda = device.type == "cuda"
    peak = peak_of_device(device)
    lines = []
    for row in rows:
        if "median_ms" not in row:
            continue
        bandwidth = row["bytes_per_second"] / 1e9
        of_peak = f" ({bandwidth / peak.gb_per_second:.0%})" if peak else ""
        lines.append([
            row["shape"],
            row["contestant"],
            shown(row),
            three_digits(row["tokens_per_second"]),
            f"{row['x_ours']:.2f}" if "x_ours" in row else "",
            f"{row['growth']:.2f}",
            *([three_digits(bandwidth) + of_peak] if cuda else []),
        ])  # fmt: skip
    columns = ["where", "contestant", "ms", "tokens/s", "x ours", "growth", *(["GB/s"] if cuda else [])]
    return {"title": "Writing", "columns": columns, "rows": lines, "notes": harness.not_timed(rows)}


def memory_table(looks):
    columns = [
        "position",
        "resident MB",
        *(["GPU MB"] if "allocated_mb" in looks[0] else []),
        "seconds since the start",
    ]
    lines = [
        [
            str(look["position"]),
            f"{look['rss_mb']:.1f}",
            *([f"{look['allocated_mb']:.1f}"] if "allocated_mb" in look else []),
            f"{look['seconds']:.1f}",
        ]
        for look in looks
    ]
    return {"title": "One text, written by ours: memory of the process", "columns": columns, "rows": lines}


def plots(rows, grid):
    """Time against position, for the batch and window of the grid that have the most positions."""
    batch_size, window, _ = max(grid, key=lambda point: len(point[2]))
    series = {}
    for row in rows:
        if (row["batch"], row["window"]) == (batch_size, window) and "median_ms" in row:
            series.setdefault(row["contestant"], []).append([row["position"], row["median_ms"]])
    title = f"Writing, batch {batch_size}, window {window}"
    return [{"title": title, "x": "position", "y": "milliseconds a token", "series": series}]


if __name__ == "__main__":
    sys.exit(main())

"""The tables and plots of kernel_report.py, made of its rows; what their columns mean is in its docstring."""

import published
from measure import three_digits
from published import BOTH as ATTENTION


def kernels(rows, target):
    def cells(row):
        if row["error"]:
            return [row["point"], row["kernel"], tile_text(row["tile"]), *["-"] * 7, row["error"]]
        return [
            row["point"], row["kernel"], tile_text(row["tile"]), str(row["registers"]), str(row["stack_bytes"]),
            str(row["spilled_bytes"]), f"{row['shared_bytes'] / 1024:.0f} of {row['shared_limit'] / 1024:.0f}",
            f"{row['blocks_per_multiprocessor']} ({row['limited_by']})", ", ".join(row["matrix"]) or "none",
            widths(row, "load", "copy"), widths(row, "store"),
        ]  # fmt: skip

    return {
        "title": f"{target}: what the compiler made of the kernels",
        "columns": ["compiled for", "kernel", "tile", "registers", "stack B", "spilled B", "shared kB", "blocks",
                    "matrix", "loads B", "stores B"],
        "rows": [cells(row) for row in rows if row["target"] == target],
        "notes": ["tile: rows or keys a program owns, width at the edge / in the interior, warps, stages",
                  "loads and stores: of tiles; one number a row (lse, delta, lengths) is narrower, and not shown"],
    }  # fmt: skip


def worst(rows):
    """Of each kernel the worst over all sets of features that it was compiled with."""
    groups = {}
    for row in rows:
        if not row["error"]:
            groups.setdefault((row["target"], row["head_dim"], row["dtype"], row["kernel"]), []).append(row)

    def most(group, key):
        return str(max(row[key] for row in group))

    return {
        "title": "The worst over all sets of features",
        "columns": ["compiled for", "kernel", "sets", "registers", "stack B", "spilled B", "shared kB", "blocks"],
        "rows": [
            [f"{target}, D {head_dim}, {dtype}", kernel, str(len(group)), most(group, "registers"),
             most(group, "stack_bytes"), most(group, "spilled_bytes"),
             f"{max(row['shared_bytes'] for row in group) / 1024:.0f} of {group[0]['shared_limit'] / 1024:.0f}",
             str(min(row["blocks_per_multiprocessor"] for row in group))]
            for (target, head_dim, dtype, kernel), group in groups.items()
        ],
        "notes": ["of rope for whole or half heads, sinks, softcap and a gradient of lse; blocks: the fewest"],
    }  # fmt: skip


def loops(rows, target):
    from kernels.compiled.machine_code import PIPES

    pipes = [pipe for pipe in PIPES if pipe != "global"] + ["global"]
    lines = [
        [row["point"], row["kernel"], "edge" if loop["masked"] else "interior", str(loop["instructions"]),
         *(str(loop["pipes"].get(pipe, 0)) for pipe in pipes)]
        for row in rows if row["target"] == target and not row["error"] for loop in row["loops"]
    ]  # fmt: skip
    return {
        "title": f"{target}: instructions a thread issues in one turn of the innermost loops, by pipe",
        "columns": ["compiled for", "kernel", "loop", "all", *pipes],
        "rows": lines,
    }


def lines(row):
    """What the instructions of the forward's interior serve, by the line of the source that they come from."""
    interior = [] if row["error"] else [loop for loop in row["loops"] if not loop["masked"]]
    return {
        "title": f"{row['point']}: what the forward's interior instructions are for",
        "columns": ["source", "instructions"],
        "rows": [[f"`{line}`", str(count)] for loop in interior for line, count in loop["lines"].items()],
    }


def estimates(estimates, label):
    return {
        "title": f"A model, not a measurement: {label}",
        "columns": ["compiled for", "kernel", "card", "efficiency", "memory ms", "overlapped ms", "serial ms",
                    "of peak, serial", "of peak, overlapped", "bound by"],
        "rows": [
            [row["point"], row["kernel"], row["card"], f"{row['efficiency']:.2f}",
             *(three_digits(row[key]) for key in ("memory_ms", "overlapped_ms", "serial_ms")),
             f"{row['of_peak_serial']:.0%}", f"{row['of_peak_overlapped']:.0%}", row["bound_by"]]
            for row in estimates if row["shape"] == label
        ],
        "notes": ["B, query heads / KV heads, T, head size, window; assumptions are in benchmarks/speed_of_light.py"],
    }  # fmt: skip


def bounds(estimates):
    return {
        "title": "A model: what bounds each kernel, and what would have to change",
        "columns": ["compiled for", "kernel", "shape", "bound by", "until", "bounds", "what it would take"],
        "rows": [
            [
                row["point"],
                row["kernel"],
                row["shape"],
                row["bound_by"],
                f"{1 - row['margin']:.0%} less of it",
                row["runner_up"],
                row["remedy"],
            ]
            for row in estimates
        ],
    }


def checks(checks):
    return {
        "title": "The model held against published figures of other kernels (causal, 16 heads of 128, T = 16,384)",
        "columns": ["card", "pass", "whose", "published TFLOP/s", "model serial", "off", "model overlapped", "off "],
        "rows": [
            [row["card"], row["pass"], row["whose"], f"{row['published_tflops']:.0f}", f"{row['serial_tflops']:.0f}",
             f"{row['serial_off']:+.0%}", f"{row['overlapped_tflops']:.0f}", f"{row['overlapped_off']:+.0%}"]
            for row in checks
        ],
        "notes": [f"{what}: published kernels reach {least:.0%} to {most:.0%} of the memory's bandwidth ({whose}), "
                  f"the model says 100%: {1 / most - 1:+.0%} to {1 / least - 1:+.0%} off"
                  for what, least, most, whose in published.BANDWIDTH],
    }  # fmt: skip


def prototypes(rows):
    return {
        "title": "The same model without shared memory, L2 and FMA: serial share of peak, ours and a prototype of ours "
                 f"(forward, {shape_label(published.PROTOTYPE_SHAPE).rsplit(',', 1)[0]})",
        "columns": ["card", "W", "prototype", "ours", "off"],
        "rows": [
            [row["card"], str(row["W"]), f"{row['prototype']:.0%}", f"{row['ours']:.0%}",
             f"{row['ours'] / row['prototype'] - 1:+.0%}"]
            for row in rows
        ],
    }  # fmt: skip


def plots(estimates):
    """Of the largest head size, and of A100 and H100 or the first two cards: more bars could not be read."""
    pipes = {}
    targets = list(dict.fromkeys(row["target"] for row in estimates))
    targets = [target for target in targets if target in ("sm_80", "sm_90")] or targets[:2]
    largest = max((row["head_dim"] for row in estimates), default=0)
    for row in estimates:
        if row["kernel"] in ATTENTION and row["target"] in targets and row["head_dim"] == largest:
            group = f"{row['kernel'].removeprefix('attention_')}, {row['target']}, D {row['head_dim']} ({row['shape']})"
            pipes[group] = {pipe: cycles / 1e3 for pipe, cycles in row["cycles"].items()}
    return [{"title": "A model: a program's time on each pipe", "x": "thousand cycles", "bars": pipes}]


def widths(row, *kinds):
    found = {access["bytes"] for access in row["accesses"] if access["kind"] in kinds and not access["of_rows"]}
    return "/".join(map(str, sorted(found))) or "-"


def tile_text(tile):
    owned = tile.get("BLOCK_N" if "EDGE_M" in tile else "BLOCK_M") or tile.get("BLOCK_T") or tile.get("BLOCK_S")
    steps = [tile[name] for name in ("EDGE_M", "EDGE_N") if name in tile]
    steps += [tile[name] for name in (("BLOCK_M",) if "EDGE_M" in tile else ("BLOCK_N",)) if name in tile]
    text = " x ".join([str(owned), "/".join(map(str, steps))] if steps else [str(owned)])
    return f"{text}, {tile.get('num_warps', 4)}w" + (f" {tile['num_stages']}s" if "num_stages" in tile else "")


def shape_label(shape):
    window = "no window" if shape.W is None else f"W {shape.W}"
    return f"{shape.B} x {shape.Hq}/{shape.Hkv}, T {shape.T}, D {shape.D}, {window}"

"""What does the compiler make of every kernel, on cards that are not here, and how fast could that be?

    python benchmarks/kernel_report.py                               # A100 and H100, bf16: 2 minutes on one core
    python benchmarks/kernel_report.py --arch sm_86,sm_120 --head-dim 128 --dtype fp16 --shape 1,32,8,32768,128,4096
    python benchmarks/kernel_report.py --details                     # also instructions by pipe, published figures
    python benchmarks/kernel_report.py --arch gfx942 --features plain --keep cubins
    python benchmarks/kernel_report.py --features every              # the worst of all sets; 15 minutes

It needs no GPU: Triton compiles for any architecture. The launchers choose the tiles as they would on the card. All
times are a MODEL, made of the instructions and the cards' data sheets (speed_of_light.py has each formula). Nothing was
run. The dq kernel also makes delta. Columns, a line for each kernel and each shape of the model:

    tile        rows or keys that a program owns, width at the edge / in the interior, warps, stages
    registers   of a thread
    spilled B   bytes of registers that the code stores into memory, and of its stack: should be 0
    shared kB   that a block takes
    blocks      that a multiprocessor holds at a time, and what allows no more
    matrix      the instruction that makes the products (HMMA, HGMMA, UTCHMMA, v_mfma)
    loads B     bytes a thread of the tiles' loads, / of their stores; 16 is the most there is
    loops       instructions that a thread issues in one step of the loop at the edge / in the interior
    efficiency  visible pairs over computed pairs
    ms          bounds of the model: all pipes at the same time - softmax and products one after the other
    of peak     share of the matrix unit's rate by useful FLOPs, for the same bounds; of the memory's bandwidth where
                memory bounds
    bound by    the busiest pipe, and how much shorter the time would be if the next one were
"""

import itertools
import os
import sys
from functools import partial
from pathlib import Path

import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import speed_of_light as model
from measure import three_digits
from published import ATTENTION, FORWARD, published_table
from speed_of_light import CARDS, Shape

from kernels import compiled
from kernels.compiled.machine_code import PIPES
from model.command import Parser

FEATURES = {
    "plain": {},
    "rope": {"rope": True},
    "half-rope": {"half_rope": True},
    "qk-norm": {"rope": True, "norm": True},
    "int8": {"int8": True},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 20.0},
    "grad-lse": {"grad_lse": True},
    "starts": {"starts": True},
    "two-sided": {"right": 256},
    "all": {"rope": True, "sinks": True, "softcap": 20.0, "grad_lse": True},
    "half-all": {"half_rope": True, "sinks": True, "softcap": 20.0, "grad_lse": True},
}
PARTS = (
    ("", "rope", "half-rope"),
    ("", "sinks"),
    ("", "softcap"),
    ("", "grad-lse"),
    ("", "starts", "starts+two-sided"),
)
EVERY = ["+".join(filter(None, chosen)) or "plain" for chosen in itertools.product(*PARTS)]
SHAPE = "4,32,8,8192,{},1024"  # for each head size


def main(arguments=None):
    flags = Parser(prog="python benchmarks/kernel_report.py", description=__doc__)
    flags.add_argument("--arch", metavar="LIST", default="sm_80,sm_90", help="architectures, by comma (sm_80,sm_90)")
    flags.add_argument("--head-dim", metavar="LIST", help="head sizes, by comma (those of the shapes, or 64,128)")
    flags.add_argument("--dtype", metavar="LIST", default="bf16", help="of bf16, fp16, fp32, by comma (bf16)")
    flags.add_argument(
        "--features",
        nargs="+",
        metavar="NAME",
        default=["rope"],
        help=f"of: {', '.join(FEATURES)}; + joins some into one set; or every: all {len(EVERY)} sets (rope)",
    )
    shapes = f"shapes for the model, W none for no window ({SHAPE.format('D')})"
    flags.add_argument("--shape", nargs="+", metavar="B,HQ,HKV,T,D,W", help=shapes)
    flags.add_argument("--details", action="store_true", help="more tables: pipes, source lines, published figures")
    flags.add_argument("--run", action="store_true", help="run the PTX on a CPU, and count what a profiler would")
    flags.add_argument("--keep", metavar="DIR", help="write the machine code of every kernel into this directory")
    flags.add_argument("--json", metavar="FILE", help="write the document to this file")
    flags.add_argument("--plot", metavar="FILE", default="none", help="a PNG of the time on each pipe (none)")
    flags.set_defaults(benchmark="kernel_report", device="cpu", seconds=None, deadline=None)
    return harness.run(flags, prepare, arguments)


def prepare(options, device):
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise harness.BadInput("TRITON_INTERPRET=1 is set, and interpreted kernels cannot be compiled: unset it")
    shapes = [parse(shape) for shape in options.shape or ()]
    targets = list(dict.fromkeys(options.arch.split(",")))
    try:
        for target in targets:
            compiled.card_of(target)
        dtypes = [harness.DTYPES[name] for name in options.dtype.split(",")]
        given = options.head_dim or ",".join(str(shape.D) for shape in shapes) or "64,128"
        head_dims = list(dict.fromkeys(int(word) for word in given.split(",")))
        names = EVERY if options.features == ["every"] else options.features
        features = {name: settings_of(name) for name in names}
    except KeyError as error:
        raise harness.BadInput(f"{error} is not known, wanted of: {', '.join([*FEATURES, *harness.DTYPES])}") from None
    except ValueError as error:
        raise harness.BadInput(str(error)) from None
    if bad := [D for D in head_dims if D < 2 or D > 256 or D % 2]:
        raise harness.BadInput(f"--head-dim has {bad[0]}, wanted even numbers up to 256")
    if lost := [shape for shape in shapes if shape.D not in head_dims]:
        raise harness.BadInput(f"--shape has a head size of {lost[0].D}, which --head-dim does not")
    if options.keep:
        Path(options.keep).mkdir(parents=True, exist_ok=True)
    if options.run:
        if amd := [target for target in targets if not target.startswith("sm_")]:
            raise harness.BadInput(f"--run runs PTX, which {amd[0]} does not have")
        windows = [min(shape.W or shape.T, 1024) for shape in shapes]
        sizes = [(shape.D, W, min(shape.T, 3 * W)) for shape, W in zip(shapes, windows, strict=True)]
        sizes = sizes or [(D, 256, 768) for D in head_dims]
        return partial(counted, list(itertools.product(targets, dtypes, sizes)))
    points = list(itertools.product(targets, dtypes, head_dims, features.items()))
    return partial(report, points, shapes or [parse(SHAPE.format(D)) for D in head_dims], options)


def report(points, shapes, options):
    rows, details, cycles = [], [], {}
    for i, (target, dtype, D, (name, settings)) in enumerate(points, 1):
        harness.progress(f"[{i}/{len(points)}] {target}, head size {D}, {harness.name_of(dtype)}, {name}")
        fitting = [shape for shape in shapes if shape.D == D]
        for group in dict.fromkeys(shape.Hq // shape.Hkv for shape in fitting) or (4,):
            of_group = [shape for shape in fitting if shape.Hq // shape.Hkv == group]
            for row, made in compile_point(target, D, dtype, name, settings, group, options.keep):
                rows.append(row)
                if made:
                    details.append((row, made))
                    found = {shape: estimate_of(made, shape, dtype.itemsize, name) for shape in of_group}
                    row["estimates"] = [estimate_row(made, *one, dtype.itemsize) for one in found.items() if one[1]]
                    if made.kernel in ATTENTION:
                        cycles |= {(row["kernel"], target, shape): one.cycles for shape, one in found.items() if one}
    if len({name for *_, (name, _) in points}) == len(EVERY):
        tables = [worst(rows)]
    else:
        tables = [table_of(rows, target) for target in dict.fromkeys(row["target"] for row in rows)]
    if options.details:
        tables += [pipes_table(details), *lines_tables(details), published_table(dict.fromkeys(p[0] for p in points))]
    return {
        "modelled": True,
        "settings": {"shapes": "; ".join(map(shape_label, shapes))},
        "rows": rows,
        "tables": tables,
        "plots": [] if options.plot == "none" else [pipes_plot(cycles)],
        "failed": [f"{row['point']}, {row['kernel']}: {row['error']}" for row in rows if row["error"]],
    }


def counted(points):
    """What executes in attention of four heads on one: numbers from running the PTX, not from the model."""
    from kernels.compiled.counts import PRODUCTS, count

    rows = []
    for target, dtype, (D, W, T) in points:
        harness.progress(f"{target}, head size {D}, {harness.name_of(dtype)}, window {W}: running")
        kernels, visible = count(target, head_dim=D, dtype=dtype, window=W, length=T)
        for name, counts in kernels.items():
            wavefronts, useful = counts.wavefronts.total(), PRODUCTS.get(name, 0) * visible * D
            most = itertools.islice(counts.kinds().items(), 3)
            moved = (counts.bytes_read + counts.bytes_written).total()
            rows.append({
                "kernel": name, "target": target, "D": D, "dtype": harness.name_of(dtype), "W": W, "T": T,
                "instructions a score": round(counts.instructions / visible, 1),
                "most are": ", ".join(f"{kind} {n / counts.instructions:.0%}" for kind, n in most),
                "shared wavefronts": wavefronts, "conflicts": f"{counts.conflicts.total() / max(1, wavefronts):.1%}",
                "sectors": counts.sectors, "at least": counts.least_sectors, "bytes": moved,
                "products useful": f"{useful / counts.multiplications:.1%}" if useful else "",
            })  # fmt: skip
    columns = list(rows[0])
    lines = [[str(row[column]) for column in columns] for row in rows]
    table = {"title": "Counted while the PTX runs", "columns": columns, "rows": lines, "notes": []}
    return {"settings": {"group": 4}, "rows": rows, "tables": [table], "plots": [], "failed": []}


def compile_point(target, D, dtype, name, settings, group, keep):
    """(row, Compiled or None) of every kernel at one point; a kernel that does not compile has a row with its error."""
    point = f"{target}, D {D}, {harness.name_of(dtype)}, {name}" + (f", G {group}" if group != 4 else "")
    for launch in compiled.launches(target, head_dim=D, dtype=dtype, group=group, **settings):
        row = {"point": point, "target": target, "head_dim": D, "dtype": harness.name_of(dtype), "features": name}
        row |= {"kernel": launch.name, "tile": launch.tile, "error": None, "estimates": []}
        try:
            made = compiled.compile_launch(launch, target)
        except Exception as failure:  # Triton, LLVM and the assembler raise whatever they like
            yield {**row, "error": harness.in_a_line(failure)}, None
            continue
        if keep:
            suffix = "cubin" if target.startswith("sm_") else "hsaco"
            path = Path(keep) / f"{target}-{launch.name}-{D}-{row['dtype']}-{name}-g{group}.{suffix}"
            path.write_bytes(made.binary)
        kept = ("registers", "stack_bytes", "spilled_bytes", "shared_bytes", "blocks_per_multiprocessor", "limited_by")
        row |= {key: getattr(made, key) for key in (*kept, "matrix")}
        row |= {"loads": widths(made, "load", "copy"), "stores": widths(made, "store")}
        row["loops"] = [{"masked": loop.masked, "instructions": loop.instructions} for loop in made.loops]
        yield row, made


def widths(made, *kinds):
    """Bytes a thread of the accesses to tiles; one number a row (lse, delta, lengths) is narrower by nature."""
    return sorted({access.bytes for access in made.accesses if access.kind in kinds and not access.of_rows})


def estimate_of(made, shape, element_bytes, features):
    """The model's `Estimate` of a kernel at a shape; None for append and combine, which move few bytes."""
    if made.kernel in ATTENTION:
        return model.attention_estimate(made, shape, element_bytes, rope="rope" in str(settings_of(features)))
    rotations = dict.fromkeys(model.TENSORS_ROTATED, model.rope_estimate)
    of_rings = partial(model.decode_estimate, int8="int8" in settings_of(features))
    by_memory = {**rotations, "decode": of_rings}.get(made.kernel)
    return by_memory and by_memory(made, shape, element_bytes)


def estimate_row(made, shape, estimate, element_bytes):
    card = CARDS[made.target]
    if estimate.useful_flops:
        at_peak = estimate.useful_flops / (card.flops / model.products_of(made.target)[element_bytes]) * 1e3
    else:
        at_peak = estimate.memory_ms
    kept = ("efficiency", "memory_ms", "overlapped_ms", "serial_ms", "bound_by", "runner_up", "margin")
    return {
        "shape": shape_label(shape),
        **{key: getattr(estimate, key) for key in kept},
        "of_peak_overlapped": at_peak / estimate.overlapped_ms,
        "of_peak_serial": at_peak / estimate.serial_ms,
    }


def table_of(rows, target):
    """The table of one card."""
    rows = [row for row in rows if row["target"] == target]
    several = len({row["dtype"] for row in rows}) > 1 or len({row["features"] for row in rows}) > 1
    columns = ["registers", "spilled B", "shared kB", "blocks", "matrix", "loads B", "loops", "efficiency", "ms"]
    lines = []
    for row in rows:
        start = [row["point"] if several else f"D {row['head_dim']}", row["kernel"], tile_text(row["tile"])]
        if row["error"]:
            lines.append([*start, *["-"] * (len(columns) + 1), row["error"]])
            continue
        facts = [
            str(row["registers"]),
            str(row["spilled_bytes"] + row["stack_bytes"]),
            f"{row['shared_bytes'] / 1024:.0f}",
            f"{row['blocks_per_multiprocessor']} ({row['limited_by']})",
            ", ".join(row["matrix"]) or "none",
            " / ".join("+".join(map(str, row[key])) or "-" for key in ("loads", "stores")),
            " / ".join(str(loop["instructions"]) for loop in row["loops"]) or "-",
        ]
        lines += [[*start, *facts, *estimate_cells(estimate)] for estimate in row["estimates"] or [None]]
    card = compiled.CARDS[target]
    labels = "; ".join(dict.fromkeys(estimate["shape"] for row in rows for estimate in row["estimates"]))
    return {
        "title": f"{target} ({card.name}, {card.shared_per_block >> 10} kB of shared memory a block)",
        "columns": ["compiled for" if several else "heads", "kernel", "tile", *columns, "of peak", "bound by"],
        "rows": lines,
        "notes": [f"{rows[0]['dtype']}, features: {rows[0]['features']}"] * (not several)
        + [f"rings: bytes a token and KV head: {'; '.join(dict.fromkeys(map(ring_text, rows)))}"]
        + [f"efficiency, ms, of peak, bound by: a model, not a measurement, at {labels}"] * bool(labels),
    }


def ring_text(row):
    """Bytes of a token in the cache, such as "D 64, bf16 256"."""
    int8, dtype = "int8" in settings_of(row["features"]), harness.DTYPES[row["dtype"]]
    kind = "int8" if int8 else row["dtype"]
    return f"D {row['head_dim']}, {kind} {model.ring_bytes(row['head_dim'], dtype.itemsize, int8)}"


def estimate_cells(estimate):
    if estimate is None:
        return ["-"] * 4
    shares = [f"{estimate[f'of_peak_{bound}']:.0%}" for bound in ("overlapped", "serial")]
    return [
        f"{estimate['efficiency']:.2f}",
        f"{three_digits(estimate['overlapped_ms'])} - {three_digits(estimate['serial_ms'])}",
        " - ".join(shares),
        f"{estimate['bound_by']} ({1 - estimate['margin']:.0%}: {estimate['runner_up']})",
    ]


def worst(rows):
    """The table of the worst of each kernel over all sets of features that it was compiled with."""
    groups = {}
    for row in rows:
        if not row["error"]:
            groups.setdefault((row["target"], row["head_dim"], row["dtype"], row["kernel"]), []).append(row)
    keys = ("registers", "stack_bytes", "spilled_bytes")
    return {
        "title": "The worst over all sets of features",
        "columns": ["compiled for", "kernel", "sets", "registers", "stack B", "spilled B", "shared kB", "blocks"],
        "rows": [
            [f"{target}, D {head_dim}, {dtype}", kernel, str(len(group))]
            + [str(max(row[key] for row in group)) for key in keys]
            + [f"{max(row['shared_bytes'] for row in group) / 1024:.0f}"]
            + [str(min(row["blocks_per_multiprocessor"] for row in group))]
            for (target, head_dim, dtype, kernel), group in groups.items()
        ],
        "notes": [
            "rope for whole or half heads, sinks, softcap, a gradient of lse, documents, later keys; the fewest blocks"
        ],
    }


def pipes_table(details):
    pipes = [pipe for pipe in PIPES if pipe != "global"] + ["global"]
    return {
        "title": "Instructions that a thread issues in one step of the innermost loops, by pipe",
        "columns": ["compiled for", "kernel", "loop", "all", *pipes],
        "rows": [
            [row["point"], row["kernel"], "edge" if loop.masked else "interior", str(loop.instructions)]
            + [str(loop.pipes.get(pipe, 0)) for pipe in pipes]
            for row, made in details
            for loop in made.loops
        ],
        "notes": [f"{pipe}: {remedy}" for pipe, remedy in model.REMEDIES.items()],
    }


def lines_tables(details):
    """Which source lines the instructions of the forward's interior belong to, at the largest head size."""
    largest = max((row["head_dim"] for row, _ in details), default=0)
    for row, made in details:
        if row["kernel"] in FORWARD and row["head_dim"] == largest:
            counts = next((loop.lines for loop in made.loops if not loop.masked), {})
            yield {
                "title": f"{row['point']}: instructions of the forward's interior by source line",
                "columns": ["source", "instructions"],
                "rows": [[f"`{line}`", str(count)] for line, count in counts.items()],
            }


def pipes_plot(cycles):
    """Of the largest head size, and of A100 and H100 or the first two cards: more bars would be unreadable."""
    targets = list(dict.fromkeys(target for _, target, _ in cycles))
    targets = [target for target in targets if target in ("sm_80", "sm_90")] or targets[:2]
    largest = max((shape.D for *_, shape in cycles), default=0)
    bars = {
        f"{kernel.removeprefix('attention_')}, {target} ({shape_label(shape)})": {
            pipe: count / 1e3 for pipe, count in of_pipes.items()
        }
        for (kernel, target, shape), of_pipes in cycles.items()
        if target in targets and shape.D == largest
    }
    return {"title": "A model: a program's time on each pipe", "x": "thousand cycles", "bars": bars}


def tile_text(tile):
    own, edge, step = ("BLOCK_N", "EDGE_M", "BLOCK_M") if "EDGE_M" in tile else ("BLOCK_M", "EDGE_N", "BLOCK_N")
    own = next(tile[name] for name in (own, "BLOCK_T", "BLOCK_S") if name in tile)
    steps = [tile[name] for name in (edge, step) if name in tile]
    text = " x ".join([str(own), "/".join(map(str, steps))] if steps else [str(own)])
    return f"{text}, {tile.get('num_warps', 4)}w" + (f" {tile['num_stages']}s" if "num_stages" in tile else "")


def shape_label(shape):
    window = "no window" if shape.W is None else f"W {shape.W}"
    return f"{shape.B} x {shape.Hq}/{shape.Hkv}, T {shape.T}, D {shape.D}, {window}"


def settings_of(name):
    """The arguments of `compiled.launches` for features by name, several joined by +. Raises KeyError."""
    return {key: value for part in name.split("+") for key, value in FEATURES[part].items()}


def parse(text):
    """A `Shape` from B,Hq,Hkv,T,D,W. Raises BadInput."""
    words = text.split(",")
    try:
        numbers = [None if word == "none" and i == 5 else int(word) for i, word in enumerate(words)]
        shape = Shape(*numbers)
        good = all(number is None or number > 0 for number in numbers) and shape.Hq % shape.Hkv == 0
    except (ValueError, TypeError, ZeroDivisionError):
        good = False
    if not good:
        wanted = "B,HQ,HKV,T,D,W with HQ a multiple of HKV, such as 4,32,8,8192,128,1024 (W none: no window)"
        raise harness.BadInput(f"--shape has {text!r}, wanted {wanted}")
    return shape


if __name__ == "__main__":
    sys.exit(main())

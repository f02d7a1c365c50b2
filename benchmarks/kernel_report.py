"""What does the compiler make of every kernel, on cards that are not here, and how fast could that be?

    python benchmarks/kernel_report.py                               # A100 and H100, bf16: 2 minutes on one core
    python benchmarks/kernel_report.py --arch sm_86,sm_120 --head-dim 128 --dtype fp16 --shape 1,32,8,32768,128,4096
    python benchmarks/kernel_report.py --arch gfx942 --features plain --keep cubins
    python benchmarks/kernel_report.py --features every      # the worst of all their sets; 15 minutes

No GPU is needed: Triton compiles for any architecture. The real launchers choose the tiles, for the shapes given.
Everything about time is a MODEL, made of those instructions and the cards' data sheets (speed_of_light.py has each
formula); nothing was run. delta has no kernel of its own: the dq kernel makes it.

    registers   a thread's; stack and spilled bytes should be 0
    shared      kB that a block takes, of what the card gives one
    blocks      that a multiprocessor holds at a time, and what allows no more
    matrix      the instruction that makes the products (HMMA, HGMMA, UTCHMMA, v_mfma)
    loads       bytes a thread of the tiles' loads, and stores; 16 is the most there is
    edge, interior   the loops over tiles that need a mask and that do not; instructions a thread issues in one turn
    efficiency  pairs that are seen over pairs that are computed
    serial, overlapped   the model's bounds: softmax and products in turns, or all beside each other
    of peak     share of the matrix unit's rate by useful FLOPs, of the memory's bandwidth where memory bounds
"""

import itertools
import os
import sys
from functools import partial
from pathlib import Path

import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import kernel_tables
import published
import speed_of_light as model
import torch
from speed_of_light import CARDS, Shape

from model.command import Parser

FEATURES = {
    "plain": {},
    "rope": {"rope": True},
    "half-rope": {"half_rope": True},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 20.0},
    "grad-lse": {"grad_lse": True},
    "all": {"rope": True, "sinks": True, "softcap": 20.0, "grad_lse": True},
    "half-all": {"half_rope": True, "sinks": True, "softcap": 20.0, "grad_lse": True},
}
PARTS = (("", "rope", "half-rope"), ("", "sinks"), ("", "softcap"), ("", "grad-lse"))
EVERY = ["+".join(filter(None, chosen)) or "plain" for chosen in itertools.product(*PARTS)]
SHAPE = "4,32,8,8192,{},1024"  # for each head size
ATTENTION = published.BOTH


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
        help=f"of: {', '.join(FEATURES)}, with + between those at once; or every: all {len(EVERY)} sets (rope)",
    )
    flags.add_argument(
        "--shape", nargs="+", metavar="B,HQ,HKV,T,D,W",
        help=f"what the model is asked, W none for no window ({SHAPE.format('D')})",
    )  # fmt: skip
    flags.add_argument("--keep", metavar="DIR", help="write the machine code of every kernel into this directory")
    flags.add_argument("--json", metavar="FILE", help="write the document to this file as well")
    flags.add_argument("--plot", metavar="FILE", default="none", help="a PNG (none)")
    flags.set_defaults(benchmark="kernel_report", device="cpu", seconds=None, deadline=None)
    return harness.run(flags, prepare, arguments)


def prepare(options, device):
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise harness.BadInput("TRITON_INTERPRET=1 is set, and what is interpreted cannot be compiled: unset it")
    try:
        from kernels import compiled as offline
    except ImportError as error:
        raise harness.BadInput(f"triton cannot be imported ({error}): pip install 'triton>=3.6'") from None
    shapes = [parse(shape) for shape in options.shape or ()]
    try:
        for target in options.arch.split(","):
            offline.card_of(target)
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
    shapes = shapes or [parse(SHAPE.format(D)) for D in head_dims]
    points = [
        (target, D, dtype, name, settings)
        for target in dict.fromkeys(options.arch.split(","))
        for dtype in dtypes
        for D in head_dims
        for name, settings in features.items()
    ]
    return partial(report, points, shapes, options.keep)


def report(points, shapes, keep):
    rows, estimates = [], []
    for i, (target, D, dtype, name, settings) in enumerate(points, 1):
        harness.progress(f"[{i}/{len(points)}] {target}, head size {D}, {harness.name_of(dtype)}, {name}")
        fitting = [shape for shape in shapes if shape.D == D]
        for group in dict.fromkeys(shape.Hq // shape.Hkv for shape in fitting) or (4,):
            of_group = [shape for shape in fitting if shape.Hq // shape.Hkv == group]
            for row, made in compiled(target, D, dtype, name, settings, group, keep):
                rows.append(row)
                if made and target in CARDS:
                    estimates += [estimate_row(row, made, shape, dtype) for shape in of_group]
    estimates = [row for row in estimates if row]
    checks, prototypes = check_published({target for target, D, *_ in points if D == published.SHAPE.D})
    return {
        "modelled": True,
        "settings": {"shapes": "; ".join(map(kernel_tables.shape_label, shapes))},
        "rows": rows,
        "estimates": estimates,
        "published": checks,
        "prototypes": prototypes,
        "tables": tables_of(rows, estimates, checks, prototypes),
        "plots": kernel_tables.plots(estimates),
        "failed": [f"{row['point']}, {row['kernel']}: {row['error']}" for row in rows if row["error"]],
    }


def tables_of(rows, estimates, checks, prototypes):
    """All tables for people; of every set of features the worst alone, which is what is asked then."""
    if len({row["features"] for row in rows}) == len(EVERY):
        return [kernel_tables.worst(rows)]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    return [
        *(kernel_tables.kernels(rows, target) for target in targets),
        *(kernel_tables.loops(rows, target) for target in targets),
        *(kernel_tables.lines(row) for row in rows if row["kernel"] == "attention_forward" and row["head_dim"] == 128),
        *(kernel_tables.estimates(estimates, label) for label in dict.fromkeys(row["shape"] for row in estimates)),
        kernel_tables.bounds(estimates),
        kernel_tables.checks(checks),
        kernel_tables.prototypes(prototypes),
    ]


def compiled(target, D, dtype, name, settings, group, keep):
    """(row, Compiled or None) of every kernel at one point; a kernel that does not compile is a row with its error."""
    from kernels import compiled as offline

    head = {
        "point": f"{target}, D {D}, {harness.name_of(dtype)}, {name}" + (f", G {group}" if group != 4 else ""),
        "target": target, "head_dim": D, "dtype": harness.name_of(dtype), "features": name, "group": group,
    }  # fmt: skip
    for launch in offline.launches(target, head_dim=D, dtype=dtype, group=group, **settings):
        row = {**head, "kernel": launch.name, "tile": launch.tile, "error": None}
        try:
            made = offline.compile_launch(launch, target)
        except Exception as failure:  # Triton, LLVM and the assembler each fail in ways of their own
            yield {**row, "error": harness.in_a_line(failure)}, None
            continue
        facts = made._asdict()
        if keep:
            suffix = "cubin" if target.startswith("sm_") else "hsaco"
            path = Path(keep) / f"{target}-{launch.name}-{D}-{head['dtype']}-{name}-g{group}.{suffix}"
            path.write_bytes(made.binary)
        row |= {key: facts[key] for key in facts if key not in ("kernel", "target", "tile", "binary")}
        row["shared_limit"] = offline.CARDS[target].shared_per_block
        row["accesses"] = [access._asdict() for access in made.accesses]
        row["loops"] = [loop._asdict() for loop in made.loops]
        if launch.name != "attention_forward":  # the others' lines would make most of the document
            for loop in row["loops"]:
                del loop["lines"]
        row["narrow_tile_loads"] = [access._asdict() for access in made.narrow_tile_loads]
        yield row, made


def estimate_row(row, made, shape, dtype):
    """The model's figures for one kernel at one shape; None for kernels it says nothing of."""
    card = CARDS[made.target]
    if made.kernel in ATTENTION:
        estimate = model.attention_estimate(
            made, shape, dtype.itemsize, rope="rope" in str(settings_of(row["features"]))
        )
    elif made.kernel == "rope":
        estimate = model.rope_estimate(made, shape, dtype.itemsize)
    elif made.kernel == "decode":
        estimate = model.decode_estimate(made, shape, dtype.itemsize)
    else:  # append and combine move next to nothing
        return None
    if estimate is None:
        return None
    of_peak = [
        estimate.useful_flops / (ms * 1e-3) / (card.flops / model.products_of(made.target)[dtype.itemsize])
        if estimate.useful_flops else estimate.bytes / (ms * 1e-3) / card.bytes_per_second
        for ms in (estimate.serial_ms, estimate.overlapped_ms)
    ]  # fmt: skip
    named = {key: row[key] for key in ("point", "target", "head_dim", "dtype", "features", "kernel")}
    return {
        **named, "shape": kernel_tables.shape_label(shape), "card": card.name, **estimate._asdict(),
        "of_peak_serial": of_peak[0], "of_peak_overlapped": of_peak[1], "remedy": model.REMEDIES[estimate.bound_by],
    }  # fmt: skip


def check_published(targets):
    """Our kernels in the model at the shapes of published figures, beside those: (rows, rows of the prototype)."""
    found, prototypes = {}, []
    for target in sorted(targets & published.PROTOTYPE.keys()):
        harness.progress(f"{target}: the shapes of the published figures")
        made = by_kernel(target, group=1)
        for kernel in ATTENTION:
            found[target, kernel] = model.attention_estimate(made[kernel], published.SHAPE, 2, rope=False)
        forward = by_kernel(target, group=4)["attention_forward"]
        for W, share in published.PROTOTYPE[target].items():
            shape = published.PROTOTYPE_SHAPE._replace(W=W)
            estimate = model.attention_estimate(forward, shape, 2, rope=False, without=published.LEFT_OUT)
            ours = estimate.useful_flops / estimate.serial_ms * 1e3 / CARDS[target].flops
            prototypes.append({"card": CARDS[target].name, "W": W, "prototype": share, "ours": ours})
    return published.compare(found), prototypes


def by_kernel(target, group):
    """{kernel: Compiled} of the attention kernels in bf16 at the head size of the published figures."""
    from kernels import compiled as offline

    launches = offline.launches(target, head_dim=published.SHAPE.D, dtype=torch.bfloat16, group=group)
    return {one.name: offline.compile_launch(one, target) for one in launches if one.name in ATTENTION}


def settings_of(name):
    """The arguments of `offline.launches` for features by name, several joined by +. Raises KeyError."""
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
        raise harness.BadInput(f"--shape has {text!r}, wanted B,HQ,HKV,T,D,W with HQ a multiple of HKV, such as "
                               "4,32,8,8192,128,1024 (W none: no window)")  # fmt: skip
    return shape


if __name__ == "__main__":
    sys.exit(main())

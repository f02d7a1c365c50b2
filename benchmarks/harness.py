"""What every benchmark shares: the import path, the command line, the header, and what is printed and written.

A benchmark makes the parts of a document, which is plain JSON:

    rows     every figure that was measured, as dicts
    tables   [{"title", "columns", "rows": [[text]], "notes": [text]}], made of the rows; docs/benchmarks.md shows them
    plots    side by side in one PNG: [{"title", "x", "y", "series": {name: [[x, y], ...]}}] are lines, on log axes,
             [{"title", "x", "bars": {group: {name: x}}}] are bars
    left_out [text], points of the grid that were not measured, and why
    failed   [text], what must not happen, such as a result of ours that the reference denies: exit status 1

The document is the last line on stdout. What goes on meanwhile is on stderr.
"""

import importlib.util
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from datetime import date
from importlib import metadata
from pathlib import Path

# `python benchmarks/attn_speed.py` puts benchmarks/ first on the path, and not the root of the repository. Hugging Face
# publishes another package of the name `kernels`: without this line, an installed one would be found before ours.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # below, the profiler that counts memory announces itself

import torch  # noqa: E402

from model.command import Parser, resolve_device  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name_of(dtype):
    """A dtype as the flag has it: torch.float32 is "fp32"."""
    return next(name for name, known in DTYPES.items() if known == dtype)


class BadInput(ValueError):
    """What the command line asks for cannot be had: one line on stderr, exit status 2."""


def parser(name, description):
    """A parser with the flags that all benchmarks have. `name` is that of the script."""
    flags = Parser(prog=f"python benchmarks/{name}.py", description=description)
    flags.add_argument("--quick", action="store_true", help="a small grid: under 2 minutes on two CPU cores")
    flags.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (auto: a CUDA device if there is one)")
    flags.add_argument("--seconds", type=float, help="time to measure in, for all points; no call runs under 3 times")
    flags.add_argument("--deadline", type=float, metavar="S", help="begin no point of the grid after so many seconds")
    flags.add_argument("--json", metavar="FILE", help="write the document to this file as well")
    flags.add_argument("--plot", metavar="FILE", default=f"runs/benchmarks/{name}.png", help="a PNG, or none")
    flags.set_defaults(benchmark=name)
    return flags


def add_only(flags, contestants):
    """The flag that chooses among the contestants {name: ...}; `chosen` reads it."""
    flags.add_argument("--only", nargs="+", metavar="NAME", help=f"some of: {', '.join(contestants)} (all by default)")


def chosen(names, contestants):
    """The contestants of these names, in their own order; all for None. Raises BadInput."""
    if unknown := [name for name in names or () if name not in contestants]:
        raise BadInput(f"--only names {unknown[0]!r}, wanted some of: {', '.join(contestants)}")
    return {name: value for name, value in contestants.items() if not names or name in names}


def run(flags, prepare, arguments=None):
    """The whole command; returns its exit status.

    prepare(options, device) raises BadInput, or returns the function that measures and returns the document's parts.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = flags.parse_args(arguments)
    plot = None if options.plot == "none" else options.plot
    try:
        for flag in ("seconds", "deadline"):
            value = getattr(options, flag)
            if value is not None and not 0 < value < math.inf:
                raise BadInput(f"--{flag} is {value:g}, wanted a number above 0")
        for file in filter(None, (options.json, plot)):
            _check_writable(Path(file))  # before minutes of measuring
        device = _device(options.device)
        document = {
            "benchmark": options.benchmark,
            "command": shlex.join(["python", f"benchmarks/{options.benchmark}.py", *arguments]),
            "machine": machine(device),
        }
        measure = prepare(options, device)
    except (BadInput, OSError) as error:
        flags.error(str(error).splitlines()[0])
    print_header(document)
    started = time.perf_counter()
    document |= measure()
    document["seconds"] = round(time.perf_counter() - started, 1)
    document = without_nan(document)
    for table in document["tables"]:
        print("\n" + as_text(table))
    for line in document.get("left_out", ()):
        print(f"\nleft out: {line}")
    for line in document.get("failed", ()):
        print(f"\nFAILED: {line}")
    if plot:
        print(f"\n{draw(document['plots'], plot)}")
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print("\n" + json.dumps(document, allow_nan=False))
    return 1 if document.get("failed") else 0


def without_nan(value):
    """A document with None in the place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def progress(text):
    """A line about what goes on now, on stderr."""
    print(text, file=sys.stderr, flush=True)


class Budget:
    """The points {label: point} of a grid, one after the other, each with its part of the measuring time.

    No point is begun `deadline` seconds after the start: `left_out` has the labels of those that were not.
    """

    def __init__(self, points, seconds, deadline=None):
        self.points, self.seconds, self.deadline = points, seconds, deadline
        self.left_out = []

    def __iter__(self):
        started = time.perf_counter()
        self._end, self._to_come = started + self.seconds, len(self.points)
        for i, (label, point) in enumerate(self.points.items(), 1):
            if i > 1 and self.deadline is not None and time.perf_counter() - started > self.deadline:
                self.left_out.append(f"{label} (no time was left)")
            else:
                progress(f"[{i}/{len(self.points)}] {label}")
                yield point
            self._to_come -= 1

    def share(self):
        """Seconds for the point of now: an equal part, with those to come, of what is left."""
        return max(0.0, self._end - time.perf_counter()) / self._to_come


def in_a_line(failure):
    """An exception in a few words."""
    return f"{type(failure).__name__}: {(str(failure).strip() or '?').splitlines()[0]:.120}"


def machine(device):
    """What a figure depends on, beside the code: device, threads, versions, commit."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    facts = {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # processes that wanted a core in the last minute: others' noise
        "memory_gb": round(
            (torch.cuda.get_device_properties(device).total_memory if cuda else _physical_memory()) / 1e9, 1
        ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "date": date.today().isoformat(),
    }
    if cuda:
        facts["cuda"] = torch.version.cuda or f"hip {torch.version.hip}"
        facts["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return facts


def print_header(document):
    facts = document["machine"]
    kind = "a GPU" if facts["device"] == "cuda" else "a CPU: no figure below is a GPU's"
    print(f"{document['command']}\non {facts['name']} ({kind})")
    print(", ".join(f"{key} {value}" for key, value in facts.items() if key not in ("device", "name")), flush=True)
    if facts["device"] == "cpu" and facts["load"] > facts["cores"] / 2:
        progress(f"other programs are busy (load {facts['load']} on {facts['cores']} cores): expect noise")


def version(package):
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit():
    """The commit that is checked out, with a + if files differ from it; "unknown" outside a repository."""
    try:
        git = ["git", "-C", str(ROOT)]
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def numeric_columns(table):
    """Whether each column holds numbers only, apart from gaps; the first one is a name in any case."""
    columns = range(1, len(table["columns"]))
    return [False] + [all(row[i][:1].isdigit() or row[i] in ("", "-") for row in table["rows"]) for i in columns]


def as_text(table):
    """A table for the terminal: the first column to the left, numbers to the right."""
    lines = [table["columns"], *table["rows"]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table["columns"]))]
    numeric = numeric_columns(table)
    text = [table["title"]]
    for line in lines:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join([*text, *table.get("notes", ())])


def why_not_compile(device):
    """Why torch.compile makes nothing for this device, in a few words; None if it can."""
    if torch.device(device).type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        return "torch.compile needs a C++ compiler"
    return None


def not_installed(module):
    """ "x is not installed" for a module that is not; None for one that is."""
    return None if importlib.util.find_spec(module) else f"{module.replace('_', '-')} is not installed"


def not_timed(rows):
    """Lines for the rows that have a reason in `not_timed`; those of one reason together."""
    reasons, points = {}, {row["shape"] for row in rows}
    for row in rows:
        if row["not_timed"]:
            reasons.setdefault(f"{row['contestant']} was not timed: {row['not_timed']}", []).append(row["shape"])
    return [
        reason + ("" if len(shapes) == len(points) else f" [{'; '.join(shapes)}]") for reason, shapes in reasons.items()
    ]


def draw(plots, path):
    """Draw the plots into one PNG; returns a line that says where, or why not."""
    try:
        from matplotlib.figure import Figure  # no pyplot: it would look for a display
    except ImportError:
        return "no plot: matplotlib is not installed"
    plots = [plot for plot in plots if plot.get("bars") or any(plot.get("series", {}).values())]
    if not plots:
        return "no plot: nothing was measured"
    figure = Figure(figsize=(6.4 * len(plots), 4.8), layout="constrained")
    for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
        axes.set(title=plot["title"], xlabel=plot["x"])
        (_draw_bars if "bars" in plot else _draw_lines)(axes, plot)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)
    return f"plot: {path}"


def _draw_lines(axes, plot):
    for name, points in plot["series"].items():
        if points:
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, marker="o", markersize=4, linewidth=2.5 if name.startswith("ours") else 1.3, label=name)
    ticks = sorted({x for points in plot["series"].values() for x, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yscale("log")
    axes.set_ylabel(plot["y"])
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small")


def _draw_bars(axes, plot):
    names = list(dict.fromkeys(name for bars in plot["bars"].values() for name in bars))
    for i, name in enumerate(names):
        rows = [
            (group + i / (len(names) + 1), bars[name])
            for group, bars in enumerate(plot["bars"].values())
            if name in bars
        ]
        axes.barh([row for row, _ in rows], [value for _, value in rows], 1 / (len(names) + 1), label=name)
    middle = (len(names) - 1) / 2 / (len(names) + 1)
    axes.set_yticks(
        [group + middle for group in range(len(plot["bars"]))], [name.replace(" (", "\n(") for name in plot["bars"]]
    )
    axes.invert_yaxis()
    axes.grid(True, axis="x", alpha=0.3)
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize="small")


def _device(name):
    try:
        return torch.device(resolve_device(name))
    except ValueError as error:
        raise BadInput(str(error)) from None


def _check_writable(path):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}): give a file in a directory that can") from None


def _cpu_name():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _physical_memory():
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0

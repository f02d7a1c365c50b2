"""What all benchmarks share: the import path, the command line, the header, and what is printed and written.

A benchmark measures and returns the parts of a document, which is plain JSON:

    rows     all measured figures, as dicts
    tables   [{"title", "columns", "rows": [[text]], "notes": [text]}], made of the rows; docs/benchmarks.md shows them
    plots    side by side in one PNG: [{"title", "x", "y", "series": {name: [[x, y], ...]}}] are lines, on log axes,
             [{"title", "x", "bars": {group: {name: x}}}] are bars
    left_out [text], points of the grid that were not measured, and why
    failed   [text], errors of our own code: exit status 1. By default the rows of ours that were not timed

--json FILE writes the document. The last line on stdout is a short summary in JSON. Progress goes to stderr.
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

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # at lower levels PyTorch's profiler writes to stderr

import drawing  # noqa: E402
import torch  # noqa: E402

from model.command import Parser, command_output, resolve_device  # noqa: E402
from model.shared_cores import SharedCores  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name_of(dtype):
    """A dtype as the flag has it: torch.float32 is "fp32"."""
    return next(name for name, known in DTYPES.items() if known == dtype)


class BadInput(ValueError):
    """The command line asks for something impossible: one line on stderr, exit status 2."""


def parser(name, description):
    """A parser with the flags that all benchmarks have; name: of the script."""
    flags = Parser(prog=f"python benchmarks/{name}.py", description=description)
    flags.add_argument("--quick", action="store_true", help="a small grid: under 2 minutes on two CPU cores")
    flags.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (auto: a CUDA device if there is one)")
    flags.add_argument(
        "--seconds", type=float, help="measuring time for all points together; each call runs at least 3 times"
    )
    flags.add_argument("--deadline", type=float, metavar="S", help="begin no point of the grid after this many seconds")
    flags.add_argument("--json", metavar="FILE", help="write the document to this file")
    flags.add_argument("--plot", metavar="FILE", default=f"runs/benchmarks/{name}.png", help="a PNG, or none")
    flags.set_defaults(benchmark=name)
    return flags


def add_dtype(flags):
    """The flag that `dtype_of` reads."""
    flags.add_argument("--dtype", choices=DTYPES, help="fp32 on a CPU, bf16 on a GPU by default")


def dtype_of(options, device):
    return DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]


def add_only(flags, contestants):
    """The flag that chooses among the contestants {name: ...}; `chosen` reads it."""
    flags.add_argument("--only", nargs="+", metavar="NAME", help=f"some of: {', '.join(contestants)} (all by default)")


def chosen(names, contestants):
    """The contestants with these names, in their own order; all for None. Raises BadInput."""
    if unknown := [name for name in names or () if name not in contestants]:
        raise BadInput(f"--only names {unknown[0]!r}, wanted some of: {', '.join(contestants)}")
    return {name: value for name, value in contestants.items() if not names or name in names}


def run(flags, prepare, arguments=None):
    """The whole command; returns its exit status.

    prepare(options, device) raises BadInput, or returns the function that measures and returns the document's parts.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = flags.parse_args(arguments)
    with command_output(flags.prog):
        return _run(flags, options, prepare, arguments)


def _run(flags, options, prepare, arguments):
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
    with SharedCores(device):
        return _measure_and_write(document, measure, plot, options.json)


def _measure_and_write(document, measure, plot, json_file):
    started = time.perf_counter()
    document |= measure()
    if "failed" not in document:
        document["failed"] = failed(document["rows"])
    document["seconds"] = round(time.perf_counter() - started, 1)
    document = without_nan(document)
    for table in document["tables"]:
        print("\n" + as_text(table))
    for line in document.get("left_out", ()):
        print(f"\nleft out: {line}")
    for line in document["failed"]:
        print(f"\nFAILED: {line}")
    if plot:
        print(f"\n{drawing.draw(document['plots'], plot, drawing.place(document))}")
    if json_file:
        Path(json_file).write_text(as_json(document) + "\n", encoding="utf-8")
    print("\n" + json.dumps(summary(document, json_file)))
    return 1 if document["failed"] else 0


def summary(document, path=None):
    """The last line of a benchmark's output, as a dict."""
    rows = document["rows"]
    return {
        "benchmark": document["benchmark"],
        "device": document["machine"]["name"],
        "rows": len(rows),
        "timed": sum("median_ms" in row for row in rows),
        "failed": len(document.get("failed", ())),
        "left_out": len(document.get("left_out", ())),
        "document": path,
    }


def as_json(document, indent=""):
    """A document as text, each element of a list on one line: then a changed row is a changed line."""
    if isinstance(document, dict) and any(isinstance(value, dict | list) for value in document.values()):
        parts = [f"{indent} {json.dumps(key)}: {as_json(value, indent + ' ')}" for key, value in document.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    if isinstance(document, list) and document:
        parts = [f"{indent} {json.dumps(value, allow_nan=False)}" for value in document]
        return "[\n" + ",\n".join(parts) + f"\n{indent}]"
    return json.dumps(document, allow_nan=False)


def without_nan(value):
    """A document with None in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def progress(text):
    """A line about the work in progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


class Budget:
    """The points {label: point} of a grid, one after the other, each with its part of the measuring time.

    No point begins after `deadline` seconds: `left_out` has the labels of the points that did not begin.
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
        """Seconds for the current point: what is left, divided by the points that are left."""
        return max(0.0, self._end - time.perf_counter()) / self._to_come


def budget(options, points, seconds):
    """The `Budget` that the command line asks for; seconds {"quick", "default"}: where it does not say."""
    return Budget(points, options.seconds or seconds["quick" if options.quick else "default"], options.deadline)


def in_a_line(failure):
    """An exception in a few words."""
    return f"{type(failure).__name__}: {(str(failure).strip() or '?').splitlines()[0]:.120}"


def machine(device):
    """What a figure depends on besides the code: device, threads, versions, commit."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    facts = {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # processes that wanted a core in the last minute: noise
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
    """Whether each column holds only numbers and gaps; the first column is a name."""
    columns = range(1, len(table["columns"]))
    return [False] + [all(row[i][:1].isdigit() or row[i] in ("", "-") for row in table["rows"]) for i in columns]


def as_text(table):
    """A table for the terminal; numbers are aligned to the right."""
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
    """Why torch.compile does not work for this device, in a few words; None if it does."""
    if torch.device(device).type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        return "torch.compile needs a C++ compiler"
    return None


def not_installed(module):
    """ "x is not installed" for a module that is not; None for one that is."""
    return None if importlib.util.find_spec(module) else f"{module.replace('_', '-')} is not installed"


def not_timed(rows):
    """Lines for the rows that have a reason in `not_timed`; rows with the same reason share a line."""
    reasons, points = {}, {row["shape"] for row in rows}
    for row in rows:
        if row["not_timed"]:
            reasons.setdefault(f"{row['contestant']} was not timed: {row['not_timed']}", []).append(row["shape"])
    return [
        reason + ("" if len(shapes) == len(points) else f" [{'; '.join(shapes)}]") for reason, shapes in reasons.items()
    ]


def failed(rows):
    """The `failed` of a document: rows of ours that were not timed."""
    return [
        f"{row['contestant']} at {', '.join(row[key] for key in ('shape', 'pass') if key in row)}: {row['not_timed']}"
        for row in rows
        if row["contestant"].startswith("ours") and row["not_timed"]
    ]


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

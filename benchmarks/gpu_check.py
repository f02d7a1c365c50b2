"""Run everything that needs a GPU, in one command and under 10 minutes.

    make gpu-check                 # or, with a Python that has torch >= 2.11 and triton >= 3.6:
    python benchmarks/gpu_check.py

It installs and downloads nothing. It runs the tests marked gpu, then the other tests (whose tensors are on the card),
then the quick grid of each benchmark. The results go into docs/results/<card>.json, from which `python
benchmarks/report.py` writes docs/benchmarks.md. The file is written after every step: an interrupted check keeps its
results. Exit status: 0, 1 if a step failed, 2 without a GPU or with packages that are too old.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

try:
    import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
    import torch
except ImportError as error:
    print(
        f"gpu_check: {error}: run it with a Python that has torch, triton and this project's packages", file=sys.stderr
    )
    sys.exit(2)

LIMIT_SECONDS = 570  # of 600: the start and the last write take time too
NEEDED = {"torch": (2, 11), "triton": (3, 6)}


class Step(NamedTuple):
    name: str
    arguments: list[str]  # of Python
    share: float  # of the time that is left, among the shares of the remaining steps
    document: bool = False  # a benchmark, which writes its document with --json


def _benchmark(name, share):
    return Step(name, [f"benchmarks/{name}.py", "--quick", "--device", "cuda", "--plot", "none"], share, document=True)


PYTEST = ["-m", "pytest", "--tb=short", *(["--numprocesses", "auto"] if find_spec("xdist") else [])]
STEPS = [
    Step("tests that need a GPU", [*PYTEST, "-m", "gpu"], 2),
    Step("other tests", [*PYTEST, "-m", "not gpu", "--ignore", "tests/benchmarks"], 6),
    _benchmark("attn_speed", 4),
    _benchmark("rope_speed", 1),
    _benchmark("train_speed", 1.5),
    _benchmark("decode_speed", 1.5),
]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=harness.ROOT / "docs" / "results", help="directory to write into"
    )
    options = parser.parse_args(arguments)
    if reason := why_not():
        print(f"gpu_check: {reason}", file=sys.stderr)
        return 2
    facts = harness.machine("cuda")
    return check(facts, STEPS, options.results / f"{slug(facts['name'])}.json", LIMIT_SECONDS)


def why_not():
    """Why this Python on this machine cannot check anything, in one line; None if it can."""
    for package, least in NEEDED.items():
        found = harness.version(package)
        wanted = f"{package} >= {'.'.join(map(str, least))} is needed"
        if found is None:
            return f"{wanted}, and it is not installed"
        if tuple(int(number) for number in re.findall(r"\d+", found)[:2]) < least:
            return f"{wanted}, this is {found}"
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False, so there is nothing to check here (make test needs none)"
    return None


def check(facts, steps, path, limit):
    """Run the steps within `limit` seconds and write the result file after each. Returns the exit status."""
    result = {"benchmark": "gpu_check", "command": "python benchmarks/gpu_check.py", "machine": facts}
    result |= {"steps": [], "documents": {}}
    end = time.monotonic() + limit
    for i, step in enumerate(steps):
        left = end - time.monotonic()
        done, document = run_step(step, left * step.share / sum(other.share for other in steps[i:]))
        result["steps"].append(done)
        if document is not None:
            result["documents"][step.name] = document
        print(f"{done['status']:>9}  {step.name} ({done['seconds']:.0f} s): {done['summary']}", flush=True)
        write(path, result)
    print(f"\nwritten: {path}\nnow: python benchmarks/report.py")
    return 0 if all(done["status"] == "passed" for done in result["steps"]) else 1


def run_step(step, seconds):
    """({name, command, status, seconds, summary, tail}, document or None) of a step that is stopped after `seconds`."""
    started = time.monotonic()
    # with Triton's interpreter nothing would run on the GPU
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "document.json"
        extra = []
        if step.document:  # a stopped benchmark writes no document: the deadline makes it leave out points in time
            extra = ["--deadline", f"{0.6 * seconds:.0f}", "--json", str(file)]
        output, status, summary = run_python([*step.arguments, *extra], environment, seconds)
        document = json.loads(file.read_text()) if file.exists() and file.stat().st_size else None
        if document is not None and "command" in document:  # the file is gone when someone reads it
            document["command"] = document["command"].replace(f" --json {file}", "")
    lines = [
        line.replace(f"{harness.ROOT}{os.sep}", "").replace(sys.executable, "python")
        for line in output.splitlines()
        if line.strip()
    ]
    if status != "timed out" and step.document:
        if document is None:
            status = "failed"
        else:
            timed = harness.summary(document)
            summary = f"{timed['timed']} of {timed['rows']} rows timed; {timed['failed']} failed"
    elif lines and status != "timed out":
        summary = lines[-1].strip("= ")
    facts = {
        "name": step.name,
        "command": " ".join(["python", *step.arguments]),
        "status": status,
        "seconds": round(time.monotonic() - started, 1),
        "summary": summary,
    }
    if status != "passed":
        facts["tail"] = lines[-60:]
    return facts, document


def run_python(arguments, environment, seconds):
    """(output, status, summary) of Python with these arguments, stopped after `seconds`."""
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=harness.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=max(1.0, seconds),
        )
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout or ""
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
        return output, "timed out", f"stopped after {seconds:.0f} s"
    return done.stdout, "passed" if done.returncode == 0 else "failed", f"exit status {done.returncode}"


def write(path, result):
    """The result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(harness.as_json(result) + "\n", encoding="utf-8")
    temporary.replace(path)


def slug(name):
    """A card's name for a file: "NVIDIA H100 80GB HBM3" is "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())

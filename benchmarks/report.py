"""Writes docs/benchmarks.md and docs/kernel-report.md, and their plots, from the results in docs/results.

    python benchmarks/attn_speed.py --json docs/results/cpu-attn_speed.json      # rope_speed, train_speed, decode_speed
    make gpu-check                                                               # on a machine with a GPU
    python benchmarks/report.py

A result is the file that a benchmark writes with --json, or that gpu_check.py writes. Figures under a GPU's name were
measured on that GPU. Figures of a compiler or a formula ("modelled" in their document) have their own page.
"""

import argparse
import ast
import json
import sys
from pathlib import Path

import drawing
import harness

ORDER = ["attn_speed", "rope_speed", "train_speed", "decode_speed"]
TITLES = {
    "attn_speed": "Attention",
    "rope_speed": "Rotary positions",
    "train_speed": "Training",
    "decode_speed": "Generation",
    "kernel_report": "Compiled kernels",
}
HEAD = """\
# Benchmarks

Written by `python benchmarks/report.py` from the files in [docs/results](results): change those, not this page.

All times are medians, with the 20th and 80th percentile. The contestants took turns in one run, call by call, and each
had to agree with the reference before the timing. On a GPU, *ms* is the time of the device alone, with a cold L2 cache,
and *host ms* is the time until the call returns to Python ([measure.py](../benchmarks/measure.py) says how); tokens/s
and ratios of whole steps use the slower of the two. Generation is timed by the wall clock, host and device together.
The docstring of a benchmark says what its columns mean: `python benchmarks/attn_speed.py --help`.
"""
NO_GPU = """\
## GPUs

There is no result of a GPU yet. `make gpu-check`, on a machine that has one with torch >= 2.11 and triton >= 3.6, runs
the tests and the quick grid of every benchmark in under 10 minutes and writes `docs/results/<card>.json`.
"""
MODELLED_HEAD = """\
# What the compiler makes of the kernels

Written by `python benchmarks/report.py` from the files in [results](results): change those, not this page.

These are the kernels that ship, in bf16 with rope, for heads of 64 and 128, one table a card. They were compiled
without a GPU. Registers, spills, load widths and instructions are facts about the code; *times and shares of peak come
from a model: nothing on this page was run on a GPU.* The commands below make the tables for other cards, head sizes,
dtypes, features and shapes, and with `--details` the instructions by pipe and by source line.
"""


class BadResult(ValueError):
    """A file in docs/results is not a result."""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help="directory with results/ in it")
    options = parser.parse_args(arguments)
    try:
        results = load(options.docs / "results")
        page = write_page(results, options.docs)
    except (BadResult, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"{page}: {len(results)} documents")
    return 0


def load(directory):
    """[(name for its plot, document, steps of a check)] of all results; gpu_check's file has several.

    Raises BadResult.
    """
    results = []
    for path in sorted(directory.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = [(path.stem, content, [])]
            if content["benchmark"] == "gpu_check":
                tests = {**content, "tables": [], "plots": []}
                found = [(path.stem, tests, content["steps"])]
                found += [(f"{path.stem}-{name}", document, []) for name, document in content["documents"].items()]
            for _, document, _ in found:
                _check(document)
            results += found
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise BadResult(f"{path} is not a result of a benchmark ({type(error).__name__}: {error})") from None
    if not results:
        raise BadResult(f"{directory} holds no results: run a benchmark with --json {directory}/NAME.json")
    return results


def _check(document):
    for key in ("benchmark", "command", "machine", "tables", "plots"):
        document[key]
    for key in ("device", "name", "commit", "date"):
        document["machine"][key]
    if any(set(table) < {"title", "columns", "rows"} for table in document["tables"]):
        raise KeyError("title, columns or rows of a table")


def write_page(results, docs):
    """Draw the plots and write the pages; returns the path of benchmarks.md."""
    measured = [result for result in results if not result[1].get("modelled")]
    lines = [HEAD]
    for device, heading in (("cuda", "GPU"), ("cpu", "CPU: no figure below is a GPU's")):
        of_device = [result for result in measured if result[1]["machine"]["device"] == device]
        if device == "cuda" and not of_device:
            lines.append(NO_GPU)
        for name in dict.fromkeys(document["machine"]["name"] for _, document, _ in of_device):
            lines.append(f"## {name} ({heading})\n")
            of_machine = [result for result in of_device if result[1]["machine"]["name"] == name]
            for _, _, steps in of_machine:
                lines += _steps(steps)
            for result in sorted(of_machine, key=_place):
                lines += _section(*result[:2], docs)
    if modelled := [result for result in results if result[1].get("modelled")]:
        lines.append("[What the compiler makes of the kernels](kernel-report.md), on cards that were not here.")
        sections = [line for name, document, _ in modelled for line in _section(name, document, docs)]
        text = "\n".join([MODELLED_HEAD, "```text", _docstring("kernel_report"), "```\n", *sections]).rstrip() + "\n"
        (docs / "kernel-report.md").write_text(text, encoding="utf-8")
    page = docs / "benchmarks.md"
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return page


def _docstring(benchmark):
    """What a benchmark's --help begins with; not imported, since kernel_report needs Triton."""
    source = (harness.ROOT / "benchmarks" / f"{benchmark}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).split("\n\n", 1)[1]


def _place(result):
    name = result[1]["benchmark"]
    return (ORDER.index(name) if name in ORDER else len(ORDER), result[0])


def _steps(steps):
    if steps:
        yield "| step of the check | result | seconds | |\n|---|---|---:|---|"
        for step in steps:
            yield f"| {step['name']} | {step['status']} | {step['seconds']:.0f} | {_cell(step['summary'])} |"
        yield ""


def _section(name, document, docs):
    machine = document["machine"]
    if not document["tables"]:
        return
    yield f"### {TITLES.get(document['benchmark'], document['benchmark'])}\n"
    shown = ("threads", "load", "torch", "triton", "transformers", "cuda", "commit", "date")
    facts = [f"{key} {machine[key]}" for key in shown if machine.get(key) is not None]
    facts += [f"{key} {value}" for key, value in document.get("settings", {}).items() if not isinstance(value, dict)]
    yield f"`{document['command']}`  \n{', '.join(facts)}\n"
    for line in document.get("failed", ()):
        yield f"**Failed: {line}**\n"
    for line in document.get("left_out", ()):
        yield f"Left out: {line}\n"
    plot = f"{name}.png"
    drawn = drawing.draw(document["plots"], docs / "results" / plot, drawing.place(document))
    if drawn.startswith("plot:"):
        yield f"![{TITLES.get(document['benchmark'], document['benchmark'])}](results/{plot})\n"
    for table in document["tables"]:
        yield from _markdown(table)


def _markdown(table):
    yield f"**{table['title']}**\n"
    yield "| " + " | ".join(table["columns"]) + " |"
    numeric = harness.numeric_columns(table)
    yield "|" + "|".join("---:" if right else "---" for right in numeric) + "|"
    before = None
    for row in table["rows"]:
        # rows with the same first column show it once
        first = "" if row[0] == before else _cell(row[0])
        before = row[0]
        yield "| " + " | ".join([first, *map(_cell, row[1:])]) + " |"
    yield ""
    for note in table.get("notes", ()):
        yield f"- {note}"
    if table.get("notes"):
        yield ""


def _cell(text):
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())

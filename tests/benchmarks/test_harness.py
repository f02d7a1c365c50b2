import json
import os
import subprocess
import sys
import time

import drawing
import harness
import pytest

PARTS = {
    "rows": [{"contestant": "a", "median_ms": 1.0}, {"contestant": "bcd", "not_timed": "absent"}],
    "tables": [{"title": "Some", "columns": ["who", "ms"], "rows": [["a", "1.0"], ["bcd", "10"]], "notes": ["a note"]}],
    "plots": [{"title": "t", "x": "T", "y": "ms", "series": {"ours": [[2, 1.0], [1, 0.5]]}}],
}


def run(arguments, parts=PARTS):
    return harness.run(harness.parser("some_speed", "Some."), lambda options, device: lambda: dict(parts), arguments)


def test_the_document_is_in_the_file_and_its_summary_is_the_last_line(capsys, tmp_path):
    file = tmp_path / "new" / "some.json"
    assert run(["--device", "cpu", "--json", str(file), "--plot", str(tmp_path / "some.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(file.read_text())
    assert json.loads(lines[-1]) == {
        "benchmark": "some_speed", "device": document["machine"]["name"], "rows": 2, "timed": 1, "failed": 0,
        "left_out": 0, "document": str(file),
    }  # fmt: skip
    assert document["rows"] == PARTS["rows"] and len(file.read_text().splitlines()) < 25  # one row on one line
    assert document["benchmark"] == "some_speed" and document["tables"] == PARTS["tables"]
    assert {"device", "name", "threads", "torch", "triton", "commit", "date"} <= set(document["machine"])
    assert {"Some", "who   ms", "bcd   10", "a note"} <= set(lines)
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")


def test_a_cpus_figures_are_called_so(capsys):
    run(["--device", "cpu", "--plot", "none"])
    assert "a CPU: no figure below is a GPU's" in capsys.readouterr().out


def test_what_failed_makes_the_exit_status_1(capsys):
    assert run(["--plot", "none"], {**PARTS, "failed": ["ours at 1: wrong"]}) == 1
    assert "FAILED: ours at 1: wrong" in capsys.readouterr().out


def test_numbers_that_json_lacks_become_null(tmp_path):
    file = tmp_path / "some.json"
    rows = [{"loss": float("nan"), "error": [float("inf"), 1.5]}]
    run(["--plot", "none", "--json", str(file)], {**PARTS, "rows": rows, "failed": []})
    assert json.loads(file.read_text())["rows"] == [{"loss": None, "error": [None, 1.5]}]


def test_failures_are_those_of_ours():
    rows = [
        {"contestant": "ours", "shape": "64, W 8", "pass": "fwd", "not_timed": "wrong"},
        {"contestant": "ours, compiled", "shape": "a", "not_timed": "slow"},
        {"contestant": "SDPA", "shape": "a", "not_timed": "absent"},
        {"contestant": "ours", "shape": "a", "not_timed": None},
    ]
    assert harness.failed(rows) == ["ours at 64, W 8, fwd: wrong", "ours, compiled at a: slow"]


def test_bars_are_drawn(tmp_path):
    bars = {"small": {"ours": 2.0, "theirs": 1.0}, "large": {"ours": 3.0}}
    file = tmp_path / "bars.png"
    assert drawing.draw([{"title": "t", "x": "tokens/s", "bars": bars}], file) == f"plot: {file}"
    assert drawing.draw([{"title": "t", "x": "T", "y": "ms", "series": {"a": []}}], file).startswith("no plot")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds is 0, wanted a number above 0"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--deadline", "-1"], "--deadline is -1, wanted a number above 0"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--json", "/proc/some.json"], "some.json cannot be written"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(["--plot", "none", *arguments])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_contestants_are_chosen_by_name():
    assert harness.chosen(["c", "a"], {"a": 1, "b": 2, "c": 3}) == {"a": 1, "c": 3}
    assert harness.chosen(None, {"a": 1}) == {"a": 1}
    with pytest.raises(harness.BadInput, match="--only names 'd', wanted some of: a, b"):
        harness.chosen(["a", "d"], {"a": 1, "b": 2})


def test_measuring_time_goes_to_the_points_that_are_left():
    budget, shares = harness.Budget({"a": 1, "b": 2, "c": 3, "d": 4}, 100), []
    for point in budget:
        shares.append(budget.share())
        budget._end -= {1: 40, 2: 100}.get(point, 0)  # as if so many seconds had passed
    assert shares == pytest.approx([25, 20, 0, 0], abs=1)


def test_points_after_the_deadline_are_left_out_and_named():
    budget = harness.Budget({"a": 1, "b": 2}, 1, deadline=0.01)
    assert [time.sleep(0.02) or point for point in budget] == [1]  # the first one is measured in any case
    assert budget.left_out == ["b (no time was left)"]


def test_ours_wins_over_another_package_named_kernels(tmp_path):
    """As when Hugging Face's is installed: `python benchmarks/x.py` does not put the repository's root on the path."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the other package was imported')\n")
    done = subprocess.run(
        [sys.executable, "benchmarks/rope_speed.py", "--shapes", "x"],
        cwd=harness.ROOT,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "--shapes has 'x'" in done.stderr, done.stderr


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_machine_is_described(device):
    facts = harness.machine(device)
    assert facts["device"] == device and facts["name"] and facts["torch"]
    assert facts["commit"] == "unknown" or len(facts["commit"].rstrip("+")) >= 7

"""The report on compiled kernels as a command, and what it says of bad input and of kernels that do not compile."""

import json
import os
import re
import subprocess
import sys

import harness
import pytest

pytest.importorskip("triton")

import kernel_report
import tune_tiles

from kernels import compiled

KERNELS = {"rope", "attention_forward", "attention_dq", "attention_dkdv", "append", "decode", "combine"}


@pytest.fixture
def compiling(monkeypatch):
    """As in a process that does not interpret kernels, as far as the command line goes."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_report_runs_end_to_end(tmp_path):
    files = {name: tmp_path / name for name in ("report.json", "plot.png", "cubins")}
    arguments = ["--arch", "sm_90", "--head-dim", "64", "--features", "plain", "--details"]
    arguments += ["--json", files["report.json"], "--plot", files["plot.png"], "--keep", files["cubins"]]
    done = subprocess.run(
        [sys.executable, "benchmarks/kernel_report.py", *map(str, arguments)],
        cwd=harness.ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "[1/1] sm_90, head size 64, bf16, plain" in done.stderr
    document = json.loads(files["report.json"].read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == harness.summary(document, str(files["report.json"]))
    assert document["modelled"] is True and document["failed"] == []
    assert files["plot.png"].read_bytes().startswith(b"\x89PNG")
    assert {row["kernel"] for row in document["rows"]} == KERNELS
    for row in document["rows"]:
        assert row["registers"] > 15 and row["spilled_bytes"] == row["stack_bytes"] == 0
        cubin = files["cubins"] / f"sm_90-{row['kernel']}-64-bf16-plain-g4.cubin"
        assert cubin.read_bytes().startswith(b"\x7fELF")
    forward = next(row for row in document["rows"] if row["kernel"] == "attention_forward")
    assert forward["matrix"] == ["HGMMA"] and [loop["masked"] for loop in forward["loops"]] == [True, False]
    assert forward["loads"] == forward["stores"] == [16]
    by_kernel = {row["kernel"]: row["estimates"][0] for row in document["rows"] if row["estimates"]}
    assert set(by_kernel) == KERNELS - {"append", "combine"}
    for row in by_kernel.values():
        assert 0 < row["of_peak_serial"] <= row["of_peak_overlapped"] <= 1
        assert row["memory_ms"] <= row["overlapped_ms"] <= row["serial_ms"]
    assert by_kernel["decode"]["bound_by"] == by_kernel["rope"]["bound_by"] == "memory"
    titles = [table["title"] for table in document["tables"]]
    assert titles[0].startswith("sm_90 (H100") and len(document["tables"][0]["rows"]) == len(KERNELS)
    assert titles[2].startswith("sm_90, D 64, bf16, plain") and "published figures" in titles[3]
    pipes = [row for row in document["tables"][1]["rows"] if row[1:3] == ["attention_forward", "interior"]]
    assert int(pipes[0][3]) == sum(map(int, pipes[0][4:])) == forward["loops"][1]["instructions"]
    for table in document["tables"]:
        assert table["title"] in done.stdout and all(len(row) == len(table["columns"]) for row in table["rows"])


def test_every_set_of_features_is_compiled_and_the_worst_is_shown(compiling, monkeypatch, tmp_path):
    """Three ways to rotate, three of documents, sinks, softcap and a gradient of lse or none: 72 sets, each once."""
    asked = []

    class Launch:
        name, tile = "append", {"BLOCK_M": 16, "num_warps": 4}

    def launches(target, head_dim, dtype, group, **settings):
        asked.append(settings)
        return [Launch()]

    def compile_launch(launch, target):
        spilled = 28 if {"half_rope", "softcap"} <= asked[-1].keys() else 0
        return compiled.Compiled("append", target, launch.tile, 20, 0, spilled, 0, 8, "warps", 9, (), (), (), "", b"")

    monkeypatch.setattr(compiled, "launches", launches)
    monkeypatch.setattr(compiled, "compile_launch", compile_launch)
    file = tmp_path / "report.json"
    arguments = ["--arch", "sm_86", "--head-dim", "64", "--features", "every", "--json", str(file)]
    assert kernel_report.main(arguments) == 0
    assert len(asked) == 72 and len({tuple(sorted(settings)) for settings in asked}) == 72
    assert {"rope": True, "sinks": True, "softcap": 20.0, "grad_lse": True} in asked and {} in asked
    (table,) = json.loads(file.read_text())["tables"]
    assert table["rows"] == [["sm_86, D 64, bf16", "append", "72", "20", "0", "28", "0", "8"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--arch sm_90,sm_70", "architecture 'sm_70' is not one .* wanted one of sm_80, .*sm_120"),
        ("--dtype int8", "'int8' is not known, wanted of: .*bf16"),
        ("--features rope rain", "'rain' is not known, wanted of: plain, rope"),
        ("--head-dim 7", "--head-dim has 7, wanted even numbers up to 256"),
        ("--head-dim 64 --shape 4,32,8,8192,128,1024", "--shape has a head size of 128, which --head-dim does not"),
        ("--shape 4,32,8,8192", "--shape has '4,32,8,8192', wanted B,HQ,HKV,T,D,W"),
        ("--shape 4,32,5,8192,64,none", "wanted B,HQ,HKV,T,D,W with HQ a multiple of HKV"),
    ],
)
def test_bad_input_is_named_in_one_line(compiling, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        kernel_report.main(arguments.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize("script", [kernel_report, tune_tiles])
def test_interpreted_kernels_are_refused(monkeypatch, capsys, script):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        script.main([])
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


def test_a_kernel_that_does_not_compile_is_a_row_with_its_error(compiling, monkeypatch, capsys, tmp_path):
    class Launch:
        def __init__(self, name):
            self.name, self.tile = name, {"BLOCK_M": 16, "num_warps": 4}

    def compile_launch(launch, target):
        if launch.name == "bad":
            raise RuntimeError("PassManager::run failed\nwith much more")
        return compiled.Compiled(launch.name, target, launch.tile, 20, 0, 0, 0, 8, "warps", 100, (), (), (), "", b"")

    monkeypatch.setattr(compiled, "launches", lambda *_, **__: [Launch("bad"), Launch("append")])
    monkeypatch.setattr(compiled, "compile_launch", compile_launch)
    file = tmp_path / "report.json"
    status = kernel_report.main(["--arch", "sm_86", "--head-dim", "64", "--json", str(file)])
    output, document = capsys.readouterr().out, json.loads(file.read_text())
    assert status == 1
    assert [row["error"] for row in document["rows"]] == ["RuntimeError: PassManager::run failed", None]
    assert "FAILED: sm_86, D 64, bf16, rope, bad: RuntimeError: PassManager::run failed" in output


def test_a_shape_without_a_window_is_causal():
    assert kernel_report.parse("1,16,16,16384,128,none").window == 16384

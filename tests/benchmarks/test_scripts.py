"""Each benchmark as it is run, on a tiny grid, without the contestants that are compiled for ten seconds first."""

import json
import os
import subprocess
import sys

import harness
import pytest
import torch

TINY = {
    "attn_speed": "--shapes 64,8,4,2,16 --only ours SDPA_masked SDPA_causal local-attention xFormers flash-attn",
    "rope_speed": "--shapes 16,4,2,8 --only ours eager Hugging_Face Liger",
    "train_speed": "--context-size 16 --window 4 --n-layer 1 --d-model 32 --batch-size 2",
    "decode_speed": "--positions 20 40 --windows 8 --batch-sizes 2 --n-layer 1 --d-model 32 --long-run 4 9",
    "batch_speed": "--prompts 6 --batch-sizes 2 --window 8 --n-layer 1 --d-model 32 --only one_by_one padded ours",
    "optimizer_speed": "--d-model 16",
    "context_parallel_speed": "--processes 1 2 --positions 64 --window 8",
}


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_runs_end_to_end(name, tmp_path):
    plot, file = tmp_path / "plot.png", tmp_path / "document.json"
    tiny = [word.replace("_", " ") for word in TINY[name].split()]
    arguments = [*tiny, "--seconds", "0.1", "--plot", str(plot), "--json", str(file), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *arguments],
        cwd=harness.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # small tensors: a second thread costs more than it brings
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    document, last = json.loads(file.read_text()), json.loads(done.stdout.splitlines()[-1])
    assert last == harness.summary(document, str(file)) and last["timed"] > 0 and last["failed"] == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert document["benchmark"] == name and document["machine"]["device"] == "cpu"
    timed = [row for row in document["rows"] if "median_ms" in row]
    assert any(row["contestant"].startswith("ours") for row in timed)
    assert all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["calls"] >= 3 for row in timed)
    for row in document["rows"]:  # contestants that were not timed are named, with the reason
        assert ("median_ms" in row) != bool(row["not_timed"])
        assert row["not_timed"] is None or row["not_timed"] in done.stdout
    for table in document["tables"]:
        assert table["title"] in done.stdout and all(len(row) == len(table["columns"]) for row in table["rows"])
    assert len(document["tables"][0]["rows"]) > 0


@pytest.mark.parametrize("name", ("machine_speed", "time_spent"))
def test_a_table_of_the_machine_or_of_operators_is_made(name, tmp_path, monkeypatch, capsys):
    """With small numbers: products of 8 x 8 and a megabyte, one step and three tokens."""
    script = __import__(name)
    monkeypatch.setattr(script, "PRODUCTS", [(2, 8, 8, 8)], raising=False)
    monkeypatch.setattr(script, "MEMORY_BYTES", 2**20, raising=False)
    monkeypatch.setattr(script, "CALLS", {"a training step": 1, "a token": 3}, raising=False)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    file = tmp_path / "document.json"
    try:
        arguments = ["--quick", "--seconds", "0.1", "--plot", "none", "--json", str(file), "--device", "cpu"]
        assert script.main(arguments) == 0
    finally:
        torch.set_float32_matmul_precision(precision)
    assert torch.get_num_threads() == threads
    document, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert all(("median_ms" in row) != bool(row["not_timed"]) for row in document["rows"])
    if name == "machine_speed":
        assert [row["contestant"] for row in document["rows"][-3:]] == ["copy", "read", "fill"]
        assert all(row["per_second"] > 0 for row in document["rows"] if not row["not_timed"])
        assert "GFLOP/s" in printed and "GB/s" in printed
    else:
        token, step = document["tables"]
        assert step["rows"][-1][0] == token["rows"][-1][0] == "all"
        shares = [float(line[2][:-1]) for line in token["rows"][:-1]]
        assert sum(shares) == pytest.approx(100, abs=1) and shares[:-1] == sorted(shares[:-1], reverse=True)
        assert "aten::addmm" in {line[0] for line in token["rows"]}


@pytest.mark.parametrize("name", [*TINY, "machine_speed", "time_spent", "report", "gpu_check"])
def test_help_says_what_it_is(name):
    script = __import__(name)
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0


WRONG = {
    "tune_tiles --head-dim 0": (2, "head size 0 is not 1 to 256"),
    "decode_speed --quick --vocab-size 0": (2, "vocab_size=0 is not a whole number of at least 1"),
    "attn_speed --only ours,SDPA --shapes 64,8": (2, "--only names 'ours,SDPA', wanted some of"),
    "attn_speed --only ours --shapes 1000000000000,16 --plot none": (0, "(the check does not fit into memory)"),
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_input_is_one_line(command):
    name, *arguments = command.split()
    status, words = WRONG[command]
    device = ["--device", "cpu"] if "speed" in name else []
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, f"benchmarks/{name}.py", *arguments, *device],
                          cwd=harness.ROOT, env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == status and words in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_reader_that_leaves_ends_no_benchmark_in_a_traceback(tmp_path):
    """As in `python benchmarks/rope_speed.py | head`: the file is written all the same."""
    file = tmp_path / "document.json"
    command = [sys.executable, "benchmarks/rope_speed.py", "--shapes", "16,4,2,8", "--only", "ours", "eager"]
    command += ["--seconds", "0.1", "--plot", "none", "--json", str(file), "--device", "cpu"]
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}  # so that it ends at any line
    with subprocess.Popen(
        command, cwd=harness.ROOT, env=unbuffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        messages = process.stderr.read()
    assert (process.returncode, "Traceback" in messages) == (0, False), messages
    assert json.loads(file.read_text())["rows"]

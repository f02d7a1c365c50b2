"""`python -m train` from the outside: what it says, what it leaves, and how it refuses what it cannot use."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train import Trainer, TrainingFailed
from train.__main__ import main

ROOT = Path(__file__).parents[2]
TEXT = "When are you going? I am going to the play.\nAnd you are coming to the play with me.\n" * 40
SIZES = {"context-size": 16, "window": 8, "n-layer": 2, "n-head": 2, "n-kv-head": 1, "d-model": 32, "batch-size": 4}
SMALL = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def run(*arguments):
    return main([*SMALL, "--device", "cpu", *arguments])


def refused(capsys, *arguments):
    """The one line with which the command refuses its arguments, with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1
    return shown.err


def test_a_run_says_what_it_is_writes_a_passage_and_says_how_to_write_another(text, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert run("--fused-kernels", "--data", text, "--max-steps", "20", "--eval-every", "10", "--out-dir", out) == 0
    shown = capsys.readouterr().out
    first, passage, last = re.split(r"-{80}", shown)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    for fact in (
        "rope-window-gqa",
        "window 8",
        "2 heads on 1 KV heads",
        "backend banded: ",
        "cpu",
        "20 steps of 64 tokens",
    ):
        assert fact in first
    assert re.search(r"[\d,]+ parameters", first) and out in first
    assert facts["data"]["characters"] == len(TEXT) and facts["command"].startswith("python -m train --context-size 16")
    assert len(passage) == 500 + 2  # and a line break on either side
    assert set(passage) <= set(TEXT)
    assert f"python -m model.sample --checkpoint {out}/best" in last
    assert f"python -m train.evaluate --checkpoint {out}/best" in last


def test_the_commands_it_prints_work(text, tmp_path, capsys):
    run("--data", text, "--max-steps", "4", "--out-dir", str(tmp_path / "run"))
    printed = re.findall(r"^  python (-m .*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(printed) == 2
    for command in printed:
        shown = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout.splitlines()[-1])["targets"] == len(TEXT) // 10 - 1


def test_two_runs_of_one_seed_write_the_same_losses_and_the_same_passage(text, tmp_path, capsys):
    seen = []
    for name in ("first", "second"):
        run("--data", text, "--max-steps", "12", "--seed", "3", "--out-dir", str(tmp_path / name))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses = [line.get("loss", line.get("held_out_loss")) for line in lines]
        seen.append((losses, re.split(r"-{80}", capsys.readouterr().out)[1]))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("architecture", ["original", "rope", "rope-window", "rope-window-gqa"])
def test_every_architecture_trains_with_and_without_fused_kernels_alike(architecture, text, tmp_path, capsys):
    losses = []
    for kernels in ("--fused-kernels", "--no-fused-kernels"):
        out = tmp_path / kernels
        run("--architecture", architecture, kernels, "--data", text, "--max-steps", "5", "--out-dir", str(out))
        assert f"{architecture}: " in capsys.readouterr().out
        losses.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["held_out_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_without_an_out_dir_each_run_has_a_directory_of_its_own(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("--data", text, "--max-steps", "1")
    (directory,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}", directory.name) and (directory / "best" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--windo", "8"], "unrecognized arguments: --windo 8"),
        (["--window", "0"], "window=0 is not a whole number of at least 1"),
        (["--n-head", "3"], "n_head=3 does not divide d_model=32"),
        (["--n-head", "4", "--n-kv-head", "3"], "n_kv_head=3 does not divide n_head=4"),
        (["--architecture", "gpt-5"], "argument --architecture: invalid choice: 'gpt-5'"),
        (["--context-size", "500"], "shorter than one context of 500"),
        (["--context-size", "0"], "context_length=0 is not a whole number of at least 1"),
        (["--batch-size", "0"], "batch_size is 0, wanted at least 1"),
        (["--fused-kernels", "--backend", "cuda"], "argument --backend: invalid choice: 'cuda'"),
        (["--backend", "banded"], "add --fused-kernels"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--precision", "fp16"], "precision fp16 needs a CUDA device"),
        (["--dropout", "1.5"], "dropout=1.5 is not a probability below 1"),
    ],
)
def test_bad_flags_are_refused_in_one_line_and_nothing_is_written(text, tmp_path, capsys, arguments, message):
    out = tmp_path / "run"
    assert message in refused(capsys, "--data", text, "--out-dir", str(out), *arguments)
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"To be.", "shorter than one context of 16"),
    ],
)
def test_bad_texts_are_refused_in_one_line_and_nothing_is_written(tmp_path, capsys, content, message):
    path, out = tmp_path / "bad.txt", tmp_path / "run"
    if content is not None:
        path.write_bytes(content)
    line = refused(capsys, "--data", str(path), "--out-dir", str(out))
    assert message in line and str(path) in line and not out.exists()


def test_a_run_directory_that_cannot_be_used_is_refused_in_one_line(text, tmp_path, capsys):
    assert "cannot be written: Not a directory" in refused(capsys, "--data", text, "--out-dir", f"{text}/run")
    run("--data", text, "--max-steps", "1", "--out-dir", str(tmp_path / "run"))
    capsys.readouterr()
    assert "holds a run already" in refused(capsys, "--data", text, "--out-dir", str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("error", "message"),
    [(TrainingFailed("the loss is nan"), "the loss is nan"), (OSError(28, "No space left on device"), "No space left")],
)
def test_a_failed_run_is_one_line_and_status_1(text, tmp_path, capsys, monkeypatch, error, message):
    def fail(trainer):
        raise error

    monkeypatch.setattr(Trainer, "train", fail)
    assert run("--data", text, "--out-dir", str(tmp_path / "run")) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("python -m train: run failed: ") and message in shown and shown.count("\n") == 1


def test_diverging_is_a_failed_run(text, tmp_path, capsys):
    status = run("--data", text, "--learning-rate", "1e30", "--warmup-steps", "0", "--out-dir", str(tmp_path / "run"))
    assert status == 1 and "lower learning_rate" in capsys.readouterr().err


def test_ctrl_c_on_the_running_command_saves_says_where_and_ends_well(text, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "train", *SMALL, "--data", text, "--max-steps", "1000000", "--out-dir", str(out)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in errors
    step = json.loads((out / "last" / "training.json").read_text())["step"]
    assert f"stopped at step {step:,} of 1,000,000: saved in {out}/last" in shown

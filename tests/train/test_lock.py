"""A run directory has one writer: a second command is refused, a killed one blocks nobody, readers are free."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from kill_and_resume import ROOT, TEXT, start, steps_of, wait_for
from test_resume import contents, refused

import train.lock
from model import GPT, GPTConfig
from model.huggingface.__main__ import main as hugging_face
from model.sample import main as sample
from train import CharDataset, Trainer, TrainerConfig
from train.__main__ import main
from train.evaluate import main as evaluate
from train.lock import LOCK, release_lock, take_lock

pytest.importorskip("fcntl")  # there are no such locks elsewhere

SIZES = "--context-size 16 --window 8 --n-layer 1 --n-head 2 --n-kv-head 1 --d-model 16 --batch-size 2 --device cpu"
FAST = [*SIZES.split(), "--eval-examples", "4", "--sample-tokens", "0", "--log-every", "1"]
# train/lock.py alone: the package would load torch, which takes seconds
TAKE = f"import os, sys, time; sys.path.append({str(ROOT / 'train')!r}); import lock; lock.take_lock(sys.argv[1]); "


def trainer_of(out_dir, **settings):
    dataset = CharDataset(TEXT, block_size=16)
    sizes = {"context_length": 16, "n_layer": 1, "n_head": 1, "d_model": 8}
    model = GPT(GPTConfig(vocab_size=dataset.vocab_size, **sizes), seed=0)
    return Trainer(
        model, dataset, None, TrainerConfig(**{"max_steps": 2, "device": "cpu", **settings}, out_dir=out_dir)
    )


def taking(directory, code):
    return subprocess.Popen([sys.executable, "-c", TAKE + code, str(directory)], stdout=subprocess.PIPE)


def holder(directory, code="time.sleep(600)"):
    """A process that has the directory's lock."""
    process = taking(directory, "print('held', flush=True); " + code)
    assert process.stdout.readline() == b"held\n"
    return process


def ended(process):
    process.kill()
    process.communicate()


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.fixture
def run(text, tmp_path, capsys):
    """The directory of a run that has ended."""
    assert main([*FAST, "--data", text, "--max-steps", "2", "--out-dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_a_second_command_is_refused_while_the_first_trains_and_not_once_it_is_killed(text, tmp_path, capsys):
    run = tmp_path / "run"
    process = start(*FAST, "--data", text, "--max-steps", "1000000", "--out-dir", str(run))
    try:
        wait_for(lambda: steps_of(run) > 3, process)
        process.send_signal(signal.SIGSTOP)  # so that what is compared is not written meanwhile
        before = contents(run)
        busy = f"run directory {run} is being written by process {process.pid} on {socket.gethostname()}: wait for it"
        assert busy in refused(capsys, "--resume", "--out-dir", str(run))
        assert busy in refused(capsys, *FAST, "--data", text, "--out-dir", str(run))
        assert contents(run) == before
    finally:
        ended(process)
    assert (run / LOCK).read_text()  # what the dead process left keeps nobody out
    assert main(["--resume", "--out-dir", str(run), "--max-steps", "1"]) == 0


def test_the_library_is_refused_as_well_and_leaves_what_is_there(tmp_path):
    trainer_of(tmp_path / "run").train()
    process = holder(tmp_path / "run")
    try:
        before = contents(tmp_path / "run")
        with pytest.raises(BlockingIOError, match=f"run directory .*run is being written by process {process.pid} on"):
            trainer_of(tmp_path / "run", resume=True)
        assert contents(tmp_path / "run") == before
    finally:
        ended(process)
    trainer_of(tmp_path / "run", resume=True)


def test_of_two_processes_that_start_a_run_one_does(tmp_path):
    process = holder(tmp_path)  # and has not written run.json yet
    try:
        with pytest.raises(BlockingIOError, match="is being written by process"):
            trainer_of(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    finally:
        ended(process)


def free(directory):
    """Whether another process could write there."""
    return taking(directory, "print('taken')").communicate()[0] == b"taken\n"


def test_a_trainer_holds_the_lock_until_train_ends(tmp_path):
    trainer = trainer_of(tmp_path)
    assert not free(tmp_path)
    trainer.train()
    assert free(tmp_path)
    process = holder(tmp_path)
    try:
        with pytest.raises(BlockingIOError):
            trainer.train()
    finally:
        ended(process)


def test_a_trainer_that_could_not_be_made_or_failed_has_no_lock(tmp_path):
    trainer_of(tmp_path).train()
    with pytest.raises(ValueError, match="was trained with batch_size 4, not 8"):
        trainer_of(tmp_path, resume=True, batch_size=8)
    failing = trainer_of(tmp_path, resume=True, max_steps=4)
    failing._take_step = lambda batches: 1 / 0
    with pytest.raises(ZeroDivisionError):
        failing.train()
    assert free(tmp_path)


def test_a_process_does_not_keep_itself_out(tmp_path):
    first = trainer_of(tmp_path)
    second = trainer_of(tmp_path, resume=True)  # a cell of a notebook, run once more
    second.train()
    assert first.step == 0 and free(tmp_path)


def test_a_worker_that_outlives_its_killed_parent_does_not_keep_the_lock(tmp_path):
    """A child that is forked has its parent's locks, and a DataLoader's workers are."""
    process = holder(tmp_path, "os.fork() or print(os.getpid(), flush=True); time.sleep(600)")
    child = int(process.stdout.readline())
    try:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        os.kill(child, 0)  # it lives
        take_lock(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        ended(process)
        release_lock(tmp_path)


def test_readers_of_a_run_that_is_being_written_are_not_refused(run, text, tmp_path):
    process = holder(run)
    try:
        assert evaluate(["--checkpoint", str(run / "last")]) == 0
        assert sample(["--checkpoint", str(run / "best"), "--prompt", "When", "--max-new-tokens", "3"]) == 0
        assert hugging_face(["export", str(run / "best"), str(tmp_path / "exported")]) == 0
        other = ["--max-steps", "1", "--out-dir", str(tmp_path / "other")]
        assert main(["--init-from", str(run / "last"), "--data", text, *FAST[-8:], *other]) == 0
    finally:
        ended(process)


def test_all_processes_of_a_run_stop_if_the_first_may_not_write(run, monkeypatch):
    """By themselves: torchrun, which would end the others, is not there."""
    process = holder(run)
    with socket.socket() as free_port:
        free_port.bind(("localhost", 0))
        port = free_port.getsockname()[1]
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    both = []
    try:
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            both.append(start("--resume", "--parallel", "ddp", "--out-dir", str(run), "--max-steps", "4"))
        (shown, line), (nothing, silence) = (one.communicate(timeout=60) for one in both)
    finally:
        for one in (process, *both):
            ended(one)
    assert [one.returncode for one in both] == [2, 2] and (shown, nothing, silence) == ("", "", "")
    assert f"run directory {run} is being written by process {process.pid}" in line and line.count("\n") == 1


def test_without_file_locks_everything_works_and_nobody_is_refused(tmp_path, monkeypatch):
    process = holder(tmp_path)
    try:
        monkeypatch.setattr(train.lock, "fcntl", None)  # as on Windows
        trainer_of(tmp_path).train()
        with train.lock.only_one(tmp_path / "tokens.lock"):
            pass
    finally:
        ended(process)


def test_a_file_system_without_such_locks_is_no_error(tmp_path, monkeypatch):
    def not_here(descriptor, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(train.lock.fcntl, "flock", not_here)
    trainer_of(tmp_path).train()
    assert (tmp_path / "last").exists()

"""A run that was stopped and resumed ends in the same weights, losses and files as one that was not."""

import contextlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill_and_resume import kill_and_resume, start, steps_of, wait_for

from model import GPT, GPTConfig, from_pretrained
from train import CharDataset, Trainer, TrainerConfig
from train.__main__ import main
from train.checkpoint import checkpoints, damage

ROOT = Path(__file__).parents[2]
TEXT = "When are you going? I am going to the play, and you are coming to the play with me. " * 20
SIZES = {"context_length": 16, "window": 8, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_model": 32}
MODEL = (
    "--context-size",
    "16",
    "--window",
    "8",
    "--n-layer",
    "1",
    "--n-head",
    "2",
    "--n-kv-head",
    "1",
    "--d-model",
    "16",
)
FAST = (*MODEL, "--batch-size", "2", "--device", "cpu", "--eval-examples", "4", "--sample-tokens", "4")

pytestmark = pytest.mark.filterwarnings("ignore:dropout")


def trainer_of(out_dir, dropout=0.1, seed=0, **settings):
    train_set = CharDataset(TEXT[:1500], block_size=16)
    held_out = CharDataset(TEXT[1500:], block_size=16, tokenizer=train_set.tokenizer)
    # the resumed trainer's model has other weights, so the right ones must come from the checkpoint
    model = GPT(GPTConfig(vocab_size=train_set.vocab_size, dropout=dropout, **SIZES), seed=seed)
    settings = {"max_steps": 20, "batch_size": 4, "log_every": 3, "eval_every": 14, "save_every": 4} | settings
    settings |= {"device": "cpu", "out_dir": out_dir, "eval_examples": 8, "learning_rate": 1e-2, "sample_tokens": 4}
    config = TrainerConfig(**settings)
    return Trainer(model, train_set, held_out, config)


def stop_at(trainer, step, error=None):
    """Has the trainer stop at the end of a step: by Ctrl-C, or by an error that nobody catches, as a kill would."""
    take_step = trainer._take_step

    def take_step_and_stop(batches):
        take_step(batches)
        if trainer.step == step and error is not None:
            raise error
        if trainer.step == step:
            signal.raise_signal(signal.SIGINT)

    trainer._take_step = take_step_and_stop
    with contextlib.nullcontext() if error is None else pytest.raises(type(error)):
        trainer.train()


def measured(run):
    """metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def assert_same_end(run, other):
    for name in ("best", "last"):
        state, expected = (from_pretrained(directory / name)[0].state_dict() for directory in (run, other))
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    optimizers = [torch.load(path / "last" / "training_state.pt")["optimizer"]["state"] for path in (run, other)]
    for name, state in optimizers[1].items():
        assert all(torch.equal(optimizers[0][name][key], value) for key, value in state.items())
    assert measured(run) == measured(other)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    trainer_of(run).train()
    return run


@pytest.mark.parametrize("error", [None, RuntimeError("killed")], ids=["ctrl-c", "killed"])
@pytest.mark.parametrize("step", [5, 12, 19])
def test_resume_is_bit_exact(unbroken, tmp_path, step, error):
    stop_at(trainer_of(tmp_path / "run"), step, error)
    resumed = trainer_of(tmp_path / "run", seed=7 if error is None else 0, resume=True)
    assert resumed.step == (step if error is None else (step - 1) // 4 * 4)  # killed before that step was saved
    torch.rand(13)
    resumed.train()
    assert_same_end(tmp_path / "run", unbroken)


def test_resume_is_bit_exact_with_muon_accumulation_an_average_and_another_schedule(tmp_path):
    settings = {"optimizer": "muon", "schedule": "wsd", "grad_accumulation": 2, "ema_decay": 0.9}
    trainer_of(tmp_path / "whole", **settings).train()
    stop_at(trainer_of(tmp_path / "run", **settings), 7)
    trainer_of(tmp_path / "run", resume=True, **settings).train()
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_resume_before_the_first_checkpoint_begins_again(unbroken, tmp_path):
    stop_at(trainer_of(tmp_path / "run"), 3, RuntimeError("killed"))
    resumed = trainer_of(tmp_path / "run", resume=True)
    assert resumed.step == 0 and resumed.resumed_from is None
    resumed.train()
    assert_same_end(tmp_path / "run", unbroken)


def test_stopping_after_every_step_changes_nothing(unbroken, tmp_path):
    stop_at(trainer_of(tmp_path / "run"), 1)
    for step in range(2, 20):
        stop_at(trainer_of(tmp_path / "run", resume=True), step)
    trainer_of(tmp_path / "run", resume=True).train()
    assert_same_end(tmp_path / "run", unbroken)
    assert [entry["step"] for entry in json.loads((tmp_path / "run" / "run.json").read_text())["resumed"]] == [
        *range(1, 20)
    ]


def test_a_finished_run_does_nothing_and_continues_with_more_steps(tmp_path):
    trainer_of(tmp_path / "run").train()
    before = (tmp_path / "run" / "last" / "SHA256SUMS").read_bytes()
    trainer_of(tmp_path / "run", resume=True).train()
    assert (tmp_path / "run" / "last" / "SHA256SUMS").read_bytes() == before
    longer = trainer_of(tmp_path / "run", resume=True, max_steps=26)
    longer.train()
    assert (longer.step, measured(tmp_path / "run")[-1]["step"]) == (26, 26)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["trainer"]["max_steps"] == 26


def test_only_the_newest_checkpoints_are_kept_and_last_is_the_newest(tmp_path):
    trainer_of(tmp_path / "run", keep_checkpoints=3).train()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000012", "step-000016", "step-000020"]
    assert (tmp_path / "run" / "last").resolve().name == "step-000020"
    trainer_of(tmp_path / "one", keep_checkpoints=1).train()
    assert [path.name for path in checkpoints(tmp_path / "one")] == ["step-000020"]


def test_a_truncated_checkpoint_is_never_loaded_but_the_one_before_it_is(tmp_path):
    trainer_of(tmp_path / "run").train()
    before, newest = checkpoints(tmp_path / "run")
    whole = {path: path.read_bytes() for path in newest.iterdir()}
    draw = random.Random(0)
    for _ in range(200):
        path = draw.choice(list(whole))
        path.write_bytes(whole[path][: draw.randrange(len(whole[path]))])
        assert damage(newest) is not None, path
        path.write_bytes(whole[path])
    assert damage(newest) is None
    (newest / "model.safetensors").write_bytes(whole[newest / "model.safetensors"][:-5])
    with pytest.warns(UserWarning, match="step-000020/model.safetensors is not what was written: going back"):
        resumed = trainer_of(tmp_path / "run", resume=True)
    assert resumed.step == 16 and resumed.resumed_from == before


def test_any_flipped_bit_and_any_missing_file_is_damage(tmp_path):
    trainer_of(tmp_path / "run").train()
    newest = tmp_path / "run" / "last"
    for path in newest.iterdir():
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 4
        path.write_bytes(flipped)
        assert damage(newest) is not None
        path.unlink()
        assert damage(newest) is not None
        path.write_bytes(content)
    (newest / "SHA256SUMS").write_text("".join((newest / "SHA256SUMS").read_text().splitlines(True)[:2]))
    assert damage(newest) == f"{newest / 'SHA256SUMS'} is damaged"


def test_a_run_with_a_damaged_checkpoint_resumes_to_the_same_end(unbroken, tmp_path):
    stop_at(trainer_of(tmp_path / "run"), 14, RuntimeError("killed"))
    (tmp_path / "run" / "last" / "training_state.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="step-000012/training_state.pt is not what was written"):
        resumed = trainer_of(tmp_path / "run", resume=True)
    assert resumed.step == 8
    resumed.train()
    assert_same_end(tmp_path / "run", unbroken)


def test_with_no_whole_checkpoint_resuming_is_refused_and_nothing_is_overwritten(tmp_path):
    trainer_of(tmp_path / "run").train()
    for checkpoint in checkpoints(tmp_path / "run"):
        (checkpoint / "config.json").unlink()
    before = contents(tmp_path / "run")
    with (
        pytest.warns(UserWarning, match="going back"),
        pytest.raises(ValueError, match=r"all checkpoints in .* are damaged"),
    ):
        trainer_of(tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before


def test_a_process_that_died_while_it_replaced_the_best_weights_loses_neither(tmp_path):
    trainer_of(tmp_path / "run").train()
    (tmp_path / "run" / "best").rename(tmp_path / "run" / ".best.previous")
    shutil.copytree(tmp_path / "run" / "last", tmp_path / "run" / "checkpoints" / ".step-000024.partial")
    trainer_of(tmp_path / "run", resume=True).train()
    assert from_pretrained(tmp_path / "run" / "best") and not (tmp_path / "run" / ".best.previous").exists()


def test_half_a_line_of_metrics_is_dropped_and_later_ones_come_again(tmp_path):
    stop_at(trainer_of(tmp_path / "run"), 11, RuntimeError("killed"))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "lo')
    assert measured_steps(trainer_of(tmp_path / "run", resume=True)) == [0, 3, 4, 6, 8]


def measured_steps(trainer):
    return [line["step"] for line in trainer.history.lines]


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 8, "max_steps": 99}, "was trained with batch_size 4, not 8: change it back"),
        ({"weight_decay": 0.2, "grad_clip": None}, "weight_decay 0.1, not 0.2; grad_clip 1.0, not None: change"),
        ({"dropout": 0.0}, "was trained with dropout 0.1, not 0.0: change it back"),
    ],
)
def test_another_configuration_is_refused_by_its_fields(tmp_path, settings, message):
    trainer_of(tmp_path / "run", max_steps=4).train()
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path / "run", resume=True, **settings)
    assert contents(tmp_path / "run") == before


def test_resume_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="resume needs a run directory: name it with --out-dir"):
        trainer_of(None, resume=True)
    with pytest.raises(FileNotFoundError, match="holds no run to resume: leave out --resume to start one"):
        trainer_of(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1
    return shown.err


def test_the_command_resumes_with_the_settings_of_then(text, tmp_path, capsys):
    for out, steps in (("whole", "9"), ("run", "5")):
        assert main([*FAST, "--data", text, "--max-steps", steps, "--warmup-steps", "2", "--no-lr-decay",
                     "--betas", "0.8", "0.9", "--out-dir", str(tmp_path / out)]) == 0  # fmt: skip
    capsys.readouterr()
    assert main(["--resume", "--out-dir", str(tmp_path / "run"), "--max_steps", "9", "--betas", "0.8", "0.9"]) == 0
    shown = capsys.readouterr().out
    assert "step-000005, step 5 of 9" in shown and "9 steps of 32 tokens" in shown
    found, whole = (from_pretrained(tmp_path / out / "last")[0].state_dict() for out in ("run", "whole"))
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_model_trained_on_and_a_drawn_one_resume_from_the_beginning_as_well(text, tmp_path):
    assert main([*FAST, "--data", text, "--max-steps", "1", "--out-dir", str(tmp_path / "first")]) == 0
    start_from = ("--init-from", str(tmp_path / "first"), "--window", "5", *FAST[-8:])
    drawn = ("--random-config", "--seed", "3", "--context-size", "8", *FAST[-8:])
    for name, flags in (("on", start_from), ("drawn", drawn)):
        out = tmp_path / name
        assert main([*flags, "--data", text, "--max-steps", "2", "--out-dir", str(out)]) == 0
        expected = from_pretrained(out / "last")[0]
        for path in ("last", "checkpoints", "best"):
            shutil.rmtree(out / path) if (out / path).is_dir() and path != "last" else (out / path).unlink()
        assert main(["--resume", "--out-dir", str(out)]) == 0
        again = from_pretrained(out / "last")[0]
        assert again.config == expected.config
        assert all(torch.equal(again.state_dict()[key], value) for key, value in expected.state_dict().items())


def test_the_command_refuses_other_settings_and_other_data_in_one_line(text, tmp_path, capsys):
    out = str(tmp_path / "run")
    main([*FAST, "--data", text, "--max-steps", "2", "--learning-rate", "0.5", "--out-dir", out])
    capsys.readouterr()
    before = contents(tmp_path / "run")
    resume = ("--resume", "--out-dir", out)
    line = refused(capsys, *resume, "--learning-rate", "1", "--n-layer", "2", "--seed", "0")
    assert f"{out} was trained with n_layer 1, not 2; learning_rate 0.5, not 1.0: change" in line
    (tmp_path / "other.txt").write_text(TEXT.replace("play", "\u00fcber"))
    message = "is not the text this run was made with (1,680 characters then, 1,6"
    assert f"other.txt {message}" in refused(capsys, *resume, "--data", str(tmp_path / "other.txt"))
    (tmp_path / "text.txt").write_text(TEXT + "!")
    assert f"text.txt {message}" in refused(capsys, *resume)
    (tmp_path / "text.txt").unlink()
    assert "does not exist" in refused(capsys, *resume)
    assert contents(tmp_path / "run") == before
    assert "holds no run to resume" in refused(capsys, "--resume", "--out-dir", str(tmp_path / "elsewhere"))
    assert "name it with --out-dir" in refused(capsys, "--resume")
    (tmp_path / "run" / "run.json").write_text("{")
    assert "run.json is damaged" in refused(capsys, *resume)


def test_a_text_that_moved_is_the_same_text(text, tmp_path, monkeypatch):
    out = str(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    main([*FAST, "--data", "text.txt", "--val-data", "text.txt", "--max-steps", "2", "--out-dir", out])
    monkeypatch.chdir("/")
    assert main(["--resume", "--out-dir", out]) == 0
    moved = str(Path(text).rename(tmp_path / "moved.txt"))
    assert main(["--resume", "--out-dir", out, "--data", moved, "--val-data", moved, "--max-steps", "3"]) == 0


def test_killed_at_random_times_and_resumed_it_ends_in_the_same_weights(tmp_path):
    """The 20 kills in 2,000 steps of docs/training.md, in small."""
    result = kill_and_resume(tmp_path, steps=120, kills=3, seed=1)
    assert result["identical"] and result["left_over"] == [] and len(result["resumed_from"]) == 3


def test_sigterm_saves_and_exits_0(text, tmp_path):
    run = tmp_path / "run"
    process = start(*FAST, "--data", text, "--max-steps", "1000000", "--out-dir", str(run), "--log-every", "1")
    try:
        wait_for(lambda: steps_of(run) > 3, process)
        process.terminate()
        shown, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in errors
    step = json.loads((run / "last" / "training.json").read_text())["step"]
    assert f"stopped at step {step:,} of 1,000,000" in shown and f"python -m train --resume --out-dir {run}" in shown


def test_a_second_sigterm_ends_at_once():
    code = """
import signal
from train.trainer import StopRequest
with StopRequest() as stop:
    signal.raise_signal(signal.SIGTERM)
    print("first", stop.requested, flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("second")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "first True\n")


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before_it(text, tmp_path):
    """A limit on the size of a file stands for the disk: writing past it fails in the same place."""
    run = tmp_path / "run"
    # wide enough for a training state that is larger than loss.png
    assert main([*FAST, "--d-model", "64", "--data", text, "--max-steps", "2", "--out-dir", str(run)]) == 0
    before = contents(run / "checkpoints")
    size = (run / "last" / "training_state.pt").stat().st_size

    def little_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, size - 1000))

    process = start("--resume", "--out-dir", str(run), "--max-steps", "3", preexec_fn=little_room)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in errors
    said = f"run failed: {run}/checkpoints/step-000003 cannot be written: File too large; fix that, and --resume"
    assert f"{said} continues from {run}/checkpoints/step-000002, which is intact" in errors.splitlines()[-1]
    assert contents(run / "checkpoints") == before and damage(run / "last") is None

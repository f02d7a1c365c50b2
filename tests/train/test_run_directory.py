"""Nothing of a user's is lost: a run writes into an empty directory or its own, and deletes only what it wrote."""

import json
import os
import shutil
import signal

import pytest
from kill_and_resume import TEXT, start, steps_of, wait_for
from test_resume import contents

from model import GPT, GPTConfig, from_pretrained, save_pretrained
from model.checkpoint import checksums
from train import CharDataset, Trainer, TrainerConfig, TrainingFailed
from train.__main__ import main
from train.checkpoint import save_checkpoint
from train.evaluate import main as evaluate
from train.run_directory import checkpoints

SIZES = "--context-size 16 --window 8 --n-layer 1 --n-head 2 --n-kv-head 1 --d-model 16 --batch-size 2 --device cpu"
FAST = [*SIZES.split(), "--eval-examples", "4", "--sample-tokens", "0"]
TRAIN_ON = ["--device", "cpu", "--batch-size", "2", "--max-steps", "2", "--sample-tokens", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A text and a run of 4 steps; never written to."""
    directory = tmp_path_factory.mktemp("trained")
    (directory / "text.txt").write_text(TEXT)
    text = ["--data", str(directory / "text.txt")]
    assert main([*FAST, *text, "--max-steps", "4", "--save-every", "2", "--out-dir", str(directory / "run")]) == 0
    return directory


@pytest.fixture
def text(trained):
    return str(trained / "text.txt")


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def refused(capsys, out, *arguments, status=2):
    """The one line with which the command refuses; every file of the directory stays as it was."""
    before = contents(out) if out.is_dir() else None
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out-dir", str(out)])
    shown = capsys.readouterr()
    assert stopped.value.code == status and shown.out == "" and shown.err.count("\n") == 1, shown.err
    assert before is None or contents(out) == before
    assert "leave out --resume" not in shown.err or not any(out.rglob("*"))
    return shown.err


def started(capsys, out, text):
    """The line of a new run that is refused."""
    return refused(capsys, out, *FAST, "--data", text)


def resumed(capsys, out, *arguments):
    return refused(capsys, out, "--resume", "--max-steps", "6", *arguments)


def put(path, content="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.mark.parametrize(
    "files", [["best/thesis.txt", "last"], ["checkpoints/step-000004/model.safetensors"], ["metrics.jsonl"], ["a/b"]]
)
def test_a_run_does_not_begin_where_something_is(tmp_path, text, capsys, files):
    for file in files:
        put(tmp_path / "m" / file)
    assert "m is not empty: it has " in started(capsys, tmp_path / "m", text)
    with pytest.raises(FileExistsError, match="is not empty"):
        trainer_of(tmp_path / "m")


def test_a_link_to_a_full_directory_is_not_empty_and_one_to_nowhere_is_no_directory(tmp_path, text, capsys):
    put(tmp_path / "full" / "file")
    (tmp_path / "link").symlink_to("full")
    (tmp_path / "nowhere").symlink_to("gone")
    assert "link is not empty: it has file" in started(capsys, tmp_path / "link", text)
    assert "nowhere cannot be written: File exists" in started(capsys, tmp_path / "nowhere", text)
    assert not (tmp_path / "gone").exists()


def test_a_file_in_place_of_a_folder_and_a_parent_without_rights(tmp_path, text, capsys, monkeypatch):
    put(tmp_path / "file")
    assert "file cannot be written: Not a directory" in started(capsys, tmp_path / "file", text)
    assert "file/run cannot be written: Not a directory" in started(capsys, tmp_path / "file" / "run", text)
    assert (tmp_path / "file").read_text() == "mine"

    def denied(*arguments, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", denied)
    assert "run cannot be written: Permission denied" in started(capsys, tmp_path / "run", text)
    monkeypatch.setattr(os, "listdir", denied)
    assert "cannot be written: Permission denied" in started(capsys, tmp_path, text)


def test_the_lock_of_a_run_that_did_not_begin_is_nothing_but_a_link_in_its_place_is(tmp_path, text, capsys):
    put(tmp_path / "thesis.txt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "thesis.txt")
    assert ".lock is not the regular file that a run writes: rename it" in started(capsys, tmp_path / "run", text)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    (tmp_path / "run" / ".lock").unlink()
    put(tmp_path / "run" / ".lock", "")
    assert main([*FAST, "--data", text, "--max-steps", "1", "--out-dir", str(tmp_path / "run")]) == 0


def test_without_run_json_nothing_is_lost_and_its_content_is_named(run, text, capsys):
    (run / "run.json").rename(run.parent / "run.json")
    line = resumed(capsys, run)
    assert "run.json is missing: put it back" in line and "step-000002/training.json has its content" in line
    assert "run is not empty" in started(capsys, run, text)  # the second command of docs/training.md's job script
    stored = json.loads((run / "checkpoints" / "step-000002" / "training.json").read_text())["run"]
    (run / "run.json").write_text(json.dumps(stored))
    assert main(["--resume", "--max-steps", "6", "--out-dir", str(run)]) == 0


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(run, capsys):
    shutil.rmtree(run / "checkpoints")
    assert "the checkpoints of" in resumed(capsys, run) and from_pretrained(run / "best")
    (run / "last").unlink()
    assert "are gone: put them back, or train on from a model" in resumed(capsys, run)


def test_a_run_killed_before_its_first_checkpoint_keeps_its_best_weights_until_it_has_better_ones(run):
    """Its best loss, here a very good one, is that of step 1."""
    shutil.rmtree(run / "checkpoints")
    (run / "last").unlink()
    model, tokenizer = from_pretrained(run / "best")
    save_checkpoint(run / "best", model, tokenizer, {"step": 1, "best_held_out_loss": 0.1})
    before = contents(run / "best")
    assert main(["--resume", "--out-dir", str(run)]) == 0
    assert contents(run / "best") == before and checkpoints(run)[-1].name == "step-000004"


@pytest.mark.parametrize("load", ["--init-from", "evaluate", "--resume"])
def test_a_flipped_byte_is_not_loaded(run, text, capsys, load):
    for directory in (run / "best", *checkpoints(run)):
        weights = bytearray((directory / "model.safetensors").read_bytes())
        weights[len(weights) // 2] ^= 1
        (directory / "model.safetensors").write_bytes(weights)
    if load == "--resume":
        line = resumed(capsys, run)
        assert "all checkpoints in" in line and "remove SHA256SUMS" not in line  # without it none could be resumed
        return
    with pytest.raises(SystemExit) as stopped:
        evaluate(["--checkpoint", str(run)]) if load == "evaluate" else main([load, str(run), "--data", text])
    assert stopped.value.code == 2
    assert "best/model.safetensors is not what was written" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_ours_to_read_is_not_damaged_and_stays(run, capsys, monkeypatch):
    def denied(files):
        path = next(iter(files.values()))
        if "step-000004" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return checksums(files)

    monkeypatch.setattr("model.checkpoint.checksums", denied)
    line = resumed(capsys, run)
    assert "step-000004/config.json cannot be read: Permission denied" in line and "damaged" not in line


@pytest.mark.parametrize("where", ["best", "checkpoints/step-000002", "checkpoints/step-000004", "checkpoints", ""])
def test_a_users_files_in_a_run_stay(run, where):
    put(run / where / "thesis.txt")
    put(run / where / "notes" / "thesis.txt")
    assert main(["--resume", "--max-steps", "8", "--eval-every", "1", "--out-dir", str(run)]) == 0
    assert [path.name for path in checkpoints(run)] == ["step-000006", "step-000008"]
    assert (run / where / "thesis.txt").read_text() == (run / where / "notes" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in (run / where).glob("*.safetensors")) == (
        ["model.safetensors"] if where == "best" else []
    )


@pytest.mark.parametrize("name", ["best", "checkpoints", "last", "metrics.jsonl", "loss.png", "tensorboard", ".lock"])
@pytest.mark.parametrize("stands", ["a link", "a file or folder"])
def test_what_a_run_does_not_write_under_its_names_is_refused_and_left(run, trained, capsys, name, stands):
    if (run / name).is_dir() and not (run / name).is_symlink():
        shutil.rmtree(run / name)
    else:
        (run / name).unlink(missing_ok=True)
    if stands == "a link":
        (run / name).symlink_to(trained / "run" / ("best" if name in ("best", "last") else name))
    elif name in ("best", "checkpoints", "tensorboard"):
        put(run / name)
    else:
        put(run / name / "thesis.txt")
    before = contents(trained)
    assert f"{name} is not the " in resumed(capsys, run) and contents(trained) == before


def test_a_link_in_place_of_a_checkpoint_is_not_followed_when_old_ones_are_deleted(run, trained):
    shutil.rmtree(run / "checkpoints" / "step-000002")
    (run / "checkpoints" / "step-000002").symlink_to(trained / "run" / "checkpoints" / "step-000002")
    before = contents(trained)
    assert main(["--resume", "--max-steps", "8", "--out-dir", str(run)]) == 0
    assert contents(trained) == before and (run / "checkpoints" / "step-000002").is_symlink()


def test_a_run_that_moved_or_was_copied_resumes(run, tmp_path, capsys):
    shutil.move(run, tmp_path / "deep" / "er")
    assert main(["--resume", "--max-steps", "5", "--out-dir", str(tmp_path / "deep" / "er")]) == 0
    shutil.copytree(tmp_path / "deep" / "er", tmp_path / "copy")  # which makes a directory of the link `last`
    assert "copy/last is not the link that a run writes: rename it" in resumed(capsys, tmp_path / "copy")
    (tmp_path / "copy" / "last").rename(tmp_path / "copy" / "last-of-then")
    assert main(["--resume", "--max-steps", "6", "--out-dir", str(tmp_path / "copy")]) == 0


def test_a_run_of_an_older_version_resumes(run):
    """Its run.json has neither the fields that came later nor those of the command."""
    record = json.loads((run / "run.json").read_text())
    for name in ("save_every_minutes", "ema_decay", "final_fraction"):
        del record["trainer"][name]
    del record["stated"], record["versions"]
    record["run"]["fused_kernels"] = False  # the default of then
    (run / "run.json").write_text(json.dumps(record))
    assert main(["--resume", "--max-steps", "6", "--out-dir", str(run)]) == 0


WRONG = {
    "[]": "run.json is damaged: it has no fields",
    "{": "run.json is damaged: ",
    "{}": "run.json is damaged, or not of a run",
    '{"name": "my sprint", "trainer": "Ann"}': "run.json is damaged, or not of a run",
    '{"trainer": {"batch_size": "four"}}': "run.json is damaged: its batch_size is 'four'",
    '{"trainer": {}, "data": {"source": 5}}': "source of data, sha256 of data, characters of data cannot be used",
    '{"trainer": {}, "run": [], "resumed": 3}': "run.json is damaged: run, resumed cannot be used",
    '{"trainer": {"betas": [0.9, "x"]}}': "run.json is damaged: its betas is [0.9, 'x']",
}


@pytest.mark.parametrize("content", WRONG)
def test_a_record_that_no_run_wrote_is_named(run, capsys, content):
    put(run / "run.json", content)
    assert WRONG[content] in resumed(capsys, run)


@pytest.mark.parametrize("line", ["[1]", "garbage", '{"loss": 1.0}', '{"step": "x"}', "\x00"])
def test_a_line_of_metrics_that_no_run_wrote_is_named(run, capsys, line):
    put(run / "metrics.jsonl", line + "\n" + (run / "metrics.jsonl").read_text())
    assert "metrics.jsonl is damaged in line 1: mend it, or move it elsewhere" in resumed(capsys, run)


def trainer_of(out_dir, model=None, **settings):
    dataset = CharDataset(TEXT, block_size=16)
    sizes = {"context_length": 16, "n_layer": 1, "n_head": 1, "d_model": 8}
    model = model or GPT(GPTConfig(vocab_size=dataset.vocab_size, **sizes), seed=0)
    settings = {"max_steps": 4, "sample_tokens": 0, "eval_examples": 2, "batch_size": 2, "device": "cpu"} | settings
    return Trainer(model, dataset, dataset, TrainerConfig(**settings, out_dir=out_dir))


def test_a_run_that_fails_before_a_step_leaves_the_directory_for_the_next_try(tmp_path, text, capsys, monkeypatch):
    trainer = trainer_of(tmp_path / "run", tensorboard=False)
    trainer._take_step = lambda batches: [][0]
    with pytest.raises(IndexError):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    arguments = [*FAST, "--data", text, "--max-steps", "1", "--out-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main([*arguments, "--batch-size", str(10**9)])
    assert "the run needs about" in capsys.readouterr().err
    assert main(arguments) == 0


def test_a_trainer_that_fails_does_not_empty_the_directory_that_another_has_continued(tmp_path):
    first = trainer_of(tmp_path / "run")
    trainer_of(tmp_path / "run", resume=True).train()
    first._take_step = lambda batches: [][0]
    before = contents(tmp_path / "run" / "checkpoints")
    with pytest.raises(IndexError):
        first.train()
    assert before and contents(tmp_path / "run" / "checkpoints") == before


def test_a_run_that_fails_later_keeps_what_it_has(tmp_path):
    trainer = trainer_of(tmp_path / "run", save_every=1)
    take_step = trainer._take_step
    trainer._take_step = lambda batches: take_step(batches) if trainer.step < 2 else [][0]
    with pytest.raises(IndexError):
        trainer.train()
    assert (tmp_path / "run" / "last" / "training_state.pt").exists()


def test_checkpoints_come_by_time_too_and_change_no_line_of_metrics(tmp_path):
    for name, minutes in (("time", 1e-9), ("steps", None)):
        trainer_of(tmp_path / name, save_every_minutes=minutes, log_every=3, keep_checkpoints=9).train()
    found = {name: [path.name[-1] for path in checkpoints(tmp_path / name)] for name in ("time", "steps")}
    assert found == {"time": ["1", "2", "3", "4"], "steps": ["4"]}
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in found]
    assert [json.loads(line)["step"] for line in lines[0]] == [json.loads(line)["step"] for line in lines[1]]
    with pytest.raises(ValueError, match="save_every_minutes is 0, wanted a number above 0"):
        TrainerConfig(save_every_minutes=0)


def test_a_closed_terminal_is_a_sigterm_but_not_under_nohup(text, tmp_path):
    endless = [*FAST, "--data", text, "--max-steps", "1000000", "--log-every", "1"]
    for name, ignore in (("run", None), ("nohup", lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))):
        process = start(*endless, "--out-dir", str(tmp_path / name), preexec_fn=ignore)
        try:
            wait_for(lambda name=name: steps_of(tmp_path / name) > 3, process)
            process.send_signal(signal.SIGHUP)
            if ignore:
                steps = steps_of(tmp_path / name)
                wait_for(lambda name=name, steps=steps: steps_of(tmp_path / name) > steps + 20, process)
                process.terminate()
            shown, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0 and "Traceback" not in errors and "stopped at step" in shown


def test_the_best_of_a_fine_tune_is_the_model_itself_until_there_is_a_better_one(trained, text, tmp_path, capsys):
    out = str(tmp_path / "worse")
    flags = ["--init-from", str(trained / "run"), "--data", text, *TRAIN_ON]
    assert main([*flags, "--learning-rate", "1", "--out-dir", out]) == 0
    shown = capsys.readouterr().out
    assert shown.count("best so far") == 1 and "step      0" in shown.split("best so far")[0].splitlines()[-1]
    before, found = (from_pretrained(directory)[0].state_dict() for directory in (trained / "run/best", f"{out}/best"))
    assert all((found[name] == before[name]).all() for name in before)


@pytest.mark.parametrize("held_out", [True, False])
def test_a_diverged_run_is_one_line_that_says_when_and_what_is_intact(tmp_path, held_out):
    settings = {"learning_rate": 1e30, "warmup_steps": 3, "eval_every": 1, "save_every": 1, "grad_clip": None}
    trainer = trainer_of(tmp_path / "run", **settings, sample_tokens=5)
    trainer.held_out_dataset = trainer.held_out_dataset if held_out else None
    with pytest.raises(TrainingFailed, match=r"^the run diverged: the .*loss at step \d is (nan|inf): lower learn.*$"):
        trainer.train()
    again = trainer_of(tmp_path / "late", **settings | {"learning_rate": 1e-3, "max_steps": 3})
    take_step = again._take_step

    def break_at_2(batches):
        take_step(batches)
        if again.step == 2:
            again.model.ln_f.weight.data.fill_(float("nan"))

    again._take_step = break_at_2
    with pytest.raises(
        TrainingFailed, match=r"at step 2 is nan: .*late/best is intact: go on from it with --init-from"
    ):
        again.train()
    assert checkpoints(tmp_path / "late")[-1].name == "step-000001"


def test_a_save_of_a_loaded_model_into_its_directory_writes_the_checksums_again(run):
    model, tokenizer = from_pretrained(run / "best")
    save_pretrained(GPT(model.config, seed=5), run / "best", tokenizer)
    assert (from_pretrained(run / "best")[0].wte.weight != model.wte.weight).any()

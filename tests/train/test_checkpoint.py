"""A full disk: the run ends with one line, which names the file and the intact checkpoint, and no half file stays.

/dev/full, where every write finds no room, stands in the place of a file; a limit on the size of files stops a write in
its middle, as a disk does that fills up.
"""

import contextlib
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from kill_and_resume import TEXT
from test_resume import contents

from model import GPT, from_pretrained
from train.__main__ import main
from train.checkpoint import checkpoints, damage, save_checkpoint
from train.metrics import History

FULL = Path("/dev/full")
SIZES = "--context-size 16 --window 8 --n-layer 1 --n-head 2 --n-kv-head 1 --d-model 16 --batch-size 2 --device cpu"
FAST = [*SIZES.split(), "--eval-examples", "4", "--sample-tokens", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two checkpoints, steps 2 and 4; never written to."""
    directory = tmp_path_factory.mktemp("trained")
    (directory / "text.txt").write_text(TEXT)
    data = ["--data", str(directory / "text.txt")]
    out = ["--max-steps", "4", "--save-every", "2", "--out-dir", str(directory / "run")]
    assert main([*FAST, *data, *out]) == 0
    return directory / "run"


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@contextlib.contextmanager
def files_no_larger_than(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def full():
    """Stands in the place of a file."""
    if not FULL.exists():
        pytest.skip("the system has no /dev/full")
    return lambda path: path.symlink_to(FULL)


def names_what_is_left(line, path, checkpoint):
    expected = (
        f"{path} cannot be written: the disk is full; make room, and --resume continues from {checkpoint}, which is"
    )
    return expected in line and "Errno" not in line


@pytest.mark.parametrize(("name", "status"), [("run.json", 2), ("metrics.jsonl", 2), ("loss.png", 1)])
def test_the_command_names_the_file_the_reason_and_the_checkpoint_to_go_on_from(run, full, capsys, name, status):
    before = contents(run)
    full(run / f".{name}.tmp")  # where it is written, before it is renamed
    try:
        found = main(["--resume", "--out-dir", str(run), "--max-steps", "6"])
    except SystemExit as stopped:
        found = stopped.code
    error = capsys.readouterr().err.splitlines()[-1]
    assert found == status and names_what_is_left(error, run / name, run / "checkpoints" / "step-000004")
    after = contents(run)
    assert after.keys() == before.keys() and after[run / name] == before[run / name]
    assert main(["--resume", "--out-dir", str(run), "--max-steps", "6"]) == 0


def test_a_line_of_metrics_is_written_whole_or_not_at_all(run, full):
    before = (run / "metrics.jsonl").read_bytes()
    history = History(run)
    with files_no_larger_than(len(before) + 10), pytest.raises(OSError, match=r"metrics.jsonl cannot be .*: File too"):
        history.add(step=5, loss=1.0)
    assert (run / "metrics.jsonl").read_bytes() == before
    history.add(step=5, loss=1.0)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) == {"step": 5, "loss": 1.0}
    (run / "metrics.jsonl").unlink()
    full(run / "metrics.jsonl")
    with pytest.raises(OSError) as failed:
        history.add(step=6, loss=1.0)
    assert names_what_is_left(str(failed.value), run / "metrics.jsonl", run / "checkpoints" / "step-000004")


def test_a_checkpoint_that_is_damaged_is_not_called_intact(run, full):
    full(run / ".loss.png.tmp")
    (run / "last" / "training_state.pt").write_bytes(b"")
    with pytest.raises(OSError, match=r"--resume continues from .*step-000002, which is intact"):
        History(run).plot()
    shutil.rmtree(run / "checkpoints")
    full(run / ".loss.png.tmp")
    with pytest.raises(OSError, match=r"loss.png .* make room.* the beginning, as there is no checkpoint yet"):
        History(run).plot()


@pytest.mark.parametrize("cut", ["model.safetensors", "training_state.pt"])
def test_a_checkpoint_that_is_cut_short_leaves_nothing_and_the_reason_is_the_systems(run, cut):
    """Neither torch nor safetensors passes the system's error on."""
    before = contents(run)
    model, tokenizer = from_pretrained(run / "last")
    weights, state = model.state_dict(), None
    if cut == "training_state.pt":
        state = torch.zeros(50_000)
    else:
        weights = {name: tensor.repeat_interleave(9, 0) for name, tensor in weights.items()}
    with (
        files_no_larger_than(100_000),
        pytest.raises(
            OSError, match=r"step-000006 cannot be written: File too large; fix that, and --resume continues"
        ),
    ):
        save_checkpoint(run / "checkpoints" / "step-000006", model, tokenizer, {}, state, weights)
    assert contents(run) == before and damage(checkpoints(run)[-1]) is None


def test_the_best_weights_of_before_stay_where_the_new_ones_cannot_take_their_place(run, monkeypatch):
    rename = Path.rename

    def no_room(path, target):
        if path.name == ".best.partial":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", no_room)
    before = contents(run)
    model, tokenizer = from_pretrained(run / "best")
    with pytest.raises(
        OSError, match=r"best cannot be written: the disk is full; make room, and --resume continues from"
    ):
        save_checkpoint(run / "best", GPT(model.config, seed=1), tokenizer, {})
    assert contents(run) == before


def test_a_run_that_cannot_begin_leaves_no_record(full, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "run").mkdir()
    full(tmp_path / "run" / ".run.json.tmp")
    arguments = [*FAST, "--data", str(tmp_path / "text.txt"), "--max-steps", "1", "--out-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert f"run directory {tmp_path / 'run'} cannot be written: the disk is full" in capsys.readouterr().err
    assert main(arguments) == 0  # there is room again

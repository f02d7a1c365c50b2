"""A run directory and its checkpoints: how they are written, checked and resumed.

    runs/20260131-174500/
      run.json                  command, versions, data, settings of model and trainer, every resumption
      metrics.jsonl             one JSON object a line
      loss.png                  the curves: losses, learning rate, gradient norm
      tensorboard/              the same for TensorBoard, with --tensorboard
      best/                     the weights with the lowest held-out loss, a model directory:
        config.json model.safetensors tokenizer.json      model.from_pretrained reads these
        training.json                                     step, losses, and the content of run.json
        SHA256SUMS                                        checksums of all the others, for `sha256sum --check` too
      checkpoints/step-000500/  the same, and what a resumed run needs; the newest few (--keep-checkpoints):
        training_state.pt       optimizer state and the like; read it with torch.load(weights_only=True)
      last -> checkpoints/step-000500    the newest
      .lock                     held by the process that writes here (train/lock.py)

A checkpoint is written under another name, synced to the disk, and renamed: a checkpoint that has its name is complete.
Checksums show later damage. A resumed run takes the settings of run.json for all flags that the command line leaves
out; a stated flag must equal the recorded one, unless its field is declared with may_change.
"""

import argparse
import contextlib
import errno
import json
import os
import platform
import re
import shutil
import subprocess
import warnings
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from model import save_pretrained
from model.checkpoint import SUMS, WEIGHTS, CheckpointError, check_weights, checksums, replacing, sync, verify_sums

from .config import RunConfig, TrainerConfig
from .lock import take_lock

STATE, FACTS, RECORD = "training_state.pt", "training.json", "run.json"
_NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_MAY_CHANGE = {
    field.name for config in (TrainerConfig, RunConfig) for field in fields(config) if field.metadata["may_change"]
}


def open_run_directory(out_dir: str | Path, record: dict) -> None:
    """Makes the directory with `record` in its run.json, and takes its lock.

    Raises FileExistsError if it holds a run, OSError if nothing can be written; in one line.
    """
    path = Path(out_dir)
    try:
        if not (path / RECORD).exists():
            path.mkdir(parents=True, exist_ok=True)
            take_lock(path)
            if not (path / RECORD).exists():  # no other process began a run before we got the lock
                write_json(path / RECORD, record)
                return
    except OSError as error:
        if error.errno is None:  # the message is complete
            raise
        raise type(error)(f"run directory {out_dir} cannot be written: {_reason(error)}") from None
    raise FileExistsError(
        f"run directory {out_dir} holds a run already: choose another --out-dir, resume it with --resume, or remove it"
    )


@contextlib.contextmanager
def writing(path: Path, run_directory: Path, errors=OSError):
    """Turns an error inside the block into an OSError of one line: which file, why, and which checkpoint is intact."""
    try:
        yield
    except errors as error:
        reason = _reason(error)
        remedy = "make room" if reason in _NO_ROOM.values() else "fix that"
        intact = next((old for old in reversed(checkpoints(run_directory)) if damage(old) is None), None)
        start = "the beginning, as there is no checkpoint yet" if intact is None else f"{intact}, which is intact"
        raise OSError(f"{path} cannot be written: {reason}; {remedy}, and --resume continues from {start}") from error


def _reason(error) -> str:
    """Why something cannot be written, in a few words."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):  # of safetensors, which is Rust
        number = int(found[1])
    return _NO_ROOM.get(number) or (os.strerror(number) if number else str(error).splitlines()[0])


def versions() -> dict:
    """The versions that a run depends on, for its record."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "commit": _commit(),
    }


@lru_cache
def _commit() -> str | None:
    """The commit of the code, with "-dirty" if the code has changed since; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def checkpoints(run_directory: Path) -> list[Path]:
    """The checkpoints of a run that it could resume from, oldest first."""
    found = run_directory.glob("checkpoints/step-*")
    return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=_step)


def save_checkpoint(directory: Path, model, tokenizer, facts: dict, state: dict | None = None, weights=None) -> None:
    """Writes a model directory with training.json (`facts`), and training_state.pt (`state`) if it is given.

    weights: {name: tensor} to save instead of the model's own. An existing checkpoint is replaced as a whole. If
    anything fails, it stays as it was, nothing is left over, and the error is an OSError of one line.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    run_directory = directory.parents[1] if directory.parent.name == "checkpoints" else directory.parent
    shutil.rmtree(partial, ignore_errors=True)
    with writing(directory, run_directory, (OSError, RuntimeError, SafetensorError)):
        try:
            save_pretrained(model, partial, tokenizer=tokenizer, weights=weights)
            write_json(partial / FACTS, facts)
            if state is not None:
                with replacing(partial / STATE) as (file,):
                    _save_state(state, file)
            with replacing(partial / SUMS) as (file,):
                file.write_text(checksums({path.name: path for path in sorted(partial.iterdir()) if path != file}))
            _replace_directory(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _save_state(state, file):
    try:
        torch.save(state, file)
    except RuntimeError:  # "unexpected pos 576 vs 534": torch hides the system's error, so write once more to get it
        with open(file, "ab") as more:
            more.write(bytes(2**20))
        raise


def point_last_at(checkpoint: Path, keep: int) -> None:
    """Makes `last` a link to this new checkpoint, and removes all but the `keep` newest.

    Checkpoints of later steps go too: they are damaged, since the run resumed from an earlier one.
    """
    run_directory = checkpoint.parents[1]
    # one rename replaces a link; a directory would need two and be missing in between
    link = run_directory / ".last.partial"
    with writing(run_directory / "last", run_directory):
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.relative_to(run_directory))
        link.replace(run_directory / "last")
        sync(run_directory)
    others = [path for path in checkpoints(run_directory) if path != checkpoint]
    before = [path for path in others if _step(path) < _step(checkpoint)]
    kept = before[max(0, len(before) - (keep - 1)) :]
    for path in others:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint to resume from; None if every byte is as it was written."""
    try:
        return None if STATE in verify_sums(checkpoint) else f"{checkpoint / SUMS} is damaged"
    except CheckpointError as error:
        return str(error)


def read_facts(directory: str | Path) -> dict:
    """training.json of a checkpoint; empty for a model directory that the trainer did not write."""
    path = Path(directory) / FACTS
    return read_json(path) if path.exists() else {}


def read_json(path: Path) -> dict:
    """The content of a JSON file. Raises ValueError, in one line, if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file whole or not at all."""
    with replacing(path) as (file,):
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def finish_replacing(directory: Path) -> None:
    """Puts back a directory that a killed process had moved aside to replace it."""
    previous = _aside(directory)
    if previous.exists() and not directory.exists():
        previous.rename(directory)
    shutil.rmtree(previous, ignore_errors=True)


def _replace_directory(new: Path, directory: Path) -> None:
    # no rename can replace a directory: the old one moves aside, and survives if the process dies in between
    finish_replacing(directory)
    if directory.exists():
        directory.rename(_aside(directory))
    try:
        new.rename(directory)
        sync(directory.parent)
    finally:
        finish_replacing(directory)  # removes the old one, or puts it back if the rename failed


def _aside(directory):
    return directory.with_name(f".{directory.name}.previous")


def _step(checkpoint):
    return int(checkpoint.name.removeprefix("step-"))


def read_record(out_dir: str | Path) -> dict:
    """run.json of a run. Raises FileNotFoundError if there is none, ValueError if it is damaged."""
    path = Path(out_dir) / RECORD
    if not path.exists():
        raise FileNotFoundError(
            f"resume: run directory {out_dir} holds no run to resume: leave out --resume to start one"
        )
    return read_json(path)


def recall_flags(flags: argparse.Namespace, stated: set[str]) -> None:
    """Sets the flags that are not `stated` to the values that the run in flags.out_dir has recorded."""
    if flags.out_dir is None:
        return  # TrainerConfig says what is missing
    record = read_record(flags.out_dir)
    values = {**record.get("run", {}), **record.get("trainer", {})}
    # full paths of the texts, since the command may run in another directory now
    data = record.get("data", {})
    values |= {
        name: text["source"]
        for name, text in (("data", data), ("val_data", data.get("validation") or {}))
        if "source" in text
    }
    for name, value in values.items():
        if name not in stated and hasattr(flags, name):
            setattr(flags, name, value)


def checkpoint_to_resume(out_dir: str | Path, record: dict, lock: bool = False) -> Path | None:
    """The newest undamaged checkpoint of a run, with a warning for each newer one; None if it has none yet.

    record: what run.json would hold now. lock: take the directory's lock first; otherwise the disk is only read.
    Raises, in one line: ValueError if the settings of the record are not those of the run, or all checkpoints are
    damaged; FileNotFoundError if there is no run; BlockingIOError as `take_lock`.
    """
    before = read_record(out_dir)  # if there is no run, this raises before a lock file is made
    if lock:
        take_lock(out_dir)
        before = read_record(out_dir)  # another process may have changed it
    if changed := _differences(before, record):
        raise ValueError(f"resume: {out_dir} was trained with {'; '.join(changed)}: change it back, or start a new run")
    found = checkpoints(Path(out_dir))
    for checkpoint in reversed(found):
        what = damage(checkpoint)
        if what is None:
            return checkpoint
        warnings.warn(f"{what}: going back to the checkpoint before {checkpoint.name}", stacklevel=2)
    if found:
        raise ValueError(f"resume: all checkpoints in {out_dir} are damaged, so there is nothing to resume from")
    return None


def read_state(checkpoint: Path, model: torch.nn.Module) -> tuple[dict, dict]:
    """(weights, training state) of a checkpoint, on the CPU. Raises CheckpointError if they do not fit the model."""
    weights = load_file(checkpoint / WEIGHTS)
    check_weights(checkpoint / WEIGHTS, weights, model.state_dict())
    return weights, torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)


def _differences(before: dict, now: dict) -> list[str]:
    """`name before, not now` for every setting of a record that changed but may not."""
    now = json.loads(json.dumps(now))  # as a file returns it: tuples are lists
    found = []
    for section in ("run", "trainer", "model"):
        old, new = before.get(section, {}), now.get(section, {})
        found += [
            f"{name} {old[name]}, not {new[name]}"
            for name in new
            if name in old and old[name] != new[name] and name not in _MAY_CHANGE
        ]
    return found


def note_resumption(out_dir: Path, record: dict, step: int) -> dict:
    """Writes into run.json that the run resumes from `step`, and with which settings. Returns the new record.

    Changed settings replace the old ones, for the next resumption; the first command and versions stay.
    """
    before = read_record(out_dir)
    first = {name: before[name] for name in ("command", "versions") if name in before}
    resumed = {"step": step} | {name: record[name] for name in ("command", "versions") if name in record}
    record = {**before, **record, **first, "resumed": [*before.get("resumed", []), resumed]}
    with writing(out_dir / RECORD, out_dir):
        write_json(out_dir / RECORD, record)
    return record

"""A run directory: what is in it, and what a run may write and delete there. This file alone decides that.

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

A run writes into a directory that is empty or its own (`open_run_directory`, `require_own`). It deletes only the files
of this list, by name, and follows no link (`remove`, `discard_run`). A file that someone put into `best` moves with it.
"""

import contextlib
import errno
import json
import os
import re
import stat
from pathlib import Path

from model.checkpoint import CONFIG, SUMS, TOKENIZER, WEIGHTS, CheckpointError, replacing, sync, verify_sums

from .lock import LOCK, take_lock

STATE, FACTS, RECORD, METRICS, CURVES = "training_state.pt", "training.json", "run.json", "metrics.jsonl", "loss.png"
FILES = (WEIGHTS, STATE, CONFIG, TOKENIZER, FACTS, SUMS)  # of a checkpoint
_KINDS = {
    "regular file": (stat.S_ISREG, (RECORD, METRICS, CURVES, LOCK)),
    "directory": (stat.S_ISDIR, ("best", ".best.partial", ".best.previous", "checkpoints", "tensorboard")),
    "link": (stat.S_ISLNK, ("last",)),
}
_NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


def check_run_directory(out_dir: str | Path, resume: bool) -> None:
    """Raises OSError or ValueError unless a run may write there: a new one into nothing, a resumed one into its own."""
    if resume:
        require_own(out_dir)
        return
    try:
        names = sorted({*os.listdir(out_dir)} - {LOCK, f".{RECORD}.tmp"})  # a run that could not begin leaves these
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot_write(out_dir, error) from None
    if RECORD in names:
        raise FileExistsError(
            f"run directory {out_dir} holds a run already: choose another --out-dir, or continue it with --resume"
        )
    if names:
        found = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise FileExistsError(
            f"run directory {out_dir} is not empty: it has {found}; a run begins in an empty directory, so choose "
            "another --out-dir"
        )


def open_run_directory(out_dir: str | Path, record: dict) -> None:
    """Makes the directory with `record` in its run.json, and takes its lock.

    Raises FileExistsError if it is not empty, OSError if nothing can be written; in one line.
    """
    path = Path(out_dir)
    check_run_directory(path, resume=False)
    try:
        path.mkdir(parents=True, exist_ok=True)
        _require_kinds(path)  # a lock that is a link
        take_lock(path)
        check_run_directory(path, resume=False)  # another process may have begun a run before we got the lock
        write_json(path / RECORD, record)
    except OSError as error:
        raise _cannot_write(out_dir, error) from None


def _cannot_write(out_dir, error):
    if error.errno is None:  # the message is complete
        return error
    return type(error)(f"run directory {out_dir} cannot be written: {_reason(error)}")


def require_own(out_dir: str | Path) -> dict:
    """run.json of a run that may be resumed here.

    Raises, in one line: FileNotFoundError if there is no run, ValueError if run.json is damaged, FileExistsError if
    something else has the name of a file or folder of the run.
    """
    path = Path(out_dir)
    if not (path / RECORD).exists():
        if found := [*checkpoints(path), *(path / name for name in ("best", "last") if (path / name).exists())]:
            raise FileNotFoundError(
                f'resume: {path / RECORD} is missing: put it back ({found[0] / FACTS} has its content under "run"), '
                f"or train on from the weights with --init-from {found[0]} and another --out-dir"
            )
        raise FileNotFoundError(
            f"resume: run directory {out_dir} holds no run to resume: leave out --resume to start one"
        )
    record = read_json(path / RECORD)
    if not isinstance(record.get("trainer"), dict):
        raise ValueError(f"{path / RECORD} is damaged, or not of a run: it has no settings of a trainer")
    kinds = {"run": dict, "model": dict, "data": dict, "versions": dict, "stated": list, "resumed": list}
    texts = {"": record.get("data", {}), "validation ": (record.get("data") or {}).get("validation") or {}}
    wrong = [name for name, kind in kinds.items() if not isinstance(record.get(name, kind()), kind)]
    for prefix, text in texts.items() if "data" not in wrong else ():
        fields = {"source": str, "sha256": str, "characters": int} if text else {}
        wrong += [f"{prefix}{name} of data" for name, kind in fields.items() if not isinstance(text.get(name), kind)]
    if wrong:
        raise ValueError(f"{path / RECORD} is damaged: {', '.join(wrong)} cannot be used")
    _require_kinds(path)
    return record


def _require_kinds(directory):
    """Raises FileExistsError if a name of a run stands for something that a run does not write there."""
    for kind, (is_kind, names) in _KINDS.items():
        for name in names:
            path = directory / name
            ours = not os.path.lexists(path) or is_kind(os.lstat(path).st_mode)
            if ours and name == "last" and path.is_symlink():
                ours = os.readlink(path).startswith("checkpoints/step-")
            if not ours:
                raise FileExistsError(f"{path} is not the {kind} that a run writes: rename it, and try again")


def checkpoints(run_directory: Path) -> list[Path]:
    """The checkpoints of a run that it could resume from, oldest first."""
    found = [path for path in run_directory.glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if any((path / name).exists() for name in FILES)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of steps that a checkpoint's name has."""
    return int(checkpoint.name.removeprefix("step-"))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint to resume from; None if every byte is as it was written."""
    try:
        return None if STATE in verify_sums(checkpoint) else f"{checkpoint / SUMS} is damaged"
    except CheckpointError as error:
        return str(error)


def remove(directory: Path) -> None:
    """Deletes the files of a checkpoint, and the directory if it has no others. A link stays."""
    if directory.is_symlink():
        return
    for name in FILES:
        for path in (directory / name, directory / f".{name}.tmp"):
            with contextlib.suppress(OSError):
                path.unlink()
    with contextlib.suppress(OSError):
        directory.rmdir()


def discard_run(directory: Path, record: dict) -> None:
    """Deletes what a run wrote that failed before it took a step, so that the next try finds an empty directory.

    record: what the run wrote into run.json; if that is not there, another run has continued, and everything stays.
    """
    with contextlib.suppress(OSError, ValueError):
        if read_json(directory / RECORD) == json.loads(json.dumps(record)):
            _discard(directory)


def _discard(directory):
    for checkpoint in (directory / "best", *checkpoints(directory)):
        remove(checkpoint)
    events = directory.glob("tensorboard/events.out.tfevents.*")
    for path in (*events, *(directory / name for name in ("last", CURVES, METRICS, RECORD))):
        with contextlib.suppress(OSError):
            path.unlink()
    for name in ("tensorboard", "checkpoints"):
        with contextlib.suppress(OSError):
            (directory / name).rmdir()


def replace_directory(new: Path, directory: Path) -> None:
    """Puts a new checkpoint in the place of another, as a whole."""
    # no rename can replace a directory: the old one moves aside, and survives if the process dies in between
    finish_replacing(directory)
    if directory.exists():
        directory.rename(_aside(directory))
    try:
        new.rename(directory)
        sync(directory.parent)
    finally:
        finish_replacing(directory)  # removes the old one, or puts it back if the rename failed


def finish_replacing(directory: Path) -> None:
    """Ends a replacement that a killed process began: the old directory comes back, or goes if the new one is there."""
    previous = _aside(directory)
    if previous.exists() and not directory.exists():
        previous.rename(directory)
    elif previous.exists():
        for path in previous.iterdir():
            if path.name not in FILES and not os.path.lexists(directory / path.name):  # not ours: it stays in `best`
                path.rename(directory / path.name)
        remove(previous)


def _aside(directory):
    return directory.with_name(f".{directory.name}.previous")


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


def read_facts(directory: str | Path) -> dict:
    """training.json of a checkpoint; empty for a model directory that the trainer did not write."""
    path = Path(directory) / FACTS
    return read_json(path) if path.exists() else {}


def read_json(path: Path) -> dict:
    """The fields of a JSON file. Raises ValueError, in one line, if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it has no fields")
    return content


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file whole or not at all."""
    with replacing(path) as (file,):
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

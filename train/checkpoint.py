"""A run directory, and the checkpoints in it.

    runs/20260131-174500/
      run.json                  command, versions, data, model and trainer settings; each resumption as well
      metrics.jsonl             one JSON object a line, as the run goes
      loss.png                  the curves: losses, learning rate, gradient norm
      tensorboard/              the same for TensorBoard, with --tensorboard
      best/                     the weights with the lowest held-out loss, a model directory:
        config.json model.safetensors tokenizer.json      what model.from_pretrained reads
        training.json                                     step, losses, and the content of run.json
        SHA256SUMS                                        of all the others, as `sha256sum --check` reads it
      checkpoints/step-000500/  weights, and with them what going on needs; the newest few (--keep-checkpoints):
        training_state.pt       optimizer and the like; read it with torch.load(weights_only=True)
      last -> checkpoints/step-000500    the newest
      .lock                     held by the process that writes here (train/lock.py)

A checkpoint is written beside its place, synced to the disk, and renamed: under its name there is only ever a whole
one. What happens to it there, the checksums tell: a resumed run reads them first (train/resume.py).
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError

from model import save_pretrained
from model.checkpoint import replacing, sync

from .lock import take_lock

SUMS, STATE, FACTS = "SHA256SUMS", "training_state.pt", "training.json"
_NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


def open_run_directory(out_dir: str | Path, record: dict) -> Path:
    """Makes the directory with `record` in its run.json, and takes its lock.

    Raises FileExistsError where another run lives already, OSError where nothing can be written; in one line.
    """
    path = Path(out_dir)
    try:
        if not (path / "run.json").exists():
            path.mkdir(parents=True, exist_ok=True)
            take_lock(path)
            if not (path / "run.json").exists():  # nobody began a run there before we had the lock
                write_json(path / "run.json", record)
                return path
    except OSError as error:
        if error.errno is None:  # it is in words already
            raise
        raise type(error)(f"run directory {out_dir} cannot be written: {_reason(error)}") from None
    raise FileExistsError(
        f"run directory {out_dir} holds a run already: choose another --out-dir, go on with --resume, or remove it"
    )


@contextlib.contextmanager
def writing(path: Path, run_directory: Path, errors=OSError):
    """Around what writes a file or directory of a run: if it fails, an OSError says in a line which, why, and what is
    still good: the newest checkpoint, read again to be sure.
    """
    try:
        yield
    except errors as error:
        reason = _reason(error)
        remedy = "make room" if reason in _NO_ROOM.values() else "put that right"
        whole = next((old for old in reversed(checkpoints(run_directory)) if damage(old) is None), None)
        then = "begins anew, there being no checkpoint" if whole is None else f"goes on from {whole}, which is whole"
        raise OSError(f"{path} cannot be written: {reason}; {remedy}, and --resume {then}") from error


def _reason(error) -> str:
    """Why something cannot be written, in a few words."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):  # of safetensors, which is Rust
        number = int(found[1])
    return _NO_ROOM.get(number) or (os.strerror(number) if number else str(error).splitlines()[0])


def versions() -> dict:
    """What a run depends on, for its record."""
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
    """The commit of the code, "-dirty" behind it where the code has changed since; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def checkpoint_directory(run_directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run_directory / "checkpoints" / f"step-{step:06d}"


def checkpoints(run_directory: Path) -> list[Path]:
    """The checkpoints of a run that it could go on from, oldest first."""
    found = run_directory.glob("checkpoints/step-*")
    return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=_step)


def save_checkpoint(directory: Path, model, tokenizer, facts: dict, state: dict | None = None, weights=None) -> None:
    """Writes a model directory with training.json (`facts`), and training_state.pt (`state`) where one is given.

    weights: {name: tensor} to save in place of the model's own. A checkpoint of that name is replaced as a whole. If
    anything fails it stays as it was, nothing is left over, and the error is an OSError in one line.
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
                file.write_text(_checksums(partial, sorted(path.name for path in partial.iterdir() if path != file)))
            _replace_directory(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _save_state(state, file):
    try:
        torch.save(state, file)
    except RuntimeError:  # "unexpected pos 576 vs 534": torch does not say what failed, so the disk is asked once more
        with open(file, "ab") as more:
            more.write(bytes(2**20))
        raise


def point_last_at(checkpoint: Path, keep: int) -> None:
    """Makes `last` of a run this new checkpoint, and removes all but the `keep` newest.

    Later ones are removed as well: they are damaged ones, which the run has passed over to come here again.
    """
    run_directory = checkpoint.parents[1]
    # a link is replaced in one rename, where a directory would need two and be missing in between
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
    """What is wrong with a checkpoint that a run would go on from; None if every byte of it is as it was written."""
    try:
        stored = (checkpoint / SUMS).read_text(encoding="utf-8")
        names = re.findall(r"^[0-9a-f]{64}  (.+)$", stored, re.MULTILINE)
        # the last name shows that the list itself was not cut short between two lines
        if not stored.endswith(f"  {STATE}\n") or stored.count("\n") != len(names):
            return f"{SUMS} is damaged"
        for name, line in zip(names, stored.splitlines(keepends=True), strict=True):
            if _checksums(checkpoint, [name]) != line:
                return f"{name} is not what was written"
    except (OSError, UnicodeDecodeError) as error:
        return str(error)
    return None


def read_facts(directory: str | Path) -> dict:
    """training.json of a checkpoint; empty for a model directory that the trainer did not write."""
    path = Path(directory) / FACTS
    return read_json(path) if path.exists() else {}


def read_json(path: Path) -> dict:
    """The content of a file that `write_json` wrote. Raises ValueError, in one line, for a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def write_json(path: Path, content: dict) -> None:
    """Writes a file that is either whole or not there."""
    with replacing(path) as (file,):
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def finish_replacing(place: Path) -> None:
    """Puts back the directory that a process killed in the middle of replacing it had moved aside."""
    previous = _aside(place)
    if previous.exists() and not place.exists():
        previous.rename(place)
    shutil.rmtree(previous, ignore_errors=True)


def _replace_directory(new: Path, place: Path) -> None:
    # a directory cannot be renamed over another: the old one steps aside, and is still there if we die in between
    finish_replacing(place)
    if place.exists():
        place.rename(_aside(place))
    try:
        new.rename(place)
        sync(place.parent)
    finally:
        finish_replacing(place)  # the old one goes, or comes back where the new one did not get there


def _aside(place):
    return place.with_name(f".{place.name}.previous")


def _checksums(directory, names) -> str:
    """A line `SHA-256, two spaces, name` for each file."""
    lines = []
    for name in names:
        digest = hashlib.sha256()
        with open(directory / name, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        lines.append(f"{digest.hexdigest()}  {name}\n")
    return "".join(lines)


def _step(checkpoint):
    return int(checkpoint.name.removeprefix("step-"))

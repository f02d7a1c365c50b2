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

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
import warnings
from functools import lru_cache
from pathlib import Path

import numpy
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from model import save_pretrained
from model.checkpoint import WEIGHTS, check_weights
from model.files import replacing, sync

from .config import RunConfig, TrainerConfig
from .distributed import load_whole, whole_optimizer_state
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


#


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Random numbers of a step, such as dropout's, follow from seed, step and process: there is no state to keep."""
    (state,) = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64).tolist()
    torch.default_generator.manual_seed(state)
    if device.type == "cuda":
        torch.cuda.manual_seed(state)


def state_of(trainer) -> dict:
    """Everything but the weights. All processes must call it; the result is the first one's."""
    return {
        "step": trainer.step,
        "optimizer": whole_optimizer_state(trainer.model, trainer.optimizer),
        "steps": trainer.steps.state_dict(),
        "average": None if trainer.average is None else trainer.average.state_dict(),
        "best_held_out_loss": trainer.best_held_out_loss,
        "loss_sum": trainer.processes.mean(trainer.loss_sum).cpu(),
        "losses": trainer.losses,
        "seconds": time.perf_counter() - trainer.started,
    }


def load_state(trainer, checkpoint: Path) -> None:
    """Weights and all else of a checkpoint, into a trainer that has not begun."""
    weights, state = read_state(checkpoint, trainer.model)
    load_whole(trainer.model, weights, trainer.optimizer, state["optimizer"])
    trainer.steps.load_state_dict(state["steps"])
    if trainer.average is not None:
        trainer.average.load_state_dict(state["average"])
    trainer.step, trainer.best_held_out_loss = state["step"], state["best_held_out_loss"]
    trainer.loss_sum, trainer.losses = state["loss_sum"].to(trainer.device), state["losses"]
    trainer.seconds = state["seconds"]


#

_MAY_CHANGE = {field.name for kind in (TrainerConfig, RunConfig) for field in dataclasses.fields(kind)
               if field.metadata["may_change"]}  # fmt: skip


def recall_flags(flags: argparse.Namespace, stated: set[str]) -> None:
    """Gives the flags that are not `stated` the values that the run in flags.out_dir has recorded."""
    if flags.out_dir is None:
        return  # TrainerConfig says what is missing
    recorded = read_record(flags.out_dir)
    texts = {"data": recorded.get("data", {}), "val_data": recorded.get("data", {}).get("validation", {})}
    # their full paths: the command may be in another directory now
    recorded["run"] = {
        **recorded.get("run", {}),
        **{name: at["source"] for name, at in texts.items() if "source" in at},
    }
    for section in ("run", "trainer"):
        for name, value in recorded.get(section, {}).items():
            if name not in stated and hasattr(flags, name):
                setattr(flags, name, value)


def checkpoint_to_resume(out_dir: str | Path, record: dict) -> Path | None:
    """The newest whole checkpoint of a run, with a warning for each damaged one that is newer; None if it has none yet.

    record: as in run.json, what the run is told now. Raises ValueError, in one line, where that is another run, and
    where every checkpoint is damaged; FileNotFoundError where there is no run. Nothing is changed on the disk.
    """
    if changed := differences(read_record(out_dir), record):
        raise ValueError(f"resume: {out_dir} was trained with {'; '.join(changed)}: change it back, or start a new run")
    found = checkpoints(Path(out_dir))
    for checkpoint in reversed(found):
        what = damage(checkpoint)
        if what is None:
            return checkpoint
        warnings.warn(f"checkpoint {checkpoint} is damaged ({what}): going back to the one before it", stacklevel=2)
    if found:
        raise ValueError(f"resume: no checkpoint in {out_dir} is whole, so there is nothing to go on from")
    return None


def take_up(out_dir: str | Path, record: dict) -> Path | None:
    """`checkpoint_to_resume`, once no other process writes into the run directory: its lock is taken.

    Raises BlockingIOError, in one line, where one does.
    """
    read_record(out_dir)  # where there is no run there shall be no lock
    take_lock(out_dir)
    return checkpoint_to_resume(out_dir, record)


def read_state(checkpoint: Path, model: torch.nn.Module) -> tuple[dict, dict]:
    """(weights, training state) of a checkpoint, on the CPU. Raises CheckpointError where they do not fit the model."""
    weights = load_file(checkpoint / WEIGHTS)
    check_weights(checkpoint / WEIGHTS, weights, model.state_dict())
    return weights, torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)


def differences(before: dict, now: dict) -> list[str]:
    """`name before, not now` for every setting of a record that may not change but did."""
    now = json.loads(json.dumps(now))  # as it comes back from a file: tuples are lists
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
    """Writes into run.json that the run goes on from a step, and with which settings; returns its record from now on.

    What was written at the start stays, but for settings that changed: the next resumption shall find the new ones.
    """
    before = read_record(out_dir)
    again = {"step": step} | {name: record[name] for name in ("command", "versions") if name in record}
    record = {**before, **record, "resumed": [*before.get("resumed", []), again]}
    record |= {name: before[name] for name in ("command", "versions") if name in before}
    with writing(out_dir / "run.json", out_dir):
        write_json(out_dir / "run.json", record)
    return record


def read_record(out_dir: str | Path) -> dict:
    """run.json of a run. Raises FileNotFoundError where there is none, ValueError for a damaged one."""
    path = Path(out_dir) / "run.json"
    if not path.exists():
        raise FileNotFoundError(
            f"resume: run directory {out_dir} holds no run to go on with: leave --resume out to start one"
        )
    return read_json(path)

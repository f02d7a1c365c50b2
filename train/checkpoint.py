"""Checkpoints of a run: how they are written, checked and resumed. run_directory.py says what else is there.

A checkpoint is written under another name, synced to the disk, and renamed: a checkpoint that has its name is complete.
Checksums show later damage. A resumed run takes the settings of run.json for all flags that the command line leaves
out; a stated flag must equal the recorded one, unless its field is declared with may_change.
"""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import typing
import warnings
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from model import save_pretrained
from model.checkpoint import SUMS, WEIGHTS, check_weights, checksums, replacing, sync

from .config import RunConfig, TrainerConfig, is_of_type
from .lock import take_lock
from .run_directory import (
    FACTS,
    FILES,
    RECORD,
    STATE,
    checkpoints,
    damage,
    read_facts,
    remove,
    replace_directory,
    require_own,
    step_of,
    write_json,
    writing,
)

_MAY_CHANGE = {
    field.name for config in (TrainerConfig, RunConfig) for field in fields(config) if field.metadata["may_change"]
}


def versions() -> dict:
    """The versions that a run depends on, for its record."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "commit": _commit()}
    for package in ("torch", "triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


@lru_cache
def _commit() -> str | None:
    """The commit of the code, with "-dirty" if the code has changed since; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def save_checkpoint(directory: Path, model, tokenizer, facts: dict, state: dict | None = None, weights=None) -> None:
    """Writes a model directory with training.json (`facts`), and training_state.pt (`state`) if it is given.

    weights: {name: tensor} to save instead of the model's own. An existing checkpoint is replaced as a whole. If
    anything fails, it stays as it was, nothing is left over, and the error is an OSError of one line.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    run_directory = directory.parents[1] if directory.parent.name == "checkpoints" else directory.parent
    remove(partial)
    with writing(directory, run_directory, (OSError, RuntimeError, SafetensorError)):
        try:
            save_pretrained(model, partial, tokenizer=tokenizer, weights=weights)
            write_json(partial / FACTS, facts)
            if state is not None:
                with replacing(partial / STATE) as (file,):
                    _save_state(state, file)
            with replacing(partial / SUMS) as (file,):
                written = sorted(path for path in partial.iterdir() if path.name in FILES)
                file.write_text(checksums({path.name: path for path in written}))
            replace_directory(partial, directory)
        finally:
            remove(partial)


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
    before = [path for path in others if step_of(path) < step_of(checkpoint)]
    kept = before[max(0, len(before) - (keep - 1)) :]
    for path in others:
        if path not in kept:
            remove(path)


def recall_flags(flags: argparse.Namespace, stated: set[str]) -> None:
    """Sets the flags that are not `stated` to the values that the run in flags.out_dir has recorded.

    Raises ValueError, which names run.json, for a value that a flag cannot have.
    """
    if flags.out_dir is None:
        return  # TrainerConfig says what is missing
    record = require_own(flags.out_dir)
    values = {**record.get("run", {}), **record["trainer"]}
    # full paths of the texts, since the command may run in another directory now
    data = record.get("data", {})
    texts = (("data", data), ("val_data", data.get("validation") or {}))
    values |= {name: text["source"] for name, text in texts if "source" in text}
    hints = typing.get_type_hints(RunConfig) | typing.get_type_hints(TrainerConfig)
    for name, value in values.items():
        if name in hints and not is_of_type(hints[name], value):
            raise ValueError(f"{Path(flags.out_dir) / RECORD} is damaged: its {name} is {value!r}")
        if name not in stated and hasattr(flags, name):
            setattr(flags, name, value)


def checkpoint_to_resume(out_dir: str | Path, record: dict, lock: bool = False) -> Path | None:
    """The newest undamaged checkpoint of a run, None if it has none yet.

    record: what run.json would hold now. lock: take the directory's lock first, and warn of each damaged checkpoint;
    otherwise the disk is only read. Raises, in one line: ValueError if the settings of the record are not those of the
    run, or all checkpoints are damaged or gone; FileNotFoundError if there is no run; BlockingIOError as `take_lock`.
    """
    before, path = require_own(out_dir), Path(out_dir)  # if there is no run, this raises before a lock file is made
    if lock:
        take_lock(out_dir)
        before = require_own(out_dir)  # another process may have changed it
    if changed := _differences(before, record):
        raise ValueError(f"resume: {out_dir} was trained with {'; '.join(changed)}: change it back, or start a new run")
    found = checkpoints(path)
    for checkpoint in reversed(found):
        what = damage(checkpoint)
        if what is None:
            return checkpoint
        if lock:
            warnings.warn(f"{what}: going back to the checkpoint before {checkpoint.name}", stacklevel=2)
    if found:
        raise ValueError(f"resume: all checkpoints in {out_dir} are damaged ({what}): nothing was changed")
    # a run that was killed before its first checkpoint begins again, but one whose checkpoints are gone does not
    past_the_first = read_facts(path / "best").get("step", 0) > before["trainer"].get("save_every", 0)
    if (path / "last").is_symlink() or past_the_first:
        raise ValueError(
            f"resume: the checkpoints of {out_dir} are gone: put them back, or train on from a model, such as "
            f"{path / 'best'}, with --init-from and another --out-dir"
        )
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
    before = require_own(out_dir)
    first = {name: before[name] for name in ("command", "versions") if name in before}
    resumed = {"step": step} | {name: record[name] for name in ("command", "versions") if name in record}
    record = {**before, **record, **first, "resumed": [*before.get("resumed", []), resumed]}
    with writing(out_dir / RECORD, out_dir):
        write_json(out_dir / RECORD, record)
    return record

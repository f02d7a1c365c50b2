"""Going on with a run: what it was told, whether that still holds, and which of its checkpoints is whole.

    python -m train --resume --out-dir runs/mine

A setting that the command line leaves out is the one that run.json records. One that it states must be the recorded
one, unless its field is declared as one that may change: how long to train, how often to save, on which device. The
text must be the same one (train/corpus.py).
"""

import argparse
import dataclasses
import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

from model.checkpoint import WEIGHTS, check_weights

from .checkpoint import STATE, checkpoints, damage, read_json, write_json, writing
from .config import RunConfig, TrainerConfig
from .lock import take_lock

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

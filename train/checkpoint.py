"""A run directory, and the checkpoints in it.

    runs/20260131-174500/
      run.json              command, versions, data, model and trainer settings
      metrics.jsonl         one JSON object a line, as the run goes
      loss.png              the curves: losses, learning rate, gradient norm
      tensorboard/          the same for TensorBoard, with --tensorboard
      best/                 the weights with the lowest held-out loss, a model directory:
        config.json model.safetensors tokenizer.json      what model.from_pretrained reads
        training.json                                     step, losses, and the content of run.json
      last/                 the newest weights, and with them what going on needs:
        training_state.pt   optimizer, loss scaler and random states; read it with torch.load(weights_only=True)

A checkpoint is written beside its place, synced to the disk, and renamed: under its name there is only ever a whole
one.
"""

import json
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import numpy
import torch

from model import save_pretrained
from model.files import replacing


def open_run_directory(out_dir: str | Path, record: dict) -> Path:
    """Makes the directory with `record` in its run.json.

    Raises FileExistsError where another run lives already, OSError where nothing can be written; in one line.
    """
    path = Path(out_dir)
    if path.is_dir() and (path / "run.json").exists():
        raise FileExistsError(f"run directory {out_dir} holds a run already: choose another --out-dir, or remove it")
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "run.json", record)
    except OSError as error:
        raise type(error)(f"run directory {out_dir} cannot be written: {error.strerror}") from None
    return path


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


def save_checkpoint(directory: Path, model, tokenizer, facts: dict, state: dict | None = None) -> None:
    """Writes a model directory with training.json (`facts`), and training_state.pt (`state`) where one is given.

    A checkpoint of that name is replaced as a whole. If anything fails it stays as it was, and nothing is left over.
    """
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_pretrained(model, partial, tokenizer=tokenizer)
        write_json(partial / "training.json", facts)
        if state is not None:
            with replacing(partial / "training_state.pt") as (file,):
                torch.save(state, file)
        _replace_directory(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_facts(directory: str | Path) -> dict:
    """training.json of a checkpoint; empty for a model directory that the trainer did not write."""
    path = Path(directory) / "training.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def write_json(path: Path, content: dict) -> None:
    """Writes a file that is either whole or not there."""
    with replacing(path) as (file,):
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _replace_directory(new: Path, place: Path) -> None:
    # a directory cannot be renamed over another: the old one steps aside, and is still there if we die in between
    previous = place.with_name(f"{place.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if place.exists():
        place.rename(previous)
    new.rename(place)
    shutil.rmtree(previous, ignore_errors=True)

"""Kills a training command again and again, resumes it each time, and compares its end with an undisturbed run.

    python tests/train/kill_and_resume.py --kills 20 --steps 2000

The signal is SIGKILL, at random steps and at random moments within them, so that it also comes in the middle of an
evaluation and of a checkpoint. The last line is one JSON object; identical false is exit status 1.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from model import from_pretrained

ROOT = Path(__file__).parents[2]
TEXT = "When are you going? I am going to the play, and you are coming to the play with me. " * 20
MODEL = "--context-size 16 --window 8 --n-layer 1 --n-head 2 --n-kv-head 1 --d-model 16 --dropout 0.1 --batch-size 2"
SETTINGS = f"{MODEL} --device cpu --eval-examples 4 --sample-tokens 0 --save-every 20 --eval-every 70 --log-every 1"


def start(*arguments, **settings):
    """`python -m train` with the arguments, in one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "train", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings
    )


def wait_for(condition, process, seconds=120):
    """Until the condition holds; AssertionError if the process ends before it, or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def steps_of(run):
    """Steps that metrics.jsonl has seen: one line a step here, and one an evaluation."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_and_resume(directory: Path, steps: int, kills: int, seed: int = 0) -> dict:
    """What happened, and whether weights and losses of the two runs are identical."""
    (directory / "text.txt").write_text(TEXT)
    settings = [*SETTINGS.split(), "--data", str(directory / "text.txt"), "--max-steps", str(steps)]
    whole, run = directory / "whole", directory / "run"
    process = start(*settings, "--out-dir", str(whole))
    assert process.wait() == 0, process.communicate()

    draw = random.Random(seed)
    arguments, died_at = [*settings, "--out-dir", str(run)], []
    for step in sorted(draw.sample(range(1, steps), kills)):
        process = start(*arguments)
        try:
            wait_for(lambda step=step: steps_of(run) >= step, process)
            time.sleep(0.05 * draw.random())
        finally:
            process.kill()
            process.communicate()
        died_at.append(steps_of(run))
        arguments = ["--resume", "--out-dir", str(run)]
    process = start(*arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors

    ends = [from_pretrained(out / "last")[0].state_dict() for out in (whole, run)]
    lines = [(out / "metrics.jsonl").read_text().splitlines() for out in (whole, run)]
    losses = [[json.loads(line).get("loss") for line in of_run] for of_run in lines]
    return {
        "steps": steps,
        "kills": kills,
        "resumed_from": [entry["step"] for entry in json.loads((run / "run.json").read_text())["resumed"]],
        "lines_at_death": died_at,
        "left_over": sorted(path.name for path in run.rglob("*") if "partial" in path.name or "previous" in path.name),
        "identical": all(torch.equal(ends[1][name], ends[0][name]) for name in ends[0]) and losses[0] == losses[1],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = kill_and_resume(Path(directory), flags.steps, flags.kills, flags.seed)
    print(json.dumps(result))
    sys.exit(not result["identical"])

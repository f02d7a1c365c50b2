"""Train a GPT on text: `python -m train`, or from Python:

    from train import CharDataset, Trainer, TrainerConfig
    Trainer(model, train_dataset, test_dataset, TrainerConfig(max_steps=500, out_dir="runs/first")).train()

config.py has the settings, data.py the examples, trainer.py the loop, checkpoint.py the run directory, evaluate.py the
loss over the whole held-out text.
"""

import os
import signal
import sys

# `python -m train` loads torch for a second: a Ctrl-C in it ends the command without a traceback. main's caller puts
# Python's own handler back.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# GNU OpenMP's threads spin while they wait for each other. If another process uses one of the cores, a step on 2 cores
# then takes up to 10 times as long. A short spin avoids nearly all of that and costs 10 % on an idle machine. torch
# reads the variable when it is loaded, so this comes first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from .config import TrainerConfig
from .data import CharDataset
from .trainer import Trainer, TrainingFailed

__all__ = ["CharDataset", "Trainer", "TrainerConfig", "TrainingFailed"]

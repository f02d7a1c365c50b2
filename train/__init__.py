"""Train a GPT on text: `python -m train`, or from Python:

    from train import CharDataset, Trainer, TrainerConfig
    Trainer(model, train_dataset, test_dataset, TrainerConfig(max_steps=500, out_dir="runs/first")).train()

config.py has the settings, data.py the examples, trainer.py the loop, checkpoint.py the run directory, evaluate.py the
loss over the whole held-out text.
"""

import signal
import sys

# `python -m train` loads torch for a second: a Ctrl-C in it ends the command without a traceback. main's caller puts
# Python's own handler back.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from .config import TrainerConfig
from .data import CharDataset
from .trainer import Trainer, TrainingFailed

__all__ = ["CharDataset", "Trainer", "TrainerConfig", "TrainingFailed"]

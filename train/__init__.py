"""Training on text: `python -m train`, or from Python:

    from train import CharDataset, Trainer, TrainerConfig
    Trainer(model, train_dataset, test_dataset, TrainerConfig(max_steps=500, out_dir="runs/first")).train()

config.py says what can be set (flags.py makes flags of it), data.py and order.py which text and in what order,
trainer.py is the loop, optim.py the update, metrics.py what one sees, checkpoint.py what is kept, and evaluate.py the
figure that counts: the loss over the whole held-out text.
"""

import os

# GNU OpenMP's threads spin while they wait for each other. Where another process has one of the cores they spin in
# vain: a step on 2 cores then took up to 10 times as long. So they spin briefly, then sleep, which costs 10 % on an
# idle machine and saves nearly all of that on a busy one. It is read when torch is loaded, so it comes first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from .config import TrainerConfig
from .data import CharDataset
from .trainer import Trainer, TrainingFailed

__all__ = ["CharDataset", "Trainer", "TrainerConfig", "TrainingFailed"]

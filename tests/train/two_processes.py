"""Runs that test_distributed.py starts with torchrun: python two_processes.py DIRECTORY RUN...

A run is a directory whose name is one of RUNS; ddp@5 is stopped at step 5, ddp+ goes on.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from model import GPT, GPTConfig
from train import CharDataset, Trainer, TrainerConfig

TEXT = "When are you going? I am going to the play, and you are coming to the play with me. " * 20
SIZES = {"context_length": 16, "window": 8, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_model": 32}
BASE = {"max_steps": 12, "batch_size": 4, "log_every": 1, "eval_every": 9, "eval_examples": 10, "save_every": 6}

RUNS = {
    "one": {},
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "ddp-accumulated": {"parallel": "ddp", "batch_size": 2, "grad_accumulation": 2},
    "fsdp-accumulated": {"parallel": "fsdp", "batch_size": 2, "grad_accumulation": 2},
    "one-muon": {"optimizer": "muon", "ema_decay": 0.9},
    "ddp-muon": {"parallel": "ddp", "optimizer": "muon", "ema_decay": 0.9},
    "fsdp-muon": {"parallel": "fsdp", "optimizer": "muon", "ema_decay": 0.9},
}


def trainer_of(directory, name, **settings):
    train_set = CharDataset(TEXT[:1500], block_size=16)
    held_out = CharDataset(TEXT[1500:], block_size=16, tokenizer=train_set.tokenizer)
    model = GPT(GPTConfig(vocab_size=train_set.vocab_size, **SIZES), seed=int(os.environ.get("RANK", 0)))
    settings = {
        **BASE,
        "learning_rate": 1e-2,
        "device": "cpu",
        "sample_tokens": 4,
        **RUNS[name.split("/")[-1]],
        **settings,
    }
    return Trainer(model, train_set, held_out, TrainerConfig(**{"out_dir": directory / name, **settings}))


def stop_at(trainer, step):
    """Asks the last process alone to stop, at the end of a step."""
    take_step = trainer._take_step

    def take_step_and_stop(batches):
        take_step(batches)
        if trainer.step == step and trainer.processes.rank == trainer.processes.world_size - 1:
            signal.raise_signal(signal.SIGTERM)

    trainer._take_step = take_step_and_stop
    trainer.train()
    assert trainer.interrupted and trainer.step == step


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in sys.argv[2:]:
        name, _, step = run.rstrip("+").partition("@")
        trainer = trainer_of(Path(sys.argv[1]), name, resume=run.endswith("+"))
        stop_at(trainer, int(step)) if step else trainer.train()
    torch.distributed.destroy_process_group()

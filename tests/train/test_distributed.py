"""Processes with gloo on a CPU have the losses of one, and any number of processes can resume their checkpoints.

`python test_distributed.py DIRECTORY RUN...`, under torchrun, trains the runs. A run is a directory that has its name
from RUNS; ddp@5 stops at step 5, ddp+ resumes.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model import GPT, CharTokenizer, GPTConfig, from_pretrained
from train import CharDataset, Trainer, TrainerConfig, optim
from train.__main__ import main
from train.checkpoint import checkpoints, damage
from train.data import training_batches
from train.distributed import Processes, exit_process
from train.documents import PackedDataset
from train.tokens import Encoded

TEXT = "When are you going? I am going to the play, and you are coming to the play with me. " * 20
SIZES = {"context_length": 16, "window": 8, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_model": 32}
BASE = {"max_steps": 12, "batch_size": 4, "log_every": 1, "eval_every": 9, "eval_examples": 10, "save_every": 6}
BASE["precision"] = "fp32"  # losses are compared

RUNS = {
    "one": {},
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "ddp-accumulated": {"parallel": "ddp", "batch_size": 2, "grad_accumulation": 2},
    "fsdp-accumulated": {"parallel": "fsdp", "batch_size": 2, "grad_accumulation": 2},
    "one-muon": {"optimizer": "muon", "ema_decay": 0.9},
    "ddp-muon": {"parallel": "ddp", "optimizer": "muon", "ema_decay": 0.9},
    "fsdp-muon": {"parallel": "fsdp", "optimizer": "muon", "ema_decay": 0.9},
    "one-documents": {},
    "ddp-documents": {"parallel": "ddp"},
    "fsdp-documents": {"parallel": "fsdp", "batch_size": 2, "grad_accumulation": 2},
    "ddp-context": {"parallel": "ddp", "context_parallel": 2, "activation_checkpointing": True},
    "fsdp-context-documents": {"parallel": "fsdp", "context_parallel": 2},
    "one-learned": {"sample_tokens": 20},  # more than the model learned positions
    "ddp-context-learned": {"parallel": "ddp", "context_parallel": 2, "sample_tokens": 20},
}
OF_FOUR = {
    "four-fsdp-context": {"parallel": "fsdp", "context_parallel": 2},
    "four-ddp-window-of-3-parts": {"parallel": "ddp", "context_parallel": 4},
    "four-ddp-context-documents": {"parallel": "ddp", "context_parallel": 2, "batch_size": 2, "grad_accumulation": 2},
}
MOVED = ("moved/ddp", "moved/fsdp-muon", "moved/ddp-context")
SEVERAL = [name for name in RUNS if not name.startswith("one")]


def one_of(name):
    """The run of one process that a run is like."""
    kind = name.rpartition("-")[2]
    return f"one-{kind}" if kind in ("muon", "documents", "learned") else "one"


def packed(text, tokenizer):
    """The text as documents of 1 to 23 tokens, the first of which is a prompt in every third."""
    tokens, prompts = [], []
    for number, document in enumerate(re.findall(".{1,22}", text)):
        prompts += [[len(tokens), len(tokens) + 1]] if number % 3 == 0 else []
        tokens += [*tokenizer.encode(document[: number % 22 + 1]), tokenizer.end_of_text]
    return PackedDataset(Encoded(torch.tensor(tokens), 0, 0, prompts, True), 16, tokenizer)


def positions_of(name):
    return "learned" if name.endswith("learned") else "rope"


def trainer_of(directory, name, **settings):
    train_set = CharDataset(TEXT[:1500], block_size=16)
    held_out = CharDataset(TEXT[1500:], block_size=16, tokenizer=train_set.tokenizer)
    if name.endswith("documents"):
        tokenizer = CharTokenizer(sorted(set(TEXT)), end=True)
        train_set, held_out = packed(TEXT[:1500], tokenizer), packed(TEXT[1500:], tokenizer)
    config = GPTConfig(vocab_size=train_set.vocab_size, positions=positions_of(name), **SIZES)
    model = GPT(config, seed=int(os.environ.get("RANK", 0)))
    settings = {
        **BASE,
        "learning_rate": 1e-2,
        "device": "cpu",
        "sample_tokens": 4,
        **(RUNS | OF_FOUR)[name.split("/")[-1]],
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


ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def start(*command, processes=2):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*TORCHRUN, *map(str, (processes, *command))], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def run_processes(directory, *runs, processes=2):
    process = start(__file__, directory, *runs, processes=processes)
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return shown


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of all runs, and in moved/ of those that went on from 2 processes to 1 to 2."""
    directory = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "fast_precision", fp32)
        _train_all(directory)
    return directory


def fp32(device):
    """In place of train.optim's: Muon in bf16 would round the processes' gradients apart by more than is compared."""
    return "fp32", "losses are compared"


def _train_all(directory):
    for name in RUNS:
        if name.startswith("one"):
            trainer_of(directory, name).train()
    run_processes(directory, *SEVERAL, *(f"{name}@5" for name in MOVED))
    run_processes(directory, *OF_FOUR, processes=4)
    for name in MOVED:
        alone = trainer_of(directory, name, parallel="none", context_parallel=1, resume=True)
        assert alone.step == 5
        stop_at(alone, 8)
    run_processes(directory, *(f"{name}+" for name in MOVED))


def measured(run, name):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


@pytest.mark.parametrize("name", [*SEVERAL, *OF_FOUR, *MOVED])
def test_several_processes_have_the_losses_of_one(runs, name):
    one = runs / one_of(name)
    for value in ("loss", "held_out_loss", "grad_norm"):
        found, expected = measured(runs / name, value), measured(one, value)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [loss for _, loss in found] == pytest.approx(
            [loss for _, loss in expected], abs=1e-5 if "l" in value else 1e-4
        )


@pytest.mark.parametrize(
    "name", ["ddp", "fsdp", "fsdp-muon", "moved/fsdp-muon", "fsdp-documents", "moved/ddp-context", *OF_FOUR]
)
def test_the_checkpoint_of_several_processes_is_that_of_one(runs, name):
    one = runs / one_of(name)
    assert [path.name for path in checkpoints(runs / name)][-1] == "step-000012" and damage(
        runs / name / "last"
    ) is None
    for which in ("last", "best"):
        found, expected = (from_pretrained(run / which)[0].state_dict() for run in (runs / name, one))
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-3, rtol=0)
    states = [torch.load(run / "last" / "training_state.pt", weights_only=True) for run in (runs / name, one)]
    for key, state in states[1]["optimizer"]["state"].items():
        for part, tensor in state.items():
            assert type(states[0]["optimizer"]["state"][key][part]) is torch.Tensor
            torch.testing.assert_close(states[0]["optimizer"]["state"][key][part], tensor, atol=1e-3, rtol=1e-2)


def test_the_parts_of_a_batch_make_up_the_batch():
    train_set = trainer_of(Path(), "one", out_dir=None).train_dataset
    whole = next(training_batches(train_set, 6, seed=1, first_batch=70))[0]
    parts = [next(training_batches(train_set, 6, seed=1, first_batch=70, part=(i, 3)))[0] for i in range(3)]
    assert torch.equal(torch.cat(parts), whole)


def test_processes_that_cannot_share_a_batch_equally_are_refused():
    with pytest.raises(ValueError, match="batch_size is 16, which 3 processes cannot share equally: take a multiple"):
        Processes("ddp", 0, 3).local_batch_size(16)


def test_a_context_that_processes_cannot_share_equally_is_refused():
    with pytest.raises(ValueError, match="context_parallel is 3, which does not divide the context size 16: change"):
        Processes("ddp", 0, 3, 3).require_equal_parts(1, 16)
    with pytest.raises(ValueError, match="batch_size is 3, which 2 groups of 2 processes cannot share equally"):
        Processes("ddp", 0, 4, 2).require_equal_parts(3, 16)
    with pytest.raises(ValueError, match="context_parallel 2 needs parallel ddp or fsdp"):
        TrainerConfig(context_parallel=2)
    with pytest.raises(ValueError, match="context_parallel 2 and compile exclude each other"):
        TrainerConfig(context_parallel=2, parallel="ddp", compile=True)


def test_processes_take_the_parts_of_a_mesh():
    batch = torch.arange(16).view(2, 8)
    parts = [(p.rows, p.tokens([batch])[0].tolist()) for p in (Processes("ddp", rank, 4, 2) for rank in range(4))]
    left, right = batch[:, :4].tolist(), batch[:, 4:].tolist()
    assert parts == [((0, 2), left), ((0, 2), right), ((1, 2), left), ((1, 2), right)]


def test_a_model_without_fused_kernels_cannot_split_sequences():
    config = GPTConfig(vocab_size=9, **SIZES)
    for model in (GPT(config, fused_kernels=False), GPT(GPTConfig(vocab_size=9, dropout=0.1, **SIZES))):
        with pytest.raises(ValueError, match="sequences can be split in the fused kernels only"):
            model.split_sequences(object())
        assert model.parts == 1 and model.group is None


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def test_parallel_without_torchrun_and_torchrun_without_parallel_are_refused(text, tmp_path, capsys, monkeypatch):
    def refused(*arguments):
        with pytest.raises(SystemExit):
            main(
                [
                    "--data",
                    text,
                    "--context-size",
                    "16",
                    "--device",
                    "cpu",
                    "--out-dir",
                    str(tmp_path / "run"),
                    *arguments,
                ]
            )
        return capsys.readouterr().err

    assert "torchrun --nproc-per-node 2 -m train --parallel fsdp" in refused("--parallel", "fsdp")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "there are 2 processes: add --parallel ddp or fsdp" in refused()
    assert not (tmp_path / "run").exists()


def test_the_command_prints_everything_once_and_sigterm_to_torchrun_saves(text, tmp_path):
    run = tmp_path / "run"
    sizes = (
        "--context-size 16 --n-layer 1 --n-head 2 --n-kv-head 1 --d-model 16 --window 8 --batch-size 2 --log-every 1"
    )
    process = start("-m", "train", "--parallel", "ddp", *sizes.split(), "--device", "cpu", "--data", text,
                    "--max-steps", 1000000, "--sample-tokens", 0, "--out-dir", run)  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 5:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        shown, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "ddp, 2 processes, 1 of 2 examples of a batch each" in shown
    assert shown.count("stopped at step") == shown.count("model  ") == 1 and "Error" not in shown
    step = json.loads((run / "last" / "training.json").read_text())["step"]
    assert f"stopped at step {step:,} of 1,000,000: saved in {run}/last" in shown
    assert main(["--resume", "--out-dir", str(run), "--parallel", "none", "--max-steps", str(step + 1)]) == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    optim.fast_precision = fp32
    for run in sys.argv[2:]:
        name, _, step = run.rstrip("+").partition("@")
        trainer = trainer_of(Path(sys.argv[1]), name, resume=run.endswith("+"))
        stop_at(trainer, int(step)) if step else trainer.train()
    trainer.processes.leave()
    exit_process(0)

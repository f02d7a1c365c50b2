"""Train a GPT on text, and sample from it.

    python -m train --fused-kernels                       # Shakespeare's plays, minutes on two CPU cores
    python -m train --fused-kernels --data my.txt --context-size 256 --window 64 --max-steps 5000 --out-dir runs/mine
    python -m train --architecture original               # GPT-2 in plain PyTorch, to compare with

The run directory holds the best and the last checkpoint, the curves and the settings (train/checkpoint.py). Ctrl-C
saves the last checkpoint and ends.
"""

import shlex
import sys
from datetime import datetime
from pathlib import Path

import torch

from kernels import resolve_backend
from model import GPT, CharTokenizer, from_pretrained, generate

from .config import RunConfig, TrainerConfig, resolve_device
from .data import HELD_OUT, CharDataset, fingerprint, load_text, split
from .flags import Parser, add_flags, from_flags
from .shakespeare import COLLECTIONS
from .trainer import Trainer, TrainingFailed

SAMPLE_CHARACTERS = 500
TEMPERATURE, TOP_K = 0.8, 40


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 for a run that failed, 2 for input it cannot use."""
    parser = Parser(prog="python -m train", description=__doc__)
    add_flags(parser, RunConfig, "model and data")
    add_flags(parser, TrainerConfig, "training")
    flags = parser.parse_args(arguments)
    flags.out_dir = flags.out_dir or datetime.now().strftime("runs/%Y%m%d-%H%M%S")
    command = shlex.join(["python", "-m", "train", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        run, config = from_flags(RunConfig, flags), from_flags(TrainerConfig, flags)
        trainer = prepare(run, config, command)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        parser.error(str(error).splitlines()[0])
    try:
        trainer.train()
        if not trainer.interrupted:
            write_passage(best_checkpoint(trainer), trainer)
        say_how_to_go_on(best_checkpoint(trainer))
    except (TrainingFailed, OSError, RuntimeError) as error:
        print(f"{parser.prog}: run failed: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


def prepare(run: RunConfig, config: TrainerConfig, command: str) -> Trainer:
    """Everything up to the first step; the run directory is made last, when nothing else can be wrong."""
    device = resolve_device(config.device)
    backend = resolve_backend(run.backend, device) if run.fused_kernels else None
    text = load_text(run.data)
    training_text, held_out_text = split(text)
    tokenizer = CharTokenizer.from_text(text)
    model_config = run.model_config(tokenizer.vocab_size)
    if len(held_out_text) <= run.context_size:
        raise ValueError(
            f"data {run.data} has {len(text):,} characters, and its held-out last 10 % ({len(held_out_text):,}) is "
            f"shorter than one context of {run.context_size} + 1: give a longer text or a smaller --context-size"
        )
    training_set = CharDataset(training_text, run.context_size, tokenizer)
    held_out_set = CharDataset(held_out_text, run.context_size, tokenizer)
    model = GPT(model_config, fused_kernels=run.fused_kernels, backend=run.backend, seed=config.seed)
    source = run.data if run.data in COLLECTIONS else str(Path(run.data).resolve())
    data = {"source": source, "characters": len(text), "sha256": fingerprint(text)}
    trainer = Trainer(model, training_set, held_out_set, config, record={"command": command, "data": data})
    for name, value in _first_lines(run, trainer, backend, data):
        print(f"{name:<10} {value}")
    return trainer


def best_checkpoint(trainer: Trainer) -> Path:
    """The weights with the lowest held-out loss; the newest ones where no evaluation was reached."""
    best = trainer.out_dir / "best"
    return best if best.exists() else trainer.out_dir / "last"


def write_passage(checkpoint: Path, trainer: Trainer) -> None:
    """Lets a checkpoint write, as it comes."""
    model, tokenizer = from_pretrained(checkpoint, device=trainer.device)
    prompt = "\n" if "\n" in tokenizer.stoi else tokenizer.decode([0])
    tokens = torch.tensor([tokenizer.encode(prompt)], device=trainer.device)
    seed = trainer.config.seed
    print(f"\n{SAMPLE_CHARACTERS} characters by {checkpoint}:\n" + "-" * 80)
    for token in generate(model, tokens, SAMPLE_CHARACTERS, temperature=TEMPERATURE, top_k=TOP_K, seed=seed):
        print(tokenizer.decode(token), end="", flush=True)
    print("\n" + "-" * 80)


def say_how_to_go_on(checkpoint: Path) -> None:
    """Prints the commands that use a checkpoint."""
    directory = shlex.quote(str(checkpoint))
    print("sample again, and measure the loss over the whole held-out text:\n")
    print(f"  python -m model.sample --checkpoint {directory} --max-new-tokens 1000 --temperature {TEMPERATURE}")
    print(f"  python -m train.evaluate --checkpoint {directory}")


def _first_lines(run, trainer, backend, data):
    """(name, value) of what is about to happen."""
    config, model = trainer.config, trainer.model.config
    heads = f"{model.n_head} heads" + (f" on {model.n_kv_head} KV heads" if model.n_kv_head < model.n_head else "")
    window = f", window {model.window}" if model.window is not None else ""
    window += f" in layers {model.window_pattern}" if window and "L" in model.window_pattern else ""
    yield "model", f"{model.architecture}: {trainer.model.num_parameters():,} parameters"
    yield "", f"{model.n_layer} layers, width {model.d_model}, {heads}, context {model.context_length}{window}"
    if backend is not None:
        yield "attention", f"fused kernels, backend {backend[0]}: {backend[1]}"
    else:
        yield "attention", "plain PyTorch (--fused-kernels runs ours)"
    threads = f", {torch.get_num_threads()} threads" if trainer.device.type == "cpu" else ""
    yield "device", f"{trainer.device}{threads}, {config.precision}" + (", compiled" if config.compile else "")
    size = data["characters"]
    yield "data", f"{data['source']}: {size:,} characters, {model.vocab_size} different; the last 10 % are held out"
    reading = trainer.total_steps * trainer.tokens_per_step / (size * (1 - HELD_OUT))
    yield "run", f"{trainer.total_steps:,} steps of {trainer.tokens_per_step:,} tokens ({reading:.1f} times the text)"
    yield "", f"in {trainer.out_dir}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the first step, or a second one: the first stops the run in good order
        print("\npython -m train: interrupted", file=sys.stderr)
        sys.exit(130)

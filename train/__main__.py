"""Train a GPT on text, and sample from it.

    python -m train --fused-kernels                       # Shakespeare's plays, minutes on two CPU cores
    python -m train --fused-kernels --data my.txt --context-size 256 --window 64 --max-steps 5000 --out-dir runs/mine
    python -m train --architecture original               # GPT-2 in plain PyTorch, to compare with
    python -m train --fused-kernels --data 'books/*.txt' --embedding-type bpe --vocab-size 8192
    python -m train --fused-kernels --random-config --seed 7                     # a model of any kind
    python -m train --fused-kernels --init-from DIR --data my.txt --learning-rate 3e-4     # train a model on
    python -m train --resume --out-dir runs/mine          # go on after any stop, with the settings of then

The run directory holds the best and the last checkpoint, the curves and the settings (train/checkpoint.py). Ctrl-C
and SIGTERM save a checkpoint and end the run, a second one ends it at once.
"""

import dataclasses
import random
import shlex
import sys
from datetime import datetime
from pathlib import Path

import torch

from model import ARCHITECTURES, GPT, CharTokenizer, attention_backend, from_pretrained
from model.command import Parser, resolve_device

from .checkpoint import checkpoint_to_resume, read_record, recall_flags
from .config import RunConfig, TrainerConfig, add_flags, from_flags, given
from .corpus import given_tokenizer
from .data import TextData, TokenDataset, load_data
from .distributed import is_first, join_processes, local_device
from .lock import refuse_if_written
from .memory import estimate, in_words
from .metrics import TEMPERATURE, passage
from .trainer import Trainer, TrainingFailed

SAMPLE_TOKENS = 500


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 for a run that failed, 2 for input it cannot use."""
    parser = Parser(prog="python -m train", description=__doc__)
    add_flags(parser, RunConfig, "model and data")
    add_flags(parser, TrainerConfig, "training")
    flags = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "train", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        stated = given(parser, arguments)
        if flags.resume:
            recall_flags(flags, stated)
        elif flags.out_dir is None:
            flags.out_dir = datetime.now().strftime("runs/%Y%m%d-%H%M%S")
        run, config = from_flags(RunConfig, flags), from_flags(TrainerConfig, flags)
        trainer = prepare(run, config, command, stated)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if not is_first():
            return 2
        parser.error(str(error).splitlines()[0])
    try:
        trainer.train()
        trainer.processes.leave()
        if is_first():
            if not trainer.interrupted:
                write_passage(best_checkpoint(trainer), trainer)
            say_how_to_go_on(best_checkpoint(trainer), trainer)
    except (TrainingFailed, OSError, RuntimeError) as error:
        if is_first():
            print(f"{parser.prog}: run failed: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


def prepare(run: RunConfig, config: TrainerConfig, command: str, stated: set[str] = frozenset()) -> Trainer:
    """Everything up to the first step; the run directory is made last, when nothing else can be wrong.

    stated: the flags that the command line has, which --init-from asks for.
    """
    device = resolve_device(local_device(config.parallel, config.device))
    # the first process looks, and all stop or none: one that went on would wait for the others
    join_processes(config.parallel, device).first_does(refuse_if_written, config.out_dir)
    backend = attention_backend(device, run.fused_kernels, run.backend)
    if run.random_config and not config.resume:  # what was drawn then is recorded
        run = random_config(run, config.seed, stated)
    checkpoint = recorded = None
    if config.resume:
        told = {"run": dataclasses.asdict(run), "trainer": config.to_dict()}
        checkpoint = checkpoint_to_resume(config.out_dir, told)
        recorded = read_record(config.out_dir).get("data")
        stated = stated | set(read_record(config.out_dir).get("stated", ()))
    if checkpoint is not None:
        model, tokenizer = from_pretrained(checkpoint, fused_kernels=run.fused_kernels, backend=run.backend)
    elif run.init_from is None:
        run.model_config(vocab_size=1)  # what is wrong with the sizes is said before a long text is read
        model, tokenizer = None, None if run.tokenizer is None else given_tokenizer(run.tokenizer)
    else:
        model, tokenizer, run = load_to_train(run, stated)
    data = load_data(
        run.data,
        run.val_data,
        tokenizer=tokenizer,
        embedding_type=run.embedding_type,
        vocab_size=run.vocab_size,
        cache=run.token_cache,
        recorded=recorded,
    )
    if model is None:
        model = GPT(run.model_config(data.tokenizer.vocab_size), run.fused_kernels, run.backend, seed=config.seed)
    training_set, held_out_set = data_sets(run, data)
    record = {"command": command, "stated": sorted(stated), "run": dataclasses.asdict(run), "data": data.record}
    trainer = Trainer(model, training_set, held_out_set, config, record)
    over = trainer.step >= trainer.total_steps
    # blocks that are compiled and sharded cannot be run to be looked at
    expected = None if over or (config.compile and config.parallel == "fsdp") else estimate(trainer)
    for name, value in _first_lines(run, trainer, backend, data.record, expected) if is_first() else ():
        print(f"{name:<10} {value}")
    return trainer


def data_sets(run: RunConfig, data: TextData) -> tuple[TokenDataset, TokenDataset]:
    """(training, held out). Raises ValueError where one is shorter than an example."""
    held_out_name = "its held-out last 10 %" if run.val_data is None else f"val_data {run.val_data}"
    for name, tokens in (("its training part", data.training.tokens), (held_out_name, data.held_out.tokens)):
        if len(tokens) <= run.context_size:
            raise ValueError(
                f"data {run.data} has {data.record['characters']:,} characters, and {name} ({len(tokens):,} tokens) is "
                f"shorter than one context of {run.context_size} + 1: give a longer text or a smaller --context-size"
            )
    return tuple(TokenDataset(part.tokens, run.context_size, data.tokenizer) for part in (data.training, data.held_out))


def load_to_train(run: RunConfig, stated: set[str]):
    """(model, tokenizer, run) of --init-from: the weights as fp32, with the run's window, dropout and context size.

    The window stays the model's unless the flag is stated, and so does the context size where the model's is shorter.
    Raises ValueError for flags that contradict the model, and for one without a tokenizer.
    """
    sizes = {"architecture", "n_layer", "n_head", "n_kv_head", "d_model"}
    if contradicting := stated & (sizes | {"embedding_type", "vocab_size", "tokenizer"}):
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(contradicting))
        what = "is as large as it is" if contradicting & sizes else "has its vocabulary"
        raise ValueError(f"{flags}: not with --init-from, whose model {what}; leave it out")
    loaded, tokenizer = from_pretrained(run.init_from)
    if tokenizer is None:
        raise ValueError(f"{run.init_from} has no tokenizer.json, which says how text becomes the model's tokens")
    config, size = loaded.config, run.context_size
    if "context_size" not in stated:
        size = min(size, config.context_length)
    elif size > config.context_length and config.positions == "learned":
        raise ValueError(f"context_size is {size}, but {run.init_from} learned {config.context_length} positions")
    config = dataclasses.replace(
        config,
        context_length=max(size, config.context_length),
        dropout=run.dropout,
        **{name: getattr(run, name) for name in ("window", "window_pattern") if name in stated},
    )
    model = GPT(config, run.fused_kernels, run.backend)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer, dataclasses.replace(run, context_size=size)


def best_checkpoint(trainer: Trainer) -> Path:
    """The weights with the lowest held-out loss; the newest ones where no evaluation was reached."""
    best = trainer.out_dir / "best"
    return best if best.exists() else trainer.out_dir / "last"


def write_passage(checkpoint: Path, trainer: Trainer) -> None:
    """Lets a checkpoint write, as it comes."""
    model, tokenizer = from_pretrained(checkpoint, device=trainer.device)
    unit = "characters" if isinstance(tokenizer, CharTokenizer) else "tokens"
    print(f"\n{SAMPLE_TOKENS} {unit} by {checkpoint}:\n" + "-" * 80)
    for piece in passage(model, tokenizer, SAMPLE_TOKENS, trainer.config.seed):
        print(piece, end="", flush=True)
    print("\n" + "-" * 80)


def say_how_to_go_on(checkpoint: Path, trainer: Trainer) -> None:
    """Prints the commands that end an interrupted run, and those that use a checkpoint."""
    if trainer.interrupted:
        print(f"go on with it:\n\n  python -m train --resume --out-dir {shlex.quote(str(trainer.out_dir))}\n")
    directory = shlex.quote(str(checkpoint))
    print("sample again, and measure the loss over the whole held-out text:\n")
    print(f"  python -m model.sample --checkpoint {directory} --max-new-tokens 1000 --temperature {TEMPERATURE}")
    print(f"  python -m train.evaluate --checkpoint {directory}")


def _first_lines(run, trainer, backend, data, expected):
    """(name, value) of what is about to happen."""
    config, model = trainer.config, trainer.model.config
    heads = f"{model.n_head} heads" + (f" on {model.n_kv_head} KV heads" if model.n_kv_head < model.n_head else "")
    window = f", window {model.window}" if model.window is not None else ""
    window += f" in layers {model.window_pattern}" if window and "L" in model.window_pattern else ""
    if run.random_config:
        yield "drawn", f"with seed {config.seed}: {as_flags(run)}"
    yield "model", f"{model.architecture}: {trainer.model.num_parameters():,} parameters"
    yield "", f"{model.n_layer} layers, width {model.d_model}, {heads}, context {model.context_length}{window}"
    if backend is not None:
        yield "attention", f"fused kernels, backend {backend[0]}: {backend[1]}"
    else:
        yield "attention", "plain PyTorch (--fused-kernels runs ours)"
    threads = f", {torch.get_num_threads()} threads" if trainer.device.type == "cpu" else ""
    yield "device", f"{trainer.device}{threads}, {config.precision}" + (", compiled" if config.compile else "")
    if config.parallel != "none":
        parts = f"{trainer.processes.part_of(config.batch_size)} of {config.batch_size} examples of a batch each"
        yield "parallel", f"{config.parallel}, {trainer.processes.count} processes, {parts}"
    if trainer.resumed_from is not None:
        yield "resume", f"from {trainer.resumed_from}, step {trainer.step:,} of {trainer.total_steps:,}"
    elif config.resume:
        yield "resume", "no checkpoint yet: from the beginning"
    if run.init_from is not None:
        yield "weights", f"those of {run.init_from}, and its vocabulary"
    yield "data", _about_data(data)
    reading = trainer.total_steps * trainer.tokens_per_step / len(trainer.train_dataset.tokens)
    yield "run", f"{trainer.total_steps:,} steps of {trainer.tokens_per_step:,} tokens ({reading:.1f} times the text)"
    yield "", f"in {trainer.out_dir}"
    if expected is not None:
        yield from zip(("memory", "time"), in_words(expected), strict=True)


def _about_data(data):
    """The texts and their vocabulary in a line."""
    kind = {"characters": "different", "bytes": "bytes as tokens", "subwords": "tokens"}[data["vocabulary"]["kind"]]
    files = f" in {data['files']:,} files" if data["files"] > 1 else ""
    size = f"{data['source']}: {data['characters']:,} characters{files}, {data['vocabulary']['size']:,} {kind}"
    validation = data.get("validation")
    if validation is None:
        return f"{size}; the last 10 % are held out"
    return f"{size}; validation on {validation['source']}: {validation['characters']:,} characters"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the first step, or a second one: the first stops the run in good order
        print("\npython -m train: interrupted", file=sys.stderr)
        sys.exit(130)


#

HEADS = (1, 2, 3, 4, 6, 8)
HEAD_SIZES = (16, 32, 64)
WIDTHS = range(48, 129)  # a drawn model trains in minutes on a CPU
FIELDS = ("architecture", "context_size", "n_layer", "n_head", "n_kv_head", "d_model", "window", "window_pattern")


def random_config(run: RunConfig, seed: int, stated: set[str] = frozenset()) -> RunConfig:
    """`run` with its FIELDS drawn, except those in `stated`. Stated values that fit nothing stay as they are."""
    values = {name: getattr(run, name) for name in FIELDS if name in stated}

    def draw(name, candidates):
        candidates = list(candidates)
        if name not in values:
            # a string seeds it the same way in every version of Python, and only random() is promised to stay the same
            chance = random.Random(f"{seed} {name}").random()
            values[name] = candidates[int(chance * len(candidates))] if candidates else getattr(run, name)
        return values[name]

    draw("architecture", ARCHITECTURES)
    context = draw("context_size", (32, 64, 128, 256))
    draw("n_layer", range(2, 6))
    width, kv_heads = values.get("d_model"), values.get("n_kv_head", 1)
    if width is None:
        heads = draw("n_head", (n for n in HEADS if n % kv_heads == 0))
        draw("d_model", [heads * size for size in HEAD_SIZES if heads * size in WIDTHS] or [heads * HEAD_SIZES[0]])
    else:  # heads of equal size, which rotary positions want to be even
        heads = draw("n_head", (n for n in HEADS if n % kv_heads == 0 and width % (2 * n) == 0))
    draw("n_kv_head", [n for n in range(1, heads) if heads % n == 0] or [1])  # fewer than heads, where there are any
    draw("window", sorted({max(1, context // parts) for parts in (8, 4, 2)}))
    draw("window_pattern", ("S", "SL", "SSL", "SSSL"))
    return dataclasses.replace(run, **values)


def as_flags(run: RunConfig) -> str:
    """The flags that state what `random_config` draws, without those that the architecture does not have."""
    unused = set() if "window" in run.architecture else {"window", "window_pattern"}
    unused |= set() if "gqa" in run.architecture else {"n_kv_head"}
    values = {name: getattr(run, name) for name in FIELDS if name not in unused}
    flags = ((f"--{name.replace('_', '-')}", "none" if v is None else str(v)) for name, v in values.items())
    return shlex.join(word for flag in flags for word in flag)

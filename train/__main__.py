"""Train a GPT on text, and sample from it.

    python -m train --fused-kernels                       # Shakespeare's plays, minutes on two CPU cores
    python -m train --fused-kernels --data my.txt --context-size 256 --window 64 --max-steps 5000 --out-dir runs/mine
    python -m train --architecture original --no-fused-kernels     # GPT-2 in plain PyTorch, to compare with
    python -m train --fused-kernels --data 'books/*.txt' --embedding-type bpe --vocab-size 8192
    python -m train --fused-kernels --data chats.jsonl            # documents, none of which is looked across
    python -m train --fused-kernels --random-config --seed 7                     # a model of random sizes
    python -m train --fused-kernels --init-from DIR --data my.txt --learning-rate 3e-4     # fine-tune a model
    python -m train --resume --out-dir runs/mine          # continue after any stop, with the same settings

The run directory holds the best and the last checkpoint, the curves and the settings (train/run_directory.py). Ctrl-C,
SIGTERM and SIGHUP save a checkpoint and end the run; a second one ends it at once.
"""

import dataclasses
import shlex
import sys
import warnings
from datetime import datetime
from pathlib import Path

import torch

from model import GPT, CharTokenizer, attention_backend, from_pretrained
from model.checkpoint import CheckpointError, resolve_checkpoint
from model.command import Parser, command_output, resolve_device, use_fast_products

from .checkpoint import checkpoint_to_resume, recall_flags
from .config import (
    GROUPS,
    RunConfig,
    TrainerConfig,
    add_flags,
    from_flags,
    random_config,
    random_config_flags,
    renamed_flag,
    stated_flags,
)
from .corpus import given_tokenizer
from .data import TextData, TokenDataset, load_data
from .distributed import exit_process, is_main_process, join_processes, local_device
from .documents import PackedDataset
from .lock import refuse_if_written
from .memory import describe_estimate, model_memory, require_memory
from .metrics import SAMPLE_TEMPERATURE, sample_text
from .run_directory import check_run_directory, require_own
from .trainer import Trainer

PROGRAM, SAMPLE_TOKENS = "python -m train", 500


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 for a run that failed, 2 for unusable input."""
    with command_output(PROGRAM):
        warnings.filterwarnings("ignore", "dropout=")  # the first lines say it
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments):
    parser = Parser(prog=PROGRAM, usage="%(prog)s [--flag value ...]", description=__doc__)
    add_flags(parser, (RunConfig, TrainerConfig), GROUPS)
    if renamed := renamed_flag(arguments):
        parser.error(renamed)
    flags = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "train", *arguments])
    try:
        stated = stated_flags(parser, arguments)
        if flags.resume:
            recall_flags(flags, stated)
        elif flags.out_dir is None:
            flags.out_dir = datetime.now().strftime("runs/%Y%m%d-%H%M%S")
        run, config = from_flags(RunConfig, flags), from_flags(TrainerConfig, flags)
        trainer = prepare(run, config, command, stated)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError, MemoryError) as error:
        if not is_main_process():
            return 2
        parser.error(_one_line(error))
    try:
        trainer.train()
        trainer.processes.leave()
        if is_main_process():
            checkpoint = resolve_checkpoint(trainer.out_dir)
            if trainer.interrupted:
                print(f"resume it:\n\n  python -m train --resume --out-dir {shlex.quote(str(trainer.out_dir))}\n")
            elif config.sample_tokens:
                print_sample(checkpoint, trainer.device, config.seed)
            print_commands(checkpoint)
    except (CheckpointError, OSError, RuntimeError, MemoryError) as error:
        if is_main_process():
            print(f"{PROGRAM}: run failed: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _one_line(error):
    """What an error says, in a line; of torch's for too little memory, what helps."""
    lines = str(error).splitlines() or [type(error).__name__]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"out of memory ({lines[0][:100]}): take a smaller --batch-size, --context-size or model"
    return lines[0]


def prepare(run: RunConfig, config: TrainerConfig, command: str, stated: set[str] = frozenset()) -> Trainer:
    """The trainer before its first step, after printing what it will do. It makes the run directory last.

    stated: names of the flags that the command line has; --init-from and --random-config need them.
    """
    device = resolve_device(local_device(config.parallel, config.device))
    use_fast_products(device)
    # rank 0 checks, and all processes stop or none: one that went on would wait for the others
    processes = join_processes(config.parallel, device, config.context_parallel)
    processes.run_on_main(refuse_if_written, config.out_dir)
    processes.run_on_main(check_run_directory, config.out_dir, config.resume)
    backend = attention_backend(device, run.fused_kernels, run.backend)
    if run.random_config and not config.resume:  # a resumed run has recorded what was drawn
        run = random_config(run, config.seed, stated)
    checkpoint = recorded = None
    if config.resume:
        settings = {"run": dataclasses.asdict(run), "trainer": config.to_dict()}
        checkpoint = checkpoint_to_resume(config.out_dir, settings)
        record = require_own(config.out_dir)
        recorded, stated = record.get("data"), stated | set(record.get("stated", ()))
    if checkpoint is not None:
        model, tokenizer = from_pretrained(checkpoint, fused_kernels=run.fused_kernels, backend=run.backend)
    elif run.init_from is None:
        run.model_config(vocab_size=1)  # raises for wrong sizes before a long text is read
        model, tokenizer = None, None if run.tokenizer is None else given_tokenizer(run.tokenizer)
    else:
        model, tokenizer, run = load_to_train(run, stated)
    documents = "documents" in recorded if recorded and run.documents is None else run.documents
    data = load_data(
        run.data,
        run.val_data,
        documents=documents,
        tokenizer=tokenizer,
        embedding_type=run.embedding_type,
        vocab_size=run.vocab_size,
        cache=run.token_cache,
        recorded=recorded,
    )
    run = dataclasses.replace(run, documents=data.training.in_documents)
    if model is None:
        if config.parallel != "fsdp":  # whose processes share the model
            processes.run_on_main(require_memory, model_memory(run.model_config(data.tokenizer.vocab_size)), device)
        model = GPT(run.model_config(data.tokenizer.vocab_size), run.fused_kernels, run.backend, seed=config.seed)
    training_set, held_out_set = make_datasets(run, data)
    record = {"command": command, "stated": sorted(stated), "run": dataclasses.asdict(run), "data": data.record}
    trainer = Trainer(model, training_set, held_out_set, config, record, trained_before=run.init_from is not None)
    try:
        finished = trainer.step >= trainer.total_steps
        # under fsdp compiled blocks cannot run uncompiled, which the estimate needs
        estimate = None if finished or (config.compile and config.parallel == "fsdp") else trainer.estimate()
        if estimate is not None:
            processes.run_on_main(require_memory, estimate, device)
        if is_main_process():
            for name, value in _first_lines(run, trainer, backend, data.record, estimate):
                print(f"{name:<10} {value}")
    except BaseException:
        trainer.discard()
        raise
    return trainer


def make_datasets(run: RunConfig, data: TextData) -> tuple[TokenDataset, TokenDataset]:
    """(training, held out). Raises ValueError if one has no example."""
    if data.training.in_documents:
        return tuple(PackedDataset(part, run.context_size, data.tokenizer) for part in (data.training, data.held_out))
    held_out_name = "its held-out last 10 %" if run.val_data is None else f"val_data {run.val_data}"
    for name, tokens in (("its training part", data.training.tokens), (held_out_name, data.held_out.tokens)):
        if len(tokens) <= run.context_size:
            raise ValueError(
                f"data {run.data} has {data.record['characters']:,} characters, and {name} ({len(tokens):,} tokens) is "
                f"shorter than one context of {run.context_size} + 1: give a longer text or a smaller --context-size"
            )
    return tuple(TokenDataset(part.tokens, run.context_size, data.tokenizer) for part in (data.training, data.held_out))


def load_to_train(run: RunConfig, stated: set[str]) -> tuple:
    """(model, tokenizer, run) of --init-from: the weights in fp32, with the run's window, dropout and context size.

    They are those of a directory of ours or of transformers.

    The window stays the model's unless the flag is stated. So does a context that is shorter than the run's default.
    Raises ValueError for flags that contradict the model, and for a model without a tokenizer.
    """
    sizes = {"architecture", "n_layer", "n_head", "n_kv_head", "d_model"}
    if contradicting := stated & (sizes | {"embedding_type", "vocab_size", "tokenizer"}):
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(contradicting))
        what = "has its own sizes" if contradicting & sizes else "has its own vocabulary"
        raise ValueError(f"{flags}: not with --init-from, whose model {what}; leave it out")
    directory = resolve_checkpoint(run.init_from)
    loaded, tokenizer = from_pretrained(directory)
    if tokenizer is None:
        raise ValueError(f"{directory} has no tokenizer.json, which turns text into the model's tokens")
    config, length = loaded.config, run.context_size
    if "context_size" not in stated:
        length = min(length, config.context_length)
    elif length > config.context_length and config.positions == "learned":
        raise ValueError(f"context_size is {length}, but {directory} learned {config.context_length} positions")
    config = dataclasses.replace(
        config,
        context_length=max(length, config.context_length),
        dropout=run.dropout,
        **{name: getattr(run, name) for name in ("window", "window_pattern", "prefix") if name in stated},
    )
    model = GPT(config, run.fused_kernels, run.backend)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer, dataclasses.replace(run, context_size=length)


def print_sample(checkpoint: Path, device: torch.device, seed: int) -> None:
    """Prints SAMPLE_TOKENS tokens by a checkpoint while it samples them."""
    model, tokenizer = from_pretrained(checkpoint, device=device)
    unit = "characters" if isinstance(tokenizer, CharTokenizer) else "tokens"
    print(f"\n{SAMPLE_TOKENS} {unit} by {checkpoint}:\n" + "-" * 80)
    for piece in sample_text(model, tokenizer, SAMPLE_TOKENS, seed):
        print(piece, end="", flush=True)
    print("\n" + "-" * 80)


def print_commands(checkpoint: Path) -> None:
    """Prints the commands that use a checkpoint."""
    directory = shlex.quote(str(checkpoint))
    print("sample again, and measure the loss over the whole held-out text:\n")
    print(f"  python -m model.sample --checkpoint {directory} --max-new-tokens 1000 --temperature {SAMPLE_TEMPERATURE}")
    print(f"  python -m train.evaluate --checkpoint {directory}")


def _first_lines(run, trainer, backend, data, estimate):
    """(name, value) pairs that say what the run is."""
    config, model = trainer.config, trainer.model.config
    heads = _count(model.n_head, "head")
    heads += f" on {_count(model.n_kv_head, 'KV head')}" if model.n_kv_head < model.n_head else ""
    window = f", window {model.window}" if model.window is not None else ""
    window += f" in layers {model.window_pattern}" if window and "L" in model.window_pattern else ""
    window += f" and the first {model.prefix}" if window and model.prefix else ""
    if run.random_config:
        yield "drawn", f"with seed {config.seed}: {random_config_flags(run)}"
    yield "model", f"{model.architecture}: {trainer.model.num_parameters():,} parameters"
    yield (
        "",
        f"{_count(model.n_layer, 'layer')}, width {model.d_model}, {heads}, context {model.context_length}{window}",
    )
    if backend is None:
        yield "attention", "plain PyTorch (leave out --no-fused-kernels for our kernels)"
    elif model.dropout:
        yield "attention", f"plain PyTorch in training, which --dropout needs; backend {backend[0]} in evaluation"
    else:
        yield "attention", f"fused kernels, backend {backend[0]}: {backend[1]}"
    threads = f", {_count(torch.get_num_threads(), 'thread')}" if trainer.device.type == "cpu" else ""
    compiled = ", compiled" if config.compile else ""
    yield "device", f"{trainer.device}{threads}, {trainer.precision} ({trainer.why_precision}){compiled}"
    if config.parallel != "none":
        processes = trainer.processes
        part = f"{processes.local_batch_size(config.batch_size)} of {config.batch_size} examples of a batch each"
        parts = "" if processes.context == 1 else f", 1 of {processes.context} parts of their tokens"
        yield "parallel", f"{config.parallel}, {processes.world_size} processes, {part}{parts}"
    if trainer.resumed_from is not None:
        yield "resume", f"from {trainer.resumed_from}, step {trainer.step:,} of {trainer.total_steps:,}"
    elif config.resume:
        yield "resume", "no checkpoint yet: from the beginning"
    if run.init_from is not None:
        yield "weights", f"those of {run.init_from}, and its vocabulary"
    yield "data", _about_data(data, trainer)
    rows = trainer.train_dataset
    examples = trainer.total_steps * config.batch_size * config.grad_accumulation
    if run.documents:
        yield "", f"packed into {len(rows):,} rows of {rows.context_length}; {100 * rows.padding:.1f} % is padding"
        epochs = examples / len(rows)
    else:
        epochs = examples * rows.context_length / len(rows.tokens)
    yield "run", f"{trainer.total_steps:,} steps of {trainer.tokens_per_step:,} tokens ({epochs:.1f} times the text)"
    yield "", f"in {trainer.out_dir}"
    if estimate is not None:
        yield "memory", describe_estimate(estimate)


def _count(number, noun):
    return f"{number:,} {noun}" + "s" * (number != 1)


def _about_data(data, trainer):
    """The texts and their vocabulary in a line."""
    kind = {"characters": "different", "bytes": "bytes as tokens", "subwords": "tokens"}[data["vocabulary"]["kind"]]
    files = f" in {data['files']:,} files" if data["files"] > 1 else ""
    files = f" in {_count(data['documents'], 'document')}" if "documents" in data else files
    size = f"{data['source']}: {data['characters']:,} characters{files}, {data['vocabulary']['size']:,} {kind}"
    held_out = data.get("validation")
    if held_out is None and "documents" in data:
        apart, trained_on = trainer.held_out_dataset, trainer.train_dataset
        share = len(apart.tokens) / (len(apart.tokens) + len(trained_on.tokens))
        return (
            f"{size}; the last {_count(len(apart.documents), 'document')} held out, {100 * share:.1f} % of the tokens"
        )
    if held_out is None:
        return f"{size}; the last 10 % are held out"
    return f"{size}; validation on {held_out['source']}: {held_out['characters']:,} characters"


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as stopped:  # of wrong input: one of several processes must not clean up then either
        status = stopped.code or 0
    exit_process(status)

"""The settings of a training run, and the flags made from them.

`TrainerConfig` has the trainer's settings, `RunConfig` the model and data of `python -m train`. Each field is made by
`option` with its meaning, and makes a flag, so code, help and log cannot disagree: batch_size makes --batch-size, also
taken as --batch_size.

A field's type makes its flag: bool gives --name/--no-name, Literal its choices, tuple[float, float] two values, and
`X | None` accepts the word "none". A bad command line gives one line on stderr and exit status 2.
"""

import argparse
import dataclasses
import math
import numbers
import os
import random
import shlex
import types
import typing
from dataclasses import asdict, dataclass
from typing import Literal

from model import ARCHITECTURES, GPTConfig

from .corpus import DEFAULT_VOCAB_SIZE

DEFAULT_STEPS = 2500
EMBEDDING_TYPES = ("shakespearean", "shakesperean", "byte", "bpe")
# The words of minGPT and nanoGPT, and the ones that replaced them.
_NEW_WORDS = """block_size context_size, n_embd d_model, embd_pdrop dropout, resid_pdrop dropout, attn_pdrop dropout,
model_type architecture, dataset data, dtype precision, ckpt_path out_dir, max_iters max_steps, eval_interval
eval_every, eval_iters eval_examples, log_interval log_every, gradient_accumulation_steps grad_accumulation, lr
learning_rate, min_lr final_fraction, decay_lr lr_decay, warmup_iters warmup_steps, lr_decay_iters final_tokens, beta1
betas, beta2 betas, grad_norm_clip grad_clip"""
RENAMED = dict(pair.split() for pair in _NEW_WORDS.split(","))
# The flags of --help, by heading.
GROUPS = {
    "the flags to begin with": "data out_dir resume max_steps context_size window n_layer d_model batch_size "
    "learning_rate",
    "model": "fused_kernels backend architecture n_head n_kv_head window_pattern prefix dropout random_config "
    "init_from",
    "text": "val_data documents embedding_type vocab_size tokenizer token_cache",
    "optimizer": "max_epochs grad_accumulation optimizer lr_decay schedule final_fraction warmup_steps warmup_tokens "
    "final_tokens weight_decay betas grad_clip ema_decay overfit_one_batch",
    "what is measured and saved": "eval_every eval_examples sample_tokens log_every tensorboard save_every "
    "save_every_minutes keep_checkpoints",
    "machine": "device precision compile activation_checkpointing parallel context_parallel num_workers seed",
}


def option(default, meaning: str, may_change: bool = False):
    """A dataclass field with its default and its meaning, units included.

    may_change: whether a resumed run may have another value than it began with (train/checkpoint.py).
    """
    return dataclasses.field(default=default, metadata={"meaning": meaning, "may_change": may_change})


@dataclass(frozen=True)
class TrainerConfig:
    """How to train. One step is one update of the weights, by batch_size * grad_accumulation examples.

    Raises ValueError, naming the field, for a value that makes no sense.
    """

    max_steps: int | None = option(None, f"most steps to take (none: {DEFAULT_STEPS:,}, or --max-epochs)", True)
    max_epochs: int | None = option(
        None, "most epochs to take (an example starts at every token, or is a row of documents)", True
    )
    batch_size: int = option(4, "examples in a batch, all processes together")
    grad_accumulation: int = option(1, "batches whose gradients are averaged for one step")
    optimizer: Literal["muon", "adamw"] = option("muon", "Muon for the hidden layers' matrices, or AdamW for all")
    learning_rate: float = option(1e-2, "peak learning rate (AdamW for all wants less, about 4e-3)")
    lr_decay: bool = option(True, "lower the learning rate after the warm-up; otherwise it stays at the peak")
    schedule: Literal["cosine", "linear", "wsd"] = option("linear", "how the rate falls (wsd: in the last fifth)")
    final_fraction: float = option(0.0, "the learning rate at the end, as a fraction of the peak")
    warmup_steps: int | None = option(None, "steps of linear warm-up (none: a tenth of the run, at most 100)")
    warmup_tokens: int | None = option(None, "the same in tokens; give only one of the two")
    final_tokens: int | None = option(None, "tokens at which the fall ends (none: those of the whole run)")
    weight_decay: float = option(0.1, "decay of matrices; biases and normalisation gains are not decayed")
    betas: tuple[float, float] = option((0.9, 0.99), "AdamW's averages of gradients and of their squares")
    grad_clip: float | None = option(1.0, "norm that a step's gradient is clipped to (none: no clipping)")
    ema_decay: float | None = option(None, "decay of a weight average to evaluate and save as best, such as 0.99")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "arithmetic of the forward pass; weights stay fp32. auto: bf16 where the device has units for it"
    )
    activation_checkpointing: bool = option(False, "recompute the blocks: less memory, a third more time", True)
    overfit_one_batch: bool = option(False, "train on the first batch only; its loss must fall to almost 0")
    compile: bool = option(False, "torch.compile the model: faster steps after a minute or so", True)
    parallel: Literal["none", "ddp", "fsdp"] = option(
        "none", "under torchrun: all weights in each process, or shards", True
    )
    context_parallel: int = option(1, "processes that share each sequence, every one an equal part of its tokens", True)
    device: str = option("auto", "cpu, cuda, cuda:1, ... (auto: a CUDA device where there is one)", True)
    seed: int = option(0, "random seed of the initial weights, the order of the examples and the dropout")
    num_workers: int = option(0, "processes that load items of data sets without a batch method", True)
    eval_every: int = option(250, "steps between evaluations on the held-out text", True)
    eval_examples: int = option(64, "held-out examples of one evaluation, spread evenly, always the same", True)
    sample_tokens: int = option(100, "tokens of the text that is sampled at every evaluation (0: none)", True)
    save_every: int = option(500, "steps between checkpoints that --resume can use", True)
    save_every_minutes: float | None = option(10.0, "most minutes between two of them (none: by steps only)", True)
    keep_checkpoints: int = option(2, "number of them to keep, the newest", True)
    log_every: int = option(10, "steps between lines of metrics.jsonl", True)
    tensorboard: bool = option(False, "also write curves and samples for TensorBoard into the run directory", True)
    out_dir: str | None = option(None, "run directory (none: the command makes runs/DATE-TIME, the library none)", True)
    resume: bool = option(False, "resume the run in out_dir, with its settings, from its last checkpoint", True)

    def __new__(cls, *values, **named):
        if renamed := next((name for name in named if name in RENAMED), None):
            raise TypeError(f"{cls.__name__} has no {renamed}: it is called {RENAMED[renamed]} here")
        return super().__new__(cls)

    def __post_init__(self):
        if isinstance(self.out_dir, os.PathLike):
            object.__setattr__(self, "out_dir", os.fspath(self.out_dir))  # the record needs text
        check_values(self)
        at_least = {
            1: "batch_size grad_accumulation max_steps max_epochs final_tokens eval_every eval_examples save_every "
            "log_every keep_checkpoints context_parallel",
            0: "warmup_steps warmup_tokens weight_decay num_workers seed sample_tokens",
        }
        for least, names in at_least.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and value < least:
                    raise ValueError(f"{name} is {value}, wanted at least {least}")
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}, wanted at most 2**63 - 1")
        if self.save_every_minutes is not None and not self.save_every_minutes > 0:
            raise ValueError(f"save_every_minutes is {self.save_every_minutes}, wanted a number above 0, or none")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction is {self.final_fraction}, wanted 0 to 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, wanted a number between 0 and 1, or None for no average")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, wanted a number above 0")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"grad_clip is {self.grad_clip}, wanted a norm above 0, or None for no clipping")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}, wanted two numbers from 0 to below 1")
        if self.context_parallel > 1 and (self.parallel == "none" or self.compile):
            reason = "needs parallel ddp or fsdp" if self.parallel == "none" else "and compile exclude each other"
            raise ValueError(f"context_parallel {self.context_parallel} {reason}")
        if self.resume and self.out_dir is None:
            raise ValueError("resume needs a run directory: name it with --out-dir")
        if self.warmup_steps is not None and self.warmup_tokens is not None:
            raise ValueError("warmup_steps and warmup_tokens are both given: give only one of them")

    def total_steps(self, examples: int) -> int:
        """Steps of the whole run over a data set of this many examples."""
        limits = [] if self.max_steps is None else [self.max_steps]
        if self.max_epochs is not None:
            limits.append(-(-self.max_epochs * examples // (self.batch_size * self.grad_accumulation)))
        return min(limits, default=DEFAULT_STEPS)

    def learning_rates(self, total_steps: int, tokens_per_step: int) -> dict:
        """The arguments of `optim.learning_rate_at`, except the tokens."""
        warmup_steps = min(100, total_steps // 10) if self.warmup_steps is None else self.warmup_steps
        return {
            "peak": self.learning_rate,
            "warmup_tokens": warmup_steps * tokens_per_step if self.warmup_tokens is None else self.warmup_tokens,
            "final_tokens": self.final_tokens or total_steps * tokens_per_step,
            "schedule": self.schedule,
            "final_fraction": self.final_fraction,
            "decay": self.lr_decay,
        }

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class RunConfig:
    """The model that `python -m train` trains, and the text."""

    fused_kernels: bool = option(
        True, "attention by our kernels (Triton on CUDA, banded elsewhere), or in PyTorch", True
    )
    backend: Literal["auto", "triton", "banded", "reference"] = option("auto", "which of the fused kernels", True)
    # the path of a text may change, the text may not: a resumed run compares checksums (train/corpus.py)
    data: str = option("shakespeare", "shakespeare, tinyshakespeare, a UTF-8 or .jsonl file, a folder or a glob", True)
    val_data: str | None = option(None, "held-out text, named as for --data (none: the last 10 % of data)", True)
    documents: bool | None = option(
        None, "keep documents apart: files, lines of .jsonl, plays (none: where data is .jsonl or has several files)"
    )
    embedding_type: Literal[EMBEDDING_TYPES] = option("shakespearean", "a token is a character, a byte or a subword")
    vocab_size: int | None = option(None, f"tokens of a bpe vocabulary (none: {DEFAULT_VOCAB_SIZE})")
    tokenizer: str | None = option(None, "tokenizer.json to use as the vocabulary (none: one is made from the text)")
    token_cache: str | None = option(None, "directory for long texts' tokens (none: ~/.cache/sliding-gqa)", True)
    random_config: bool = option(False, "draw the model's sizes from the seed, except those that flags state")
    init_from: str | None = option(None, "model, run or transformers directory to train on from (none: a new one)")
    architecture: Literal[ARCHITECTURES] = option(
        "rope-window-gqa", "GPT-2, or RoPE, window, GQA, QK-norm added in turn"
    )
    context_size: int = option(512, "context length: tokens of a training example")
    window: int | None = option(64, "keys that a query sees in one layer, its own included (none: all)")
    window_pattern: str = option("S", "layers in turn: S has the window, L sees all; SSSL is three short, one long")
    prefix: int = option(0, "first positions of a document that every later query sees besides its window")
    n_layer: int = option(4, "layers")
    n_head: int = option(4, "query heads of a layer")
    n_kv_head: int = option(2, "KV heads of a layer, each shared by n_head / n_kv_head query heads")
    d_model: int = option(96, "width of the model")
    dropout: float = option(0.0, "probability of dropping an activation in training")

    def __post_init__(self):
        check_values(self)
        if self.backend != "auto" and not self.fused_kernels:
            raise ValueError(f"backend {self.backend} is one of the fused kernels: leave out --no-fused-kernels")
        if self.embedding_type == "shakesperean":
            object.__setattr__(self, "embedding_type", "shakespearean")
        if self.random_config and self.init_from is not None:
            raise ValueError("random_config draws the sizes of a new model: not with --init-from")
        if self.vocab_size is not None and self.embedding_type != "bpe":
            raise ValueError(f"vocab_size is {self.vocab_size}, but only --embedding-type bpe can choose its size")
        if self.tokenizer is not None and (self.vocab_size is not None or self.embedding_type == "byte"):
            raise ValueError(f"tokenizer {self.tokenizer} is a vocabulary: leave out --vocab-size and --embedding-type")

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The model that these settings describe. Raises ValueError for sizes that do not fit together."""
        same = ("window", "window_pattern", "prefix", "n_layer", "n_head", "n_kv_head", "d_model", "dropout")
        sizes = {name: getattr(self, name) for name in same} | {"context_length": self.context_size}
        sizes |= {"window": 1} if self.window is None else {}  # an architecture with a window needs one
        config = GPTConfig.for_architecture(self.architecture, vocab_size=vocab_size, **sizes)
        return dataclasses.replace(config, window=None) if self.window is None else config


def check_values(config) -> None:
    """Raises ValueError, which names the field, for a value of a wrong type or choice, an empty text, or no number."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value, choices = getattr(config, name), typing.get_args(hint)
        if typing.get_origin(hint) is Literal and value not in choices:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
        if not is_of_type(hint, value):
            raise ValueError(f"{name} is {value!r}, expected {getattr(hint, '__name__', hint)}")
        if value == "":
            raise ValueError(f"{name} is an empty text: name a file or folder, or leave it out")
        for number in value if isinstance(value, tuple | list) else [value]:
            if isinstance(number, numbers.Real) and not math.isfinite(number):
                raise ValueError(f"{name} is {number}, wanted a finite number")


def is_of_type(hint, value) -> bool:
    """Whether a field with this type hint can have the value, which may come from JSON."""
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return value in kinds
    if typing.get_origin(hint) is tuple:
        right = isinstance(value, tuple | list) and len(value) == len(kinds)
        return right and all(map(is_of_type, kinds, value))
    if kinds:  # X | None
        return any(is_of_type(kind, value) for kind in kinds)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, {int: numbers.Integral, float: numbers.Real}.get(hint, hint))


def add_flags(parser: argparse.ArgumentParser, config_class, groups: str | dict[str, str] = "flags") -> None:
    """Adds a flag for every field of a dataclass made with `option`, or of a tuple of them.

    groups: the heading, or {heading: names of fields}; the fields that are not named get no flag.
    """
    classes = config_class if isinstance(config_class, tuple) else (config_class,)
    fields = {field.name: field for one in classes for field in dataclasses.fields(one)}
    hints = {name: hint for one in classes for name, hint in typing.get_type_hints(one).items()}
    for title, names in ({groups: " ".join(fields)} if isinstance(groups, str) else groups).items():
        group = parser.add_argument_group(title)
        for field in map(fields.get, names.split()):
            default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
            default = default.lower() if default in ("None", "True", "False") else default
            meaning = field.metadata["meaning"]
            shown = meaning if f"({default}: " in meaning else f"{meaning} (default: {default})"
            group.add_argument(
                "--" + field.name.replace("_", "-"),
                dest=field.name,
                help=shown.replace("%", "%%"),
                **_argument_for(hints[field.name]),
            )
            # not in add_argument: before Python 3.13 BooleanOptionalAction would add it to the help a second time
            parser.set_defaults(**{field.name: field.default})


def renamed_flag(arguments: list[str]) -> str | None:
    """What to say of a flag that has another name here; None if there is none."""
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name in RENAMED:
            return f"--{name.replace('_', '-')} is called --{RENAMED[name].replace('_', '-')} here"
    return None


def from_flags(config_class, arguments: argparse.Namespace):
    """The dataclass filled from parsed flags. Its own checks may raise ValueError."""
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(config_class)}
    return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def stated_flags(parser: argparse.ArgumentParser, arguments: list[str] | None) -> set[str]:
    """The names of the flags that a command line states, even if with their default."""
    absent = object()
    names = vars(parser.parse_args([]))
    parsed = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(names, absent)))
    return {name for name, value in vars(parsed).items() if value is not absent}


def _argument_for(hint) -> dict:
    """The keywords of add_argument for a field of this type."""
    if hint in (bool, bool | None):
        return {"action": argparse.BooleanOptionalAction}
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return {"choices": kinds}
    if typing.get_origin(hint) is tuple:
        return {"type": kinds[0], "nargs": len(kinds), "metavar": tuple(kind.__name__.upper() for kind in kinds)}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (kind,) = (kind for kind in kinds if kind is not type(None))
        return {"type": _or_none(kind), "metavar": kind.__name__.upper()}
    return {"type": hint, "metavar": hint.__name__.upper()}


def _or_none(kind):
    def parse(word):
        return None if word.lower() == "none" else kind(word)

    parse.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return parse


# What --random-config draws, and from what. A drawn model trains in minutes on a CPU.
DRAWN_FIELDS = ("architecture", "context_size", "n_layer", "n_head", "n_kv_head", "d_model", "window", "window_pattern")
_HEADS, _HEAD_SIZES, _WIDTHS = (1, 2, 3, 4, 6, 8), (16, 32, 64), range(48, 129)


def random_config(run: RunConfig, seed: int, stated: set[str] = frozenset()) -> RunConfig:
    """`run` with its DRAWN_FIELDS drawn from the seed, except those in `stated`. Valid unless stated values clash.

    Each field has its own random generator, so a stated flag changes only the fields that must fit it.
    """
    values = {name: getattr(run, name) for name in DRAWN_FIELDS if name in stated}

    def draw(name, candidates):
        candidates = list(candidates)
        if name not in values:
            # all versions of Python seed alike with a string, and draw alike with random()
            fraction = random.Random(f"{seed} {name}").random()
            values[name] = candidates[int(fraction * len(candidates))] if candidates else getattr(run, name)
        return values[name]

    draw("architecture", ARCHITECTURES)
    context = draw("context_size", (32, 64, 128, 256))
    draw("n_layer", range(2, 6))
    width, kv_heads = values.get("d_model"), values.get("n_kv_head", 1)
    if width is None:
        heads = draw("n_head", (n for n in _HEADS if n % kv_heads == 0))
        draw("d_model", [heads * size for size in _HEAD_SIZES if heads * size in _WIDTHS] or [heads * _HEAD_SIZES[0]])
    else:  # the head size must be even for rotary positions
        heads = draw("n_head", (n for n in _HEADS if n % kv_heads == 0 and width % (2 * n) == 0))
    draw("n_kv_head", [n for n in range(1, heads) if heads % n == 0] or [1])  # fewer than n_head, if possible
    draw("window", sorted({max(1, context // parts) for parts in (8, 4, 2)}))
    draw("window_pattern", ("S", "SL", "SSL", "SSSL"))
    return dataclasses.replace(run, **values)


def random_config_flags(run: RunConfig) -> str:
    """The flags that make the drawn model again, without those that its architecture ignores."""
    has = "rope-window-gqa" if run.architecture == "modern" else run.architecture
    unused = set() if "window" in has else {"window", "window_pattern"}
    unused |= set() if "gqa" in has else {"n_kv_head"}
    values = {name: getattr(run, name) for name in DRAWN_FIELDS if name not in unused}
    flags = ((f"--{name.replace('_', '-')}", "none" if v is None else str(v)) for name, v in values.items())
    return shlex.join(word for flag in flags for word in flag)

"""One training run of the study and every figure of its model that is not a time.

A run depends only on its settings and its seed: they fix the weights, the order of the examples and every loss.

The copying task asks how far a model reaches. It must repeat the first letter of a text at the end:

    letter  noise noise noise ... noise  ?          only the answer to `?` counts
    |<------------ distance ------------>|

A query of a sliding layer sees window - 1 keys before it, so n_layer layers carry a letter over at most
n_layer * (window - 1) characters. Beyond that distance a model can only guess; without a window it can always answer.
"""

import contextlib
import io
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from model import GPT, GPTConfig, generate
from train.config import TrainerConfig
from train.data import TextData, TokenDataset, evaluation_batches
from train.trainer import Trainer

from .plan import MODIFIED, ORIGINAL, Run, Settings, model_config

LONGEST = 4  # loss by position is measured on texts of this many contexts
# GPT-2's optimizer, written out: the trainer's defaults may change, the runs of a resumed study must not
OPTIMIZER = dict(optimizer="adamw", weight_decay=0.1, betas=(0.9, 0.99), grad_clip=1.0)
SCHEDULE = dict(schedule="cosine", final_fraction=0.1)
SAMPLE_CHARACTERS, TEMPERATURE, TOP_K = 200, 0.8, 40

LETTERS, NOISE = 8, 8
QUESTION = LETTERS + NOISE
COPY_MODEL = dict(vocab_size=QUESTION + 1, window=8, n_layer=2, n_head=4, n_kv_head=2, d_model=32)
REACH = COPY_MODEL["n_layer"] * (COPY_MODEL["window"] - 1)
DISTANCES = {"in one window": 6, "in reach of two layers": 10, "out of reach": REACH + 6}
COPY_ARCHITECTURES = (ORIGINAL, "rope", MODIFIED)
COPY_BATCH, COPY_RATE, COPY_TESTS = 32, 1e-2, 1024


def train_and_measure(run: Run, settings: Settings, data: TextData) -> dict:
    """Trains the model of a run; returns its losses, a sample and its size as JSON values."""
    held_out = TokenDataset(data.held_out.tokens, run.context, data.tokenizer)
    model = make_model(run, settings, data.tokenizer.vocab_size)
    evaluation = dict(
        eval_every=max(1, run.steps // settings.effort("curve_points")),
        eval_examples=max(1, settings.effort("curve_tokens") // run.context),
    )
    trainer = train_on_text(model, run, settings, data, held_out, max_steps=run.steps, **evaluation)
    steps, losses = trainer.history.series("held_out_loss")
    prompt = torch.tensor([[data.tokenizer.stoi.get("\n", 0)]])
    sample = generate(model, prompt, SAMPLE_CHARACTERS, temperature=TEMPERATURE, top_k=TOP_K, seed=run.seed)
    return {
        "parameters": model.num_parameters(),
        "tokens_per_step": trainer.tokens_per_step,
        "curve": [list(point) for point in zip(steps, losses, strict=True)],
        "loss": held_out_loss(model, held_out, settings.effort("held_out_tokens") // run.context),
        "loss_by_position": loss_by_position(model, data, settings.effort("position_tokens")),
        "sample": data.tokenizer.decode([int(token) for token in sample]),
    }


def make_model(run: Run, settings: Settings, vocab_size: int, fused_kernels: bool | None = None) -> GPT:
    """The untrained model of a run, on the kernels of the settings by default."""
    fused_kernels = settings.fused_kernels if fused_kernels is None else fused_kernels
    return GPT(model_config(run, settings, vocab_size), fused_kernels, seed=run.seed).to(settings.device)


def train_on_text(model, run: Run, settings: Settings, data: TextData, held_out, **options) -> Trainer:
    """Trains a model on the text with the same options for every architecture."""
    dataset = TokenDataset(data.training.tokens, run.context, data.tokenizer)
    # contexts of any length read about the same number of tokens a step
    batch_size = max(1, round(settings.tokens_per_step / run.context))
    return train_quietly(
        model, dataset, held_out, settings, run.seed, batch_size=batch_size, learning_rate=run.learning_rate, **options
    )


def train_quietly(model, dataset, held_out, settings: Settings, seed: int, *, max_steps: int, **options) -> Trainer:
    """A trainer that has trained to the end without a progress bar. Raises KeyboardInterrupt after Ctrl-C."""
    config = TrainerConfig(
        max_steps=max_steps,
        warmup_steps=min(100, max_steps // 10),
        device=settings.device,
        seed=seed,
        sample_tokens=0,
        **OPTIMIZER,
        **SCHEDULE,
        **options,
    )
    trainer = Trainer(model, dataset, held_out, config)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer.train()
    if trainer.interrupted:
        raise KeyboardInterrupt
    return trainer


@torch.no_grad()
def held_out_loss(model, dataset, examples: int) -> float:
    """Mean loss (nats per character) over contexts spread evenly over the held-out text, the same for every model."""
    model.eval()
    total, count = 0.0, 0
    for x, y in evaluation_batches(dataset, batch_size=64, examples=max(1, examples)):
        _, loss = model(*_on_device(model, x, y))
        total, count = total + loss.item() * len(x), count + len(x)
    return total / count


@torch.no_grad()
def loss_by_position(model, data: TextData, tokens: int) -> list[list]:
    """[[first, last, mean loss]] by the position in the text, from 1 to LONGEST contexts.

    Learned positions end with the context. Rotary positions continue past the training length.
    """
    context = model.config.context_length
    length = context if model.config.positions == "learned" else LONGEST * context
    # the same long texts for every model; a model with learned positions reads their beginnings
    dataset = TokenDataset(data.held_out.tokens, LONGEST * context, data.tokenizer)
    model.eval()
    sums, count = torch.zeros(length, dtype=torch.float64), 0
    for x, y in evaluation_batches(dataset, batch_size=16, examples=max(1, tokens // (LONGEST * context))):
        x, y = _on_device(model, x[:, :length], y[:, :length])
        logits, _ = model(x)  # (B, length, V)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(x.shape)
        sums, count = sums + losses.double().sum(dim=0).cpu(), count + len(x)
    return [
        [first, last, (sums[first - 1 : last].sum() / (count * (last - first + 1))).item()]
        for first, last in position_bins(context)
        if last <= length
    ]


def position_bins(context: int) -> list[tuple[int, int]]:
    """Bins (first, last) of positions: doubling up to the context, then up to two and four contexts."""
    ends = [2**i for i in range(context.bit_length()) if 2**i < context]
    # a last bin of few positions would be noise
    ends = [end for end in ends if end <= 0.75 * context] + [context, 2 * context, LONGEST * context]
    return [(before + 1, end) for before, end in zip([0, *ends], ends, strict=False)]


def _on_device(model, *tensors):
    return [tensor.to(model.wte.weight.device) for tensor in tensors]


class CopyRun(NamedTuple):
    """One model on the copying task at one distance."""

    architecture: str
    distance: int
    steps: int
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"copying-{self.architecture}-distance{self.distance}-steps{self.steps}-seed{self.seed}"


def copying_runs(settings: Settings) -> list[CopyRun]:
    """Every run of the copying task."""
    places = itertools.product(COPY_ARCHITECTURES, DISTANCES.values())
    return [CopyRun(name, distance, settings.copying_steps) for name, distance in places]


def copying_texts(count: int, distance: int, seed: int) -> TensorDataset:
    """Texts of distance + 1 characters as (x, y): y is the letter at the end, and -1 (not counted) before it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(LETTERS, LETTERS + NOISE, (count, distance + 1), generator=generator)
    x[:, 0] = torch.randint(LETTERS, (count,), generator=generator)
    x[:, -1] = QUESTION
    y = torch.full_like(x, -1)
    y[:, -1] = x[:, 0]
    return TensorDataset(x, y)


def copy_model(run: CopyRun, settings: Settings) -> GPT:
    """A small untrained model whose context holds one text."""
    config = GPTConfig.for_architecture(run.architecture, context_length=run.distance + 1, **COPY_MODEL)
    return GPT(config, settings.fused_kernels, seed=run.seed).to(settings.device)


def copy_and_measure(run: CopyRun, settings: Settings) -> dict:
    """Trains a model on the copying task; returns its accuracy on other texts as a JSON value."""
    model = copy_model(run, settings)
    # seeds 2 n and 2 n + 1: no seed serves both training and test
    texts = copying_texts(run.steps * COPY_BATCH, run.distance, 2 * run.seed)
    options = dict(max_steps=run.steps, batch_size=COPY_BATCH, learning_rate=COPY_RATE)
    train_quietly(model, texts, None, settings, run.seed, **options)
    x, y = copying_texts(COPY_TESTS, run.distance, 2 * run.seed + 1).tensors
    model.eval()
    with torch.no_grad():
        logits, _ = model(x.to(settings.device))
    right = logits[:, -1].argmax(dim=-1).cpu() == y[:, -1]
    return {"accuracy": right.double().mean().item()}

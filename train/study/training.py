"""One training run of the study, and everything that is measured on its model.

A run is a function of its settings and its seed: the weights, the order of the examples and so every loss. No figure
here is a time; those are speed.py's.
"""

import contextlib
import io
import math

import torch
import torch.nn.functional as F

from model import GPT, CharTokenizer, generate

from ..config import TrainerConfig
from ..data import TextData, TokenDataset, evaluation_batches
from ..trainer import Trainer
from .plan import Run, Settings, model_config

STRETCH = 4  # loss by position is measured on texts of so many contexts
# GPT-2's optimizer, stated here and not left to the trainer's defaults: a study that is gone on with must not change
OPTIMIZER = dict(
    optimizer="adamw",
    schedule="cosine",
    final_fraction=0.1,
    weight_decay=0.1,
    betas=(0.9, 0.99),
    grad_clip=1.0,
)
SAMPLE_CHARACTERS, TEMPERATURE, TOP_K = 200, 0.8, 40


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run: the trainer ends it in good order, and the study ends with it."""


def check_length(data: TextData, contexts) -> None:
    """Raises ValueError where the held-out part is shorter than STRETCH contexts."""
    needed = STRETCH * max(contexts) + 1
    if len(data.held_out.tokens) < needed:
        raise ValueError(
            f"data has a held-out part of {len(data.held_out.tokens):,} characters, and context {max(contexts)} needs "
            f"{needed:,}: give a longer text or a smaller --context-size"
        )


def train_and_measure(run: Run, settings: Settings, data: TextData) -> dict:
    """Trains the model of a run; what is known of it, as JSON values."""
    dataset = TokenDataset(data.training.tokens, run.context, data.tokenizer)
    held_out = TokenDataset(data.held_out.tokens, run.context, data.tokenizer)
    model = make_model(run, settings, dataset.vocab_size)
    trainer = quiet_trainer(model, dataset, held_out, trainer_config(run, settings))
    history = trainer.history
    steps, losses = history.series("held_out_loss")
    loss = held_out_loss(model, held_out, settings.held_out_tokens // run.context)
    return {
        "run": run._asdict(),
        "parameters": model.num_parameters(),
        "tokens": settings.steps * trainer.tokens_per_step,
        "tokens_per_step": trainer.tokens_per_step,
        "curve": [list(point) for point in zip(steps, losses, strict=True)],
        "training_loss": history.series("loss")[1][-1],
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_character": loss / math.log(2),
        "loss_by_position": loss_by_position(model, data, settings.position_tokens),
        "sample": write(model, data.tokenizer, run.seed),
    }


def make_model(run: Run, settings: Settings, vocab_size: int, fused_kernels: bool | None = None) -> GPT:
    """The untrained model of a run, on the settings' kernels unless told otherwise."""
    config = model_config(
        run.architecture,
        settings,
        vocab_size=vocab_size,
        context=run.context,
        window=run.window,
        width=run.width,
    )
    fused_kernels = settings.fused_kernels if fused_kernels is None else fused_kernels
    return GPT(config, fused_kernels, seed=run.seed).to(settings.device)


def trainer_config(run: Run, settings: Settings) -> TrainerConfig:
    """The same for every architecture."""
    batch_size = settings.batch_size(run.context)
    return TrainerConfig(
        max_steps=settings.steps,
        batch_size=batch_size,
        learning_rate=run.learning_rate,
        warmup_steps=min(100, settings.steps // 10),
        device=settings.device,
        seed=run.seed,
        eval_every=max(1, settings.steps // settings.curve_points),
        eval_examples=max(1, settings.curve_tokens // run.context),
        sample_tokens=0,
        **OPTIMIZER,
    )


def quiet_trainer(model, dataset, held_out, config: TrainerConfig) -> Trainer:
    """A trainer that has trained to the end, without its progress bar: the study has one of its own."""
    trainer = Trainer(model, dataset, held_out, config)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer.train()
    if trainer.interrupted:
        raise Interrupted
    return trainer


@torch.no_grad()
def held_out_loss(model, dataset, examples: int) -> float:
    """Mean loss (nats a character) over contexts spread evenly over the held-out text; the same for every model."""
    model.eval()
    total, count = 0.0, 0
    for x, y in evaluation_batches(dataset, batch_size=64, examples=max(1, examples)):
        _, loss = model(*_on_device(model, x, y))
        total, count = total + loss.item() * len(x), count + len(x)
    return total / count


@torch.no_grad()
def loss_by_position(model, data: TextData, tokens: int) -> list[list]:
    """[[first, last, mean loss]] by how many characters the model had before it: 1 .. STRETCH contexts.

    Learned positions stop at the context; rotary ones are asked to go on past what they were trained on.
    """
    context = model.config.context_length
    length = context if model.config.positions == "learned" else STRETCH * context
    # long texts for every model: those that stop early must read the beginnings of the same ones
    dataset = TokenDataset(data.held_out.tokens, STRETCH * context, data.tokenizer)
    model.eval()
    sums, count = torch.zeros(length, dtype=torch.float64), 0
    for x, y in evaluation_batches(dataset, batch_size=16, examples=max(1, tokens // (STRETCH * context))):
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
    """Positions (first, last) of the bins: doubling up to the context, then up to twice and four times it."""
    ends = [2**i for i in range(context.bit_length()) if 2**i < context]
    # a last bin of a few positions would be noise
    ends = [end for end in ends if end <= 0.75 * context] + [context, 2 * context, STRETCH * context]
    return [(before + 1, end) for before, end in zip([0, *ends], ends, strict=False)]


def write(model, tokenizer: CharTokenizer, seed: int) -> str:
    """A passage after a line break, or after the vocabulary's first character where it has none."""
    prompt = torch.tensor([[tokenizer.stoi.get("\n", 0)]])
    new = generate(model, prompt, SAMPLE_CHARACTERS, temperature=TEMPERATURE, top_k=TOP_K, seed=seed)
    return tokenizer.decode([int(token) for token in new])


def _on_device(model, *tensors):
    return [tensor.to(model.wte.weight.device) for tensor in tensors]

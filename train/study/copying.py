"""How far does a model reach? A letter at the beginning of a text has to be said at its end.

    letter  noise noise noise ... noise  ?          only the answer to `?` counts
    |<------------ distance ------------>|

A query of a sliding layer sees itself and window - 1 keys before it, so a stack of layers carries a letter over at most
n_layer * (window - 1) characters. Past that the best a model can do is to guess. A model that sees everything can
always answer.
"""

from typing import NamedTuple

import torch

from model import GPT, GPTConfig

from ..config import TrainerConfig
from .plan import MODIFIED, Settings
from .training import OPTIMIZER, quiet_trainer

LETTERS, NOISE = 8, 8
QUESTION = LETTERS + NOISE
VOCABULARY = QUESTION + 1
LAYERS, HEADS, WIDTH, WINDOW = 2, 4, 32, 8
REACH = LAYERS * (WINDOW - 1)
DISTANCES = {"in one window": WINDOW - 2, "in reach of two layers": WINDOW + 2, "out of reach": REACH + 6}
ARCHITECTURES = ("original", "rope", MODIFIED)
BATCH, LEARNING_RATE = 32, 1e-2
TESTED = 1024  # other texts than those trained on


class CopyRun(NamedTuple):
    """One model on the task at one distance."""

    architecture: str
    distance: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"copying-{self.architecture}-distance{self.distance}-seed{self.seed}"


class CopyingTexts:
    """`count` texts of distance + 1 characters as (x, y): y is the letter at the end and -1, not counted, before it."""

    def __init__(self, count: int, distance: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randint(LETTERS, LETTERS + NOISE, (count, distance + 1), generator=generator)
        self.x[:, 0] = torch.randint(LETTERS, (count,), generator=generator)
        self.x[:, -1] = QUESTION
        self.y = torch.full_like(self.x, -1)
        self.y[:, -1] = self.x[:, 0]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]

    def batch(self, indices):
        """Examples `indices` (B,) at once: x and y (B, distance + 1)."""
        return self[torch.as_tensor(indices)]


def model_config(architecture: str, distance: int) -> GPTConfig:
    """A small model whose context holds one text."""
    return GPTConfig.for_architecture(
        architecture,
        vocab_size=VOCABULARY,
        context_length=distance + 1,
        window=WINDOW,
        n_layer=LAYERS,
        n_head=HEADS,
        n_kv_head=HEADS // 2,
        d_model=WIDTH,
    )


def copy_and_measure(run: CopyRun, settings: Settings, steps: int) -> dict:
    """Trains a model on the task; how often it is right on texts that it has not seen, as JSON values."""
    model = GPT(model_config(run.architecture, run.distance), settings.fused_kernels, seed=run.seed)
    model.to(settings.device)
    training = TrainerConfig(
        max_steps=steps,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        device=settings.device,
        warmup_steps=min(100, steps // 10),
        seed=run.seed,
        sample_tokens=0,
        **OPTIMIZER,
    )
    # seeds 2 n and 2 n + 1: no text is trained on and tested with
    quiet_trainer(model, CopyingTexts(steps * BATCH, run.distance, 2 * run.seed), None, training)
    texts = CopyingTexts(TESTED, run.distance, 2 * run.seed + 1)
    model.eval()
    with torch.no_grad():
        logits, _ = model(texts.x.to(settings.device))
    right = logits[:, -1].argmax(dim=-1).cpu() == texts.y[:, -1]
    return {"run": run._asdict(), "accuracy": right.double().mean().item()}


def copying_runs() -> list[CopyRun]:
    """All of them."""
    return [CopyRun(name, distance, 0) for name in ARCHITECTURES for distance in DISTANCES.values()]

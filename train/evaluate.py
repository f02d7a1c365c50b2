"""How good is a checkpoint? Its loss over the whole held-out text, every token predicted exactly once.

    python -m train.evaluate --checkpoint runs/first/best
    python -m train.evaluate --checkpoint runs/first/best --stride 16 --data other.txt
    python -m train.evaluate --checkpoint imported/gpt2 --data my.txt --context-size 256

The held-out text is the last 10 % of the text the checkpoint was trained on, or of --data. A token is a character, or
what an imported vocabulary has. They are read in contexts of the model's own length, `stride` tokens apart. By default
these do not overlap, as in nanoGPT's estimate: the first token of a context is predicted from one token only, the last
from all of them. A smaller stride gives every token at least (context - stride + 1) to look back on, and a lower loss,
for context / stride times the work. The last line of stdout is one JSON object.
"""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from model import CharTokenizer, from_pretrained

from .checkpoint import read_facts
from .config import resolve_device
from .data import encode_fast, fingerprint, load_text, split
from .flags import Parser, add_flags, from_flags, option


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, and how."""

    checkpoint: str | None = option(None, "model directory, such as runs/first/best")
    data: str | None = option(None, "text whose last 10 % is read, as in training (none: that of the training run)")
    stride: int | None = option(None, "tokens from one context to the next (none: the context size, no overlap)")
    context_size: int | None = option(None, "tokens in a context (none: the model's own context length)")
    batch_size: int = option(64, "contexts in a batch, fewer where their logits would take more than 1 GB")
    device: str = option("auto", "cpu, cuda, cuda:1, ... (auto: a CUDA device where there is one)")
    fused_kernels: bool = option(True, "attention by our kernels; otherwise plain PyTorch")

    def __post_init__(self):
        if self.checkpoint is None:
            raise ValueError("--checkpoint is missing: name a model directory, such as runs/first/best")
        for name in ("batch_size", "context_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least 1")


@torch.no_grad()
def evaluate(
    model,
    tokens,
    *,
    stride: int | None = None,
    context_size: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> dict:
    """Mean loss of predicting tokens[1:], each exactly once, from the tokens before it in its context.

    tokens (N,) integers, N >= 2; context_size defaults to the model's context length; stride 1 .. context_size.
    Returns targets (their number), loss (nats), perplexity and bits per token. The model is left in the mode it was in.
    """
    length = model.config.context_length if context_size is None else context_size
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"stride is {stride}, wanted 1 to the context size, {length}")
    if len(tokens) < 2:
        raise ValueError(f"text has {len(tokens)} tokens, at least 2 are needed to predict one from another")
    batch_size = max(1, min(batch_size, 2**28 // (length * model.config.vocab_size)))
    device = next(model.parameters()).device
    starts = torch.arange(0, max(1, len(tokens) - 1 - (length - stride)), stride)
    was_training = model.training
    model.eval()
    total, counted = 0.0, 0
    for rows in tqdm(starts.split(batch_size), unit="batch", disable=not progress, mininterval=0.5):
        x, y = _contexts(tokens, rows, length, stride)
        targets = int((y >= 0).sum())
        _, loss = model(x.to(device), y.to(device))
        total, counted = total + loss.double().item() * targets, counted + targets
    model.train(was_training)
    loss = total / counted
    return {"targets": counted, "loss": loss, "perplexity": math.exp(loss), "bits_per_token": loss / math.log(2)}


def _contexts(tokens, starts, length, stride):
    """Inputs and targets (B, length) of the contexts at `starts`; targets that are not counted here are -1.

    length 4, stride 2:   start 0   a b c d      every target of the first context counts,
                          start 2       c d e f  later ones only their last two
    """
    positions = starts[:, None] + torch.arange(length + 1)  # (B, length + 1)
    chunk = tokens[positions.clamp(max=len(tokens) - 1)].long()
    x, y = chunk[:, :-1], chunk[:, 1:].clone()
    counted_before = (starts[:, None] > 0) & (torch.arange(length) < length - stride)
    y[counted_before | (positions[:, 1:] >= len(tokens))] = -1  # causal: what stands in x past the end harms nothing
    return x, y


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = Parser(prog="python -m train.evaluate", description=__doc__)
    add_flags(parser, EvaluateConfig, "flags")
    flags = parser.parse_args(arguments)
    try:
        config = from_flags(EvaluateConfig, flags)
        device = resolve_device(config.device)
        model, tokenizer = from_pretrained(config.checkpoint, fused_kernels=config.fused_kernels, device=device)
        if tokenizer is None:
            raise ValueError(f"checkpoint {config.checkpoint} has no tokenizer.json, which turns text into tokens")
        source, text = _text(config)
        text = split(text)[1]
        tokens = encode_fast(text, tokenizer)
        began = time.perf_counter()
        result = evaluate(
            model,
            tokens,
            stride=config.stride,
            context_size=config.context_size,
            batch_size=config.batch_size,
            progress=True,
        )
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        parser.error(str(error).splitlines()[0])
    seconds = time.perf_counter() - began
    length = config.context_size or model.config.context_length
    stride = config.stride or length
    # what the tokens spell that were predicted: all but the first
    characters = len(text) - len(tokenizer.decode(tokens[:1]))
    result["bits_per_character"] = result.pop("bits_per_token") * result["targets"] / characters
    unit = "characters" if isinstance(tokenizer, CharTokenizer) else f"tokens ({characters:,} characters)"
    print(f"{config.checkpoint} on the held-out part of {source}: {result['targets']:,} {unit}, each once, in")
    print(f"contexts of {length}, {stride} apart, in {seconds:.1f} s")
    print(f"loss {result['loss']:.4f} nats, perplexity {result['perplexity']:.3f}, ", end="")
    print(f"{result['bits_per_character']:.4f} bits per character")
    about = {"checkpoint": str(config.checkpoint), "data": source, "context_length": length}
    print(json.dumps(about | {"stride": stride} | result | {"seconds": round(seconds, 2)}))
    return 0


def _text(config) -> tuple[str, str]:
    """(its name, the text) to take the held-out part of: --data, or what the checkpoint was trained on, unchanged."""
    if config.data is not None:
        return config.data, load_text(config.data)
    trained_on = read_facts(Path(config.checkpoint)).get("run", {}).get("data")
    if trained_on is None:
        raise ValueError(f"checkpoint {config.checkpoint} does not say what text it saw: name one with --data")
    text = load_text(trained_on["source"])
    if fingerprint(text) != trained_on["sha256"]:
        raise ValueError(
            f"{trained_on['source']} is not the text this checkpoint was trained on, so its last 10 % may not be held "
            f"out: name it with --data to evaluate on it all the same"
        )
    return trained_on["source"], text


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\npython -m train.evaluate: interrupted", file=sys.stderr)
        sys.exit(130)

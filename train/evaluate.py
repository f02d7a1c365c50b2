"""The loss of a checkpoint over the whole held-out text; every token is predicted exactly once.

    python -m train.evaluate --checkpoint runs/first                      # a run: its best weights, else its last
    python -m train.evaluate --checkpoint runs/first/last --stride 16 --data other.txt
    python -m train.evaluate --checkpoint imported/gpt2 --val-data my.txt --context-size 256

The held-out text is the training run's (its --val-data, or the last 10 % of its text, which must be unchanged); or the
last 10 % of --data; or all of --val-data. The model reads it in contexts of its own length, `stride` tokens apart. By
default contexts do not overlap, as in nanoGPT's estimate: the first token of a context is predicted from one token
only, the last from all of them. With a smaller stride, every token is predicted from at least (context - stride + 1)
tokens: the loss is lower, and the work context / stride times as much. Bits per character and per byte compare models
of different vocabularies. Documents that training kept apart are kept apart here: the held-out ones are cut into
contexts one by one, the first token of each is not predicted, and neither are prompts. The last line of stdout is one
JSON object.
"""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from model import CharTokenizer, from_pretrained
from model.checkpoint import resolve_checkpoint
from model.command import Parser, command_output, resolve_device, use_fast_products
from model.shared_cores import SharedCores

from .config import add_flags, check_values, from_flags, option
from .corpus import Corpus
from .documents import PackedDataset
from .run_directory import read_facts
from .tokens import Encoded, tokenize

PROGRAM = "python -m train.evaluate"


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The flags of `python -m train.evaluate`."""

    checkpoint: str | None = option(None, "model directory, or run directory (its best, else its last)")
    data: str | None = option(None, "text whose last 10 % is read, as in training (none: that of the training run)")
    val_data: str | None = option(None, "text that is read as a whole: a file, a folder or a glob")
    documents: bool | None = option(None, "keep documents apart (none: as in training, else as training would)")
    token_cache: str | None = option(None, "directory for the tokens of long texts (none: ~/.cache/sliding-gqa)")
    stride: int | None = option(None, "tokens from one context to the next (none: the context size, no overlap)")
    context_size: int | None = option(None, "tokens in a context (none: the model's own context length)")
    batch_size: int = option(64, "contexts in a batch")
    device: str = option("auto", "cpu, cuda, cuda:1, ... (auto: a CUDA device where there is one)")
    fused_kernels: bool = option(True, "attention by our kernels; otherwise plain PyTorch")
    backend: Literal["auto", "triton", "banded", "reference"] = option("auto", "which of the fused kernels")

    def __post_init__(self):
        check_values(self)
        if self.backend != "auto" and not self.fused_kernels:
            raise ValueError(f"backend {self.backend} is one of the fused kernels: leave out --no-fused-kernels")
        if self.checkpoint is None:
            raise ValueError("--checkpoint is missing: name a run or model directory, such as runs/first")
        if self.data is not None and self.val_data is not None:
            raise ValueError("data and val_data are both given: give only one of them")
        for name in ("batch_size", "context_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least 1")


@torch.no_grad()
def evaluate(
    model,
    tokens,
    *,
    stride: int | None = None,
    context_length: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> dict:
    """Mean loss of predicting tokens[1:], each exactly once, from the tokens before it in its context.

    tokens (N,): integers or a TokenFile, N >= 2; or a `PackedDataset`, which has its own stride and context_length.
    context_length: None takes the model's. stride: 1 to context_length; None takes context_length. Returns targets
    (their number), loss (nats), perplexity and bits_per_token. The model keeps its mode (train or eval).
    """
    packed = isinstance(tokens, PackedDataset)
    length = tokens.context_length if packed else context_length or model.config.context_length
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"stride is {stride}, wanted 1 to the context length, {length}")
    if not packed and len(tokens) < 2:
        raise ValueError(f"text has {len(tokens)} tokens, at least 2 are needed to predict one from another")
    device = next(model.parameters()).device
    contexts = range(len(tokens)) if packed else range(0, max(1, len(tokens) - 1 - (length - stride)), stride)
    batches = (contexts[first : first + batch_size] for first in range(0, len(contexts), batch_size))
    bar = tqdm(batches, total=-(-len(contexts) // batch_size), unit="batch", disable=not progress, mininterval=0.5)
    was_training = model.training
    model.eval()
    total, counted = 0.0, 0
    for rows in bar:
        x, y, *starts = tokens.batch(rows) if packed else _contexts(tokens, torch.tensor(rows), length, stride)
        targets = int((y >= 0).sum())
        x, y, *starts = (tensor.to(device) for tensor in (x, y, *starts))
        _, loss = model(x, y, None, *starts, with_logits=False)
        total, counted = total + loss.double().item() * targets, counted + targets
    model.train(was_training)
    loss = total / counted
    return {"targets": counted, "loss": loss, "perplexity": math.exp(loss), "bits_per_token": loss / math.log(2)}


def _contexts(tokens, starts, length, stride):
    """Inputs and targets (B, length) of the contexts at `starts`; targets that do not count here are -1.

    length 4, stride 2:   start 0   a b c d      every target of the first context counts,
                          start 2       c d e f  of the others the last two
    """
    positions = starts[:, None] + torch.arange(length + 1)  # (B, length + 1)
    chunk = tokens[positions.clamp(max=len(tokens) - 1)].long()
    x, y = chunk[:, :-1], chunk[:, 1:].clone()
    counted_before = (starts[:, None] > 0) & (torch.arange(length) < length - stride)
    # the model is causal: what x holds past the end does not matter
    y[counted_before | (positions[:, 1:] >= len(tokens))] = -1
    return x, y


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 if the result cannot be written, 2 for unusable input."""
    with command_output(PROGRAM) as output:
        _main(arguments)
        return 0 if output.error is None or isinstance(output.error, BrokenPipeError) else 1


def _main(arguments):
    parser = Parser(prog=PROGRAM, description=__doc__)
    add_flags(parser, EvaluateConfig)
    flags = parser.parse_args(arguments)
    try:
        config = from_flags(EvaluateConfig, flags)
        device, checkpoint = resolve_device(config.device), resolve_checkpoint(config.checkpoint)
        use_fast_products(device)
        kernels = {"fused_kernels": config.fused_kernels, "backend": config.backend}
        model, tokenizer = from_pretrained(checkpoint, **kernels, device=device)
        if tokenizer is None:
            raise ValueError(f"checkpoint {checkpoint} has no tokenizer.json, which turns text into tokens")
        source, part, held_out = held_out_text(config, checkpoint, tokenizer)
        began, length = time.perf_counter(), config.context_size or model.config.context_length
        documents = PackedDataset(held_out, length, tokenizer, config.stride) if held_out.in_documents else None
        with SharedCores(device):
            result = evaluate(
                model,
                held_out.tokens if documents is None else documents,
                stride=config.stride,
                context_length=length,
                batch_size=config.batch_size,
                progress=True,
            )
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        parser.error(str(error).splitlines()[0])
    seconds = time.perf_counter() - began
    stride = config.stride or length
    # the characters and bytes of the predicted tokens: all but the first, or of documents all but the first or a prompt
    spans = [(0, 1)] if documents is None else [(a, max(a + 1, b)) for a, _, b in documents.documents.tolist()]
    given = [tokenizer.decode(held_out.tokens[first:last].tolist()) for first, last in spans]
    given = ["" if text == "\ufffd" else text for text in given]  # a part of a character; its rest was predicted
    characters = held_out.characters - sum(map(len, given))
    size = held_out.bytes - sum(len(text.encode()) for text in given)
    bits = result.pop("bits_per_token") * result["targets"]
    result |= {"characters": characters, "bytes": size}
    result |= {"bits_per_character": bits / characters, "bits_per_byte": bits / size}
    unit = "characters" if isinstance(tokenizer, CharTokenizer) else f"tokens ({characters:,} characters)"
    unit += "" if documents is None else f" of {len(documents.documents):,} documents"
    print(f"{checkpoint} on {part} {source}: {result['targets']:,} {unit}, each once, in")
    print(f"contexts of {length}, {stride} apart, in {seconds:.1f} s")
    print(f"loss {result['loss']:.4f} nats, perplexity {result['perplexity']:.3f}, ", end="")
    print(f"{result['bits_per_character']:.4f} bits per character, {result['bits_per_byte']:.4f} per byte")
    about = {"checkpoint": str(checkpoint), "data": source, "context_length": length}
    print(json.dumps(about | {"stride": stride} | result | {"seconds": round(seconds, 2)}))


def held_out_text(config: EvaluateConfig, checkpoint: Path, tokenizer) -> tuple[str, str, Encoded]:
    """(source, which part of it, its tokens) of the text that --val-data, --data or the training run names.

    Raises ValueError if none of them names one, or the run's text has changed.
    """
    recorded, documents = read_facts(checkpoint).get("run", {}).get("data"), config.documents
    if documents is None and recorded is not None:
        documents = "documents" in recorded
    if config.val_data is not None or config.data is not None:
        source, whole = config.val_data or config.data, config.val_data is not None
        corpus = Corpus(source, documents)
        first = 0 if whole else corpus.boundary()
    else:
        if recorded is None:
            raise ValueError(
                f"checkpoint {checkpoint} does not say what text it was trained on: name one with --data or --val-data"
            )
        whole = recorded.get("validation") is not None
        recorded = recorded["validation"] if whole else recorded
        source = recorded["source"]
        corpus = Corpus(source, "documents" in recorded)
        if corpus.scan.sha256 != recorded["sha256"]:
            raise ValueError(
                f"{source} is not the text this checkpoint was {'validated' if whole else 'trained'} on, so "
                f"{'losses would not compare' if whole else 'its last 10 % may not be held out'}: name it with "
                f"{'--val-data' if whole else '--data'} to evaluate on it nevertheless"
            )
        first = 0 if whole else corpus.boundary()
        corpus = corpus if documents == corpus.in_documents else Corpus(source, documents)
    encoded = tokenize(corpus, tokenizer, first, cache=config.token_cache)
    return source, "all of" if whole else "the held-out part of", encoded


if __name__ == "__main__":
    sys.exit(main())

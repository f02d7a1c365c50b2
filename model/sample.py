"""Generate text with a trained model.

    python -m model.sample --checkpoint runs/shakespeare --prompt "ROMEO:" --max-new-tokens 500
    python -m model.sample --checkpoint runs/shakespeare --temperature 0.8 --top-k 20 --seed 1 --num-samples 3
    python -m model.sample --checkpoint runs/shakespeare --prompt "ROMEO:" --min-p 0.1 --stop-string "\\n\\n"

The text goes to standard output as it is made, everything else to standard error. Exit status: 0; 2 for a wrong
argument or model directory; 130 after Ctrl-C, which keeps the text so far; 1 if the reader of a pipe closes it.
"""

import argparse
import os
import sys
import time
from types import SimpleNamespace

import torch

from .checkpoint import from_pretrained, resolve_checkpoint
from .command import Parser, resolve_device
from .gpt import attention_backend
from .sampling import TextUntil, generate


def make_parser():
    parser = Parser(
        prog="python -m model.sample",
        description="Generate text with a trained model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a model directory, or a run directory: best, else last")
    add("--prompt", default="\n", help="text to continue")
    add("--max-new-tokens", type=int, default=500, metavar="N", help="tokens to generate; may exceed the context")
    add("--temperature", type=float, default=1.0, metavar="T", help="above 1 more varied, below 1 less, 0 greedy")
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="draw from the fewest tokens that together have probability P")
    add("--min-p", type=float, metavar="P", help="draw from tokens with a share P of the largest probability")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1 makes tokens of the prompt and the text less likely",
    )
    add("--greedy", action="store_true", help="take the most likely token every time")
    add("--seed", type=int, metavar="S", help="same text every time; sample i is drawn with seed S + i")
    add(
        "--stop-string",
        action="append",
        default=[],
        dest="stop_strings",
        metavar="TEXT",
        help="end before this text; may be given several times; \\n is a line break",
    )
    add(
        "--log-probabilities",
        action="store_true",
        help="print one line a token, not the text: natural log of the model's probability for it, a tab, the token",
    )
    add("--num-samples", type=int, default=1, metavar="N", help="texts to generate, one after the other")
    add("--device", default="auto", help="auto is cuda if there is one, else cpu")
    add("--backend", default="auto", help="of the kernels: auto, triton, banded, reference")
    add(
        "--fused-kernels",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the package kernels; without it plain PyTorch",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile the step: the first tokens take a minute; on CUDA the step is a CUDA graph in any case",
    )
    return parser


def main(arguments=None) -> int:
    """Run the command with these arguments (default: the process's own) and return its exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks becomes a question mark
    counter = SimpleNamespace(tokens=0)  # of all texts
    text = None
    try:
        try:
            texts = _prepare(options, counter)
        except (ValueError, RuntimeError, OSError) as error:
            parser.error(str(error))
        start = time.perf_counter()
        for number, text in enumerate(texts, start=1):
            if options.num_samples > 1:
                print(f"--- sample {number} of {options.num_samples}", file=sys.stderr, flush=True)
            print("" if options.log_probabilities else options.prompt, end="", flush=True)
            for piece in text:
                print(piece, end="", flush=True)
            print(end="" if options.log_probabilities else "\n", flush=True)
    except KeyboardInterrupt:
        print(getattr(text, "held", ""), flush=True)
        print(f"interrupted after {counter.tokens} tokens", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the pipe closed it; Python must not flush to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    seconds = time.perf_counter() - start
    rate = counter.tokens / max(seconds, 1e-9)
    print(f"{counter.tokens} tokens in {seconds:.1f} s ({rate:,.0f} tokens/s)", file=sys.stderr)
    return 0


def _prepare(options, counter):
    """A list of iterators, one a sample, over pieces of its text; `counter` counts tokens. Raises for wrong options."""
    device = resolve_device(options.device)
    if options.num_samples < 1:
        raise ValueError(f"--num-samples is {options.num_samples}, expected at least 1")
    backend = attention_backend(device, options.fused_kernels, options.backend)
    runs = "plain PyTorch" if backend is None else "backend {} ({})".format(*backend)
    checkpoint = resolve_checkpoint(options.checkpoint)
    model, tokenizer = from_pretrained(
        checkpoint, fused_kernels=options.fused_kernels, backend=options.backend, device=device
    )
    if tokenizer is None:
        raise ValueError(f"{checkpoint} has no tokenizer.json, which reading a prompt and writing a text need")
    prompt = tokenizer.encode(options.prompt)
    stop_strings = [string.replace("\\n", "\n") for string in options.stop_strings]
    streams = [
        generate(
            model,
            torch.tensor([prompt], dtype=torch.long),
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            greedy=options.greedy,
            seed=None if options.seed is None else options.seed + i,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            log_probabilities=options.log_probabilities,
            compile=options.compile,
        )
        for i in range(options.num_samples)
    ]
    print(
        f"{checkpoint}: {model.config.architecture}, {model.num_parameters():,} parameters, {runs} on {device}",
        file=sys.stderr,
        flush=True,
    )
    streams = [_counted(stream, counter) for stream in streams]
    if options.log_probabilities:
        return [_lines(stream, tokenizer, prompt) for stream in streams]
    return [TextUntil(tokenizer.stream(map(int, stream), prompt), stop_strings) for stream in streams]


def _counted(stream, counter):
    for made in stream:
        counter.tokens += 1
        yield made


def _lines(stream, tokenizer, prompt):
    """A line a token: its log-probability, a tab, its text as a Python literal."""
    found = []

    def tokens():
        for token, log_probability in stream:
            found.append(float(log_probability))
            yield int(token)

    for piece in tokenizer.stream(tokens(), prompt):
        yield f"{found.pop():.4f}\t{piece!r}\n"


if __name__ == "__main__":
    sys.exit(main())

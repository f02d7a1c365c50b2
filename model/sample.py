"""Generate text with a trained model.

    python -m model.sample --checkpoint runs/shakespeare --prompt "ROMEO:" --max-new-tokens 500
    python -m model.sample --checkpoint runs/shakespeare --temperature 0.8 --top-k 20 --seed 1 --num-samples 3
    python -m model.sample --checkpoint runs/shakespeare --prompt-file letter.txt --min-p 0.1 --stop-string "\\n\\n"
    python -m model.sample --checkpoint runs/shakespeare --interactive
    python -m model.sample --checkpoint runs/shakespeare --prompts prompts.jsonl --batch 32 --out texts.jsonl

A text ends after --max-new-tokens, or where the model ends its document, by <|endoftext|>. The text goes to standard
output as it is made, everything else to standard error. Exit status: 0; 2 for a wrong argument or model directory; 130
after Ctrl-C, which keeps the text so far; 1 if standard output cannot be written, and without a message if the reader
of a pipe closed it, or if a line of --prompts was left out.
"""

import argparse
import contextlib
import re
import sys
import time
from pathlib import Path

import torch

from .checkpoint import from_pretrained, resolve_checkpoint
from .command import Parser, command_output, resolve_device
from .gpt import attention_backend
from .sample_many import ManyPrompts, add_flags, check_flags
from .sampling import generate
from .shared_cores import SharedCores
from .stop_strings import TextUntil

INTERACTIVE = "each line is a prompt; /help shows the settings, Ctrl-C stops the answer, /quit or Ctrl-D ends"
SETTINGS = {  # options that interactive mode changes, by /temperature 0.8, and the types of their values
    "temperature": float,
    "top-k": int,
    "top-p": float,
    "min-p": float,
    "repetition-penalty": float,
    "max-new-tokens": int,
    "seed": int,
}
SAME_ARGUMENTS = (  # options that are arguments of `generate`
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "greedy"),
    *("log_probabilities", "compile"),
)


def make_parser():
    parser = Parser(prog="python -m model.sample", description="Generate text with a trained model.")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a model directory, or a run directory: best, else last")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", default="", metavar="TEXT", help="text to continue (default: a line break); \\n is a line break"
    )
    prompt.add_argument("--prompt-file", metavar="FILE", help="file with the text to continue; - is standard input")
    prompt.add_argument("-i", "--interactive", action="store_true", help="read prompts, and answer each")
    add_flags(parser, prompt)
    add(
        "--max-new-tokens",
        type=int,
        default=500,
        metavar="N",
        help="tokens to generate (default 500); may exceed the context",
    )
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="above 1 more varied, below 1 less, 0 greedy (default 1)",
    )
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="draw from the fewest tokens that together have probability P")
    add("--min-p", type=float, metavar="P", help="draw from tokens with a share P of the largest probability")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1 makes tokens of the prompt and the text less likely (default 1)",
    )
    add("--window", type=int, metavar="N", help="keys that a query sees, in place of the model's own window")
    add("--prefix", type=int, metavar="K", help="first tokens that are seen besides the window (default: the model's)")
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
    add("--num-samples", type=int, default=1, metavar="N", help="texts to generate, one after the other (default 1)")
    add("--device", default="auto", help="cpu, cuda, ... (auto: cuda if there is one, else cpu)")
    add("--backend", default="auto", help="of the kernels: auto, triton, banded, reference")
    add(
        "--fused-kernels",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the package kernels (the default); without it plain PyTorch",
    )
    add(
        "--draft",
        metavar="DIR|ngram",
        help="guess ahead, by a smaller model or what followed the same tokens before: faster, the text stays the same",
    )
    add("--cache-dtype", choices=["int8"], help="keep keys and values as int8: about half the memory of 16 bits")
    add(
        "--compile",
        action="store_true",
        help="on a CPU: compile the step, twice as fast; it takes a C++ compiler, and a minute the first time",
    )
    return parser


def main(arguments=None) -> int:
    """Run the command with these arguments (default: the process's own) and return its exit status."""
    parser = make_parser()
    with command_output(parser.prog, ends=True):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks becomes a question mark
        return _run(parser, parser.parse_args(arguments))


def _run(parser, options):
    writer = None
    try:
        try:
            check_flags(options)
            writer = Writer(options)
            many = ManyPrompts(writer, options, writer.stop_strings) if options.prompts else None
            prompt = _prompt(options)
            count = 0 if options.interactive or many else options.num_samples
            texts = [writer.text(prompt, number) for number in range(count)]
        except (ValueError, RuntimeError, OSError) as error:
            parser.error(f"{error.filename}: {error.strerror}" if getattr(error, "strerror", None) else str(error))
        print(writer.about, file=sys.stderr, flush=True)
        with SharedCores(writer.model.wte.weight.device):
            if many:
                return many.run()
            if options.interactive:
                return _interact(writer, options)
            for number, text in enumerate(texts, start=1):
                if options.num_samples > 1:
                    print(f"--- sample {number} of {options.num_samples}", file=sys.stderr, flush=True)
                print("" if options.log_probabilities else prompt or writer.start, end="", flush=True)
                writer.write(text)
    except KeyboardInterrupt:
        if writer is not None:
            print(writer.held, flush=True)
            print(f"interrupted after {writer.tokens} tokens", file=sys.stderr)
        return 130
    rate = writer.tokens / max(writer.seconds, 1e-9)
    print(f"{writer.tokens} tokens in {writer.seconds:.1f} s ({rate:,.0f} tokens/s)", file=sys.stderr)
    return 0


def _prompt(options):
    """The prompt's text. Raises OSError or ValueError for a file that cannot be read."""
    if options.prompt_file is None:
        return _unescaped(options.prompt)
    try:
        if options.prompt_file == "-":
            return sys.stdin.read()
        return Path(options.prompt_file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.prompt_file} is no text in UTF-8: {error}") from None


def _unescaped(text):
    """The text of a flag or a typed line, with \\n as a line break and \\\\ as a backslash."""
    return re.sub(r"\\([n\\])", lambda found: "\n" if found[1] == "n" else "\\", text)


class Writer:
    """The model of the options, and what it has written: tokens, seconds, and `held`, text that is not yet printed."""

    def __init__(self, options):
        """Load the model. Raises ValueError, RuntimeError or OSError, in one line, for wrong options."""
        self.options, self.tokens, self.seconds, self.held = options, 0, 0.0, ""
        device = resolve_device(options.device)
        if options.num_samples < 1:
            raise ValueError(f"--num-samples is {options.num_samples}, expected at least 1")
        if options.num_samples > 1 and options.interactive:
            raise ValueError("--num-samples does nothing with --interactive: leave it out")
        backend = attention_backend(device, options.fused_kernels, options.backend)
        runs = "plain PyTorch" if backend is None else "backend {} ({})".format(*backend)
        checkpoint = resolve_checkpoint(options.checkpoint)
        self.model, self.tokenizer = from_pretrained(
            checkpoint, fused_kernels=options.fused_kernels, backend=options.backend, device=device
        )
        if options.window is not None or options.prefix is not None:
            window = self.model.config.window if options.window is None else options.window
            self.model.set_window(window, prefix=options.prefix)
        self.draft = options.draft
        if self.draft not in (None, "ngram"):
            directory = resolve_checkpoint(self.draft)
            self.draft, _ = from_pretrained(
                directory, fused_kernels=options.fused_kernels, backend=options.backend, device=device
            )
        if self.tokenizer is None:
            raise ValueError(f"{checkpoint} has no tokenizer.json, which reading a prompt and writing a text need")
        self.start = self._start()
        self.stop_strings = [_unescaped(string) for string in options.stop_strings]
        size = f"{self.model.config.architecture}, {self.model.num_parameters():,} parameters"
        self.about = f"{checkpoint}: {size}, {runs} on {device}"

    def _start(self):
        """What a text without a prompt begins with: a line break, or the first token of a vocabulary without one."""
        try:
            if self.tokenizer.encode("\n"):
                return "\n"
        except ValueError:
            pass
        return self.tokenizer.decode([0])

    def text(self, prompt, number=0):
        """An iterator over the pieces of a new text, drawn with the seed of sample `number`. Raises ValueError."""
        options, self.held = self.options, ""
        prompt = self.tokenizer.encode(prompt or self.start)
        seed = None if options.seed is None else options.seed + number
        same = {name: getattr(options, name) for name in SAME_ARGUMENTS}
        same |= {"seed": seed, "stop_strings": self.stop_strings, "draft": self.draft}
        same |= {"cache_dtype": options.cache_dtype and torch.int8}
        stream = generate(self.model, [prompt], **same)
        stream = self._counted(stream)
        if options.log_probabilities:
            return self._lines(stream, prompt)
        return TextUntil(self.tokenizer.stream(map(int, stream), prompt), self.stop_strings)

    def write(self, text):
        """Print the pieces of a text as they are made, and a line break."""
        start = time.perf_counter()
        try:
            for piece in text:
                print(piece, end="", flush=True)
        finally:
            self.seconds += time.perf_counter() - start
            self.held = getattr(text, "held", "")
        print(end="" if self.options.log_probabilities else "\n", flush=True)

    def _counted(self, stream):
        """The tokens up to the one that ends a document."""
        for made in stream:
            self.tokens += 1
            if self.tokenizer.end_of_text == int(made[0] if self.options.log_probabilities else made):
                return
            yield made

    def _lines(self, stream, prompt):
        """A line a token: its log-probability, a tab, its text as a Python literal."""
        found = []

        def tokens():
            for token, log_probability in stream:
                found.append(float(log_probability))
                yield int(token)

        for piece in self.tokenizer.stream(tokens(), prompt):
            yield f"{found.pop():.4f}\t{piece!r}\n"


def _interact(writer, options) -> int:
    """Read prompts and commands from standard input, and answer each, until /quit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and a history
    print(INTERACTIVE, file=sys.stderr, flush=True)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
            if line.strip() == "/quit":
                return 0
            if line.startswith("/"):
                print(_command(line[1:].split(), writer, options), file=sys.stderr)
            else:
                writer.write(writer.text(_unescaped(line)))
        except EOFError:
            print(flush=True)
            return 0
        except KeyboardInterrupt:  # stops the answer, or clears the line
            print(writer.held, flush=True)
            writer.held = ""
        except ValueError as error:
            print(error, file=sys.stderr)


def _command(words, writer, options):
    """Carry out a line such as `/temperature 0.8`; returns what to say. Raises ValueError for a wrong value."""
    name, *values = words or ["help"]
    name = name.replace("_", "-")
    if name not in SETTINGS:
        problem = "" if name == "help" else f"there is no /{name}: "
        return problem + "  ".join([*(_setting(options, name) for name in SETTINGS), "/help  /quit"])
    if values:
        attribute, value = name.replace("-", "_"), " ".join(values)
        before = getattr(options, attribute)
        try:
            number = make_parser().get_default(attribute) if value == "none" else SETTINGS[name](value)
        except ValueError:
            raise ValueError(f"/{name} {value}: expected a number, or none for the default") from None
        setattr(options, attribute, number)
        try:
            writer.text("")  # checks it
        except ValueError as error:
            setattr(options, attribute, before)
            raise ValueError(f"/{name} {value}: {error}") from None
    return _setting(options, name)


def _setting(options, name):
    """The line that sets an option to the value that it has."""
    value = getattr(options, name.replace("-", "_"))
    return f"/{name} {'none' if value is None else value}"


if __name__ == "__main__":
    sys.exit(main())

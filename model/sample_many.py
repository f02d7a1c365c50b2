"""`python -m model.sample --prompts FILE --out FILE`: a text for each line of a file, many at once.

    {"prompt": "ROMEO:", "id": "a"}   ->   {"index": 0, "id": "a", "prompt": "ROMEO:", "text": ..., "tokens": 500, ...}

A finished text is one line of the output, which is appended at once, in the order of finishing. So nothing finished is
lost if the command is stopped, and --resume writes the rest. `index` is the number of the prompt's line, from 0.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from .batching import write_batch
from .jsonl import parse_object, read_lines, text_of
from .stop_strings import TextUntil

DEFAULT_BATCH = 64
WANTED = '{"prompt": ...}'
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "greedy")


def add_flags(parser, prompt):
    """The flags of this part of the command; prompt: the group of flags that say what to continue."""
    prompt.add_argument(
        "--prompts", metavar="FILE", help='continue every line {"prompt": ...} of a .jsonl file; needs --out'
    )
    add = parser.add_argument
    add("--out", metavar="FILE", help="with --prompts: a .jsonl file, which gets a line for each finished text")
    add("--resume", action="store_true", help="with --prompts: go on with --out, leave out what is there")
    add("--batch", type=int, metavar="N", help=f"with --prompts: texts written at once (default {DEFAULT_BATCH})")
    add(
        "--batch-invariant",
        action="store_true",
        help="with --prompts: each text has the bits that it has alone; a token of N texts takes the time of N",
    )


def check_flags(options):
    """Raise ValueError for a flag that does nothing beside the others."""
    if options.prompts is None:
        others, reason = ("out", "resume", "batch", "batch_invariant"), "needs --prompts FILE"
    else:
        others, reason = (
            ("log_probabilities", "compile", "draft", "cache_dtype"),
            "does nothing with --prompts: leave it out",
        )
        if options.num_samples != 1:
            raise ValueError(f"--num-samples {reason}")
        if options.out is None:
            raise ValueError("--prompts needs --out FILE")
    for name in others:
        if getattr(options, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} {reason}")


class Prompt(NamedTuple):
    """A line of the file of prompts: its number from 0, its text, what identifies it, and its tokens."""

    index: int
    text: str
    named: dict
    tokens: list


class ManyPrompts:
    """The prompts of the options, and the file of their texts."""

    def __init__(self, writer, options, stop_strings):
        """Read the files. Raises ValueError or OSError, in one line; lines that are no prompts are reported later."""
        self.writer, self.stop_strings, self.out = writer, stop_strings, Path(options.out)
        self.problems, self.prompts = [], []
        self._read(options.prompts)
        done = self._finished(options)
        self.all, self.prompts = len(self.prompts), [prompt for prompt in self.prompts if prompt.index not in done]
        seed, end = options.seed, writer.tokenizer.end_of_text
        self.stream = write_batch(  # checks the options
            writer.model,
            [prompt.tokens for prompt in self.prompts],
            options.max_new_tokens,
            batch=DEFAULT_BATCH if options.batch is None else options.batch,
            seed=None if seed is None else [seed + prompt.index for prompt in self.prompts],
            stop_tokens=() if end is None else (end,),
            stop_strings=stop_strings,
            tokenizer=writer.tokenizer,
            batch_invariant=options.batch_invariant,
            **{name: getattr(options, name) for name in SETTINGS},
        )

    def _read(self, file):
        lines = 0
        for number, line in read_lines(file):
            lines += 1
            try:
                self.prompts.append(self._prompt(number - 1, line))
            except ValueError as error:
                self.problems.append(f"{file}, line {number}: {' '.join(str(error).split())}")
        if not lines:
            raise ValueError(f"{file} has no prompts: wanted a line {WANTED} for each")

    def _prompt(self, index, line):
        values = parse_object(line, WANTED)
        if "prompt" not in values:
            raise ValueError(f"its fields are {', '.join(map(repr, sorted(values))) or 'none'}, wanted {WANTED}")
        text = text_of(values, "prompt")
        tokens = self.writer.tokenizer.encode(text or self.writer.start)
        config = self.writer.model.config
        if config.positions == "learned" and len(tokens) > config.context_length:
            raise ValueError(
                f"its prompt has {len(tokens)} tokens, more than the {config.context_length} positions that the model "
                "learned"
            )
        return Prompt(index, text, {"id": values["id"]} if "id" in values else {}, tokens)

    def _finished(self, options):
        """The indices of the prompts whose texts are in the output. What a stop has left of a line is removed."""
        if not self.out.exists() or not self.out.stat().st_size:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.open("ab").close()  # before any work
            return set()
        if not options.resume:
            raise ValueError(f"--out {self.out} exists: add --resume to go on with it, or name another file")
        texts, done = {prompt.index: prompt.text for prompt in self.prompts}, set()
        for number, line in read_lines(self.out):
            if not line.endswith(b"\n"):
                continue
            try:
                values = parse_object(line, "what this command writes")
                index = values.get("index")
                if not isinstance(index, int) or values.get("prompt") != texts.get(index, values.get("prompt")):
                    raise ValueError(f"it is no text of a prompt in {options.prompts}")
            except ValueError as error:
                raise ValueError(f"--out {self.out}, line {number}: {error}: name another file") from None
            done.add(index)
        os.truncate(self.out, self.out.read_bytes().rfind(b"\n") + 1)
        return done

    def run(self) -> int:
        """Write the texts; the command's exit status: 0, 1 if a line was no prompt, 130 after Ctrl-C."""
        for problem in self.problems:
            print(problem, file=sys.stderr)
        finished, tokens, started = self.all - len(self.prompts), 0, time.perf_counter()
        made = [[] for _ in self.prompts]
        bar = tqdm(total=self.all, initial=finished, unit="text", file=sys.stderr, mininterval=0.5)
        try:
            with bar, open(self.out, "ab", buffering=0) as out:
                for number, token, _, last in self.stream:
                    if token is not None:
                        made[number].append(token)
                        tokens += 1
                    if last:
                        self._append(out, self.prompts[number], made[number])
                        made[number] = None
                        finished += 1
                        bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):,.0f} tokens/s", refresh=False)
                        bar.update()
        except KeyboardInterrupt:
            print(f"interrupted: {finished} of {self.all} texts are in {self.out}, --resume goes on", file=sys.stderr)
            return 130
        except OSError as error:
            print(f"{self.out} cannot be written: {error.strerror}", file=sys.stderr)
            return 1
        seconds = time.perf_counter() - started
        written = f"{len(made)} texts, {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)"
        print(f"{written}; {finished} are in {self.out}", file=sys.stderr)
        if self.problems:
            print(f"{len(self.problems)} lines were no prompts that the model can read", file=sys.stderr)
        return 1 if self.problems else 0

    def _append(self, out, prompt, tokens):
        """Append a line to the output: in one call, so that a stop leaves the whole line or nothing."""
        ended = bool(tokens) and tokens[-1] == self.writer.tokenizer.end_of_text
        pieces = TextUntil(
            self.writer.tokenizer.stream(iter(tokens[:-1] if ended else tokens), prompt.tokens), self.stop_strings
        )
        text = "".join(pieces)
        reason = "document" if ended else "stop string" if pieces.stopped else "length"
        values = {"index": prompt.index, **prompt.named, "prompt": prompt.text, "text": text, "tokens": len(tokens)}
        line = (json.dumps({**values, "ended_by": reason}, ensure_ascii=False) + "\n").encode()
        while line:  # a disk that is nearly full takes a part; the next call says why
            line = line[out.write(line) :]

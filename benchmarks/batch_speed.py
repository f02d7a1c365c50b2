"""How fast are many prompts of mixed length written at once, against one by one and against padded batches?

    python benchmarks/batch_speed.py                     # 256 prompts; 15 minutes on a CPU; --quick: 48, two minutes
    python benchmarks/batch_speed.py --prompts 64 --batch-sizes 16 --only ours padded

The same random weights write the same prompts. How long prompts and texts are is drawn from log-normal distributions: a
few are ten times as long as most. All choose the likeliest token, and ask for each text's own number of tokens:

    one by one      `generate` for each prompt
    padded          `generate` for fixed batches, in the order of the prompts; each ends with its longest text
    ours            `generate_batch`: a prompt takes the place of a text that has ended
    transformers    the same weights in Hugging Face's StarCoder2, by its continuous batching (paged attention, sdpa)

Before the timing, each writes a few prompts, and its tokens are compared with those of `generate`. Columns:

    s               for all prompts, read and written: median of the turns (20th to 80th percentile)
    tokens/s        new tokens that were asked for; what a padded batch makes beyond them does not count
    x one by one, x padded
                    how many times as many tokens/s, the second against the best batch size of `padded`
"""

import contextlib
import math
import sys
import time
from functools import partial
from typing import NamedTuple

import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
from decoders import why_not_starcoder2
from measure import alternate, ratio, table, three_digits

from model import GPT, GPTConfig, generate, generate_batch
from model.huggingface import to_huggingface

MODEL = {
    "cpu": dict(n_layer=6, d_model=256, n_head=8, n_kv_head=2, vocab_size=65, window=128, context_length=256),
    "cuda": dict(n_layer=12, d_model=768, n_head=12, n_kv_head=4, vocab_size=50304, window=1024, context_length=1024),
}
PROMPTS, SECONDS = {"quick": 48, "default": 256}, {"quick": 60.0, "default": 600.0}
BATCH_SIZES = {"quick": [32], "default": [32, 64, 128]}
MEDIAN_PROMPT, MEDIAN_TEXT, SPREAD, SHORTEST, LONGEST = 48, 64, 0.8, 4, 400  # tokens; spread: of the logarithm
COMPARED = 12  # prompts of the check
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Work(NamedTuple):
    """Prompts, lists of tokens, and how many new tokens each gets."""

    prompts: list
    counts: list


def one_by_one(model, work, batch):
    return [
        torch.cat(list(generate(model, [prompt], count, greedy=True))).tolist()
        for prompt, count in zip(work.prompts, work.counts, strict=True)
    ]


def padded(model, work, batch):
    texts = []
    for first in range(0, len(work.prompts), batch):
        counts = work.counts[first : first + batch]
        made = torch.stack(list(generate(model, work.prompts[first : first + batch], max(counts), greedy=True)), dim=1)
        texts += [row[:count] for row, count in zip(made.tolist(), counts, strict=True)]
    return texts


def ours(model, work, batch):
    texts = [[] for _ in work.prompts]
    for prompt, token in generate_batch(model, work.prompts, work.counts, batch=batch, greedy=True):
        texts[prompt].append(token)
    return texts


class Transformers:
    """Its manager takes all prompts at once and decides itself how many are written at a time.

    Its cache has room for about as many texts as ours writes at most; by default it takes 60 % of the memory.
    stack: an ExitStack, which ends the manager's thread.
    """

    def __init__(self, model, stack):
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig

        # -1: no token ends a text
        settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=LONGEST)
        self.manager = stack.enter_context(
            to_huggingface(model)
            .eval()
            .continuous_batching_context_manager(
                generation_config=settings,
                continuous_batching_config=ContinuousBatchingConfig(num_blocks=128, max_batch_tokens=512),
            )
        )

    def __call__(self, model, work, batch):
        requests, done = zip(work.prompts, work.counts, strict=True), {}
        names = [self.manager.add_request(prompt, max_new_tokens=count) for prompt, count in requests]
        while len(done) < len(names):
            result = self.manager.get_result(timeout=1)
            if result is None and not self.manager.is_running():
                raise RuntimeError("its thread has ended")
            if result is not None and result.is_finished():
                done[result.request_id] = result.generated_tokens
        return [done[name] for name in names]


# name: (function, or class of one for a model; whether it takes a batch size)
CONTESTANTS = {
    "one by one": (one_by_one, False),
    "padded": (padded, True),
    "ours": (ours, True),
    "transformers": (Transformers, False),
}


def main(arguments=None):
    flags = harness.parser("batch_speed", __doc__)
    flags.add_argument("--prompts", type=int, metavar="N", help="prompts (default 256; --quick: 48)")
    flags.add_argument("--batch-sizes", type=int, nargs="+", metavar="N", help="texts at a time, of ours and padded")
    for name in ("n_layer", "d_model", "window"):
        flags.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help="of the model")
    harness.add_only(flags, CONTESTANTS)
    harness.add_dtype(flags)
    return harness.run(flags, prepare, arguments)


def prepare(options, device):
    speed = "quick" if options.quick else "default"
    count, batch_sizes = options.prompts or PROMPTS[speed], options.batch_sizes or BATCH_SIZES[speed]
    if min(count, *batch_sizes) < 1:
        raise harness.BadInput("--prompts and --batch-sizes must be at least 1")
    given = {name: getattr(options, name) for name in ("n_layer", "d_model", "window")}
    sizes = MODEL[device.type] | {name: size for name, size in given.items() if size is not None}
    try:
        config = GPTConfig(**sizes)
    except ValueError as error:
        raise harness.BadInput(str(error)) from None
    chosen = harness.chosen(options.only, CONTESTANTS)
    dtype, seconds = harness.dtype_of(options, device), options.seconds or SECONDS[speed]
    return partial(measure, config, make_work(config, count), batch_sizes, chosen, dtype, device, seconds)


def make_work(config, count):
    generator = torch.Generator().manual_seed(0)

    def lengths(median):
        drawn = (torch.randn(count, generator=generator) * SPREAD + math.log(median)).exp()
        return drawn.round().clamp(SHORTEST, LONGEST).int().tolist()

    prompts = [
        torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths(MEDIAN_PROMPT)
    ]
    return Work(prompts, lengths(MEDIAN_TEXT))


def measure(config, work, batch_sizes, chosen, dtype, device, seconds):
    model = GPT(config, seed=0).to(device, dtype).eval()
    with contextlib.ExitStack() as stack:
        writers = {}
        for name, (contestant, _) in chosen.items():
            harness.progress(f"checking {name}")
            writers[name] = checked(name, contestant, model, work, TOLERANCE[dtype], stack)
        rows, calls = [], {}
        for name, (_, has_batch) in chosen.items():
            write, reason = writers[name]
            for batch in batch_sizes if has_batch else [None]:
                shape = f"batch {batch}" if batch else "all"
                rows.append({"contestant": name, "shape": shape, "batch": batch, "not_timed": reason})
                if reason is None:
                    calls[name, batch] = partial(write, model, work, batch)
        harness.progress(f"timing {len(calls)} ways to write {len(work.prompts)} prompts, in turns")
        add_figures(rows, alternate(calls, device, seconds, timer=seconds_of, turn_seconds=0), work)
    title = f"{len(work.prompts)} prompts of {tokens_of(map(len, work.prompts))}, texts of {tokens_of(work.counts)}"
    sizes = {name: getattr(config, name) for name in MODEL["cpu"]}
    return {
        "settings": {"dtype": harness.name_of(dtype), "model": sizes, "parameters": model.num_parameters()},
        "rows": rows,
        "tables": [table(title, rows, COLUMNS)],
        "plots": [{"title": title, "x": "tokens/s", "bars": bars_of(rows)}],
        "left_out": [],
    }


def checked(name, contestant, model, work, tolerance, stack):
    """(function that writes texts, None), or (None, why it is not timed)."""
    if name == "transformers" and (reason := why_not_starcoder2(model.config)):
        return None, reason
    few = Work(work.prompts[:COMPARED], work.counts[:COMPARED])
    try:
        write = contestant(model, stack) if isinstance(contestant, type) else contestant
        objection = find_objection(model, few, one_by_one(model, few, 1), write(model, few, 4), tolerance)
    except Exception as failure:  # whatever a contestant raises: its line says it
        objection = harness.in_a_line(failure)
    return (None, f"failed the check: {objection}") if objection else (write, None)


@torch.no_grad()
def find_objection(model, work, expected, texts, tolerance):
    """What is wrong with the texts, in a few words; None for nothing.

    Where a text first differs, the two tokens must be equally likely, up to `tolerance` of the logit: rounding may
    break a tie, and what follows is then another text.
    """
    for number, (prompt, wanted, text) in enumerate(zip(work.prompts, expected, texts, strict=True)):
        if len(text) != len(wanted):
            return f"text {number} has {len(text)} tokens, expected {len(wanted)}"
        same = next((i for i, pair in enumerate(zip(text, wanted, strict=True)) if pair[0] != pair[1]), None)
        if same is not None:
            tokens = torch.tensor([[*prompt, *wanted[:same]]], device=model.wte.weight.device)
            logits = model(tokens)[0][0, -1]
            if logits[wanted[same]] - logits[text[same]] > tolerance * logits.abs().max():
                return f"token {same} of text {number} is {text[same]}, expected {wanted[same]}"
    return None


def seconds_of(write):
    """Seconds to write all texts; they end on the host, so the device has ended too."""
    started = time.perf_counter()
    write()
    return time.perf_counter() - started


def add_figures(rows, times, work):
    tokens = sum(work.counts)
    for row in rows:
        if time_of := times.get((row["contestant"], row["batch"])):
            row |= time_of.as_dict()
            row["tokens_per_second"] = tokens / time_of.median
    for name in ("one by one", "padded"):
        best = max((row.get("tokens_per_second", 0) for row in rows if row["contestant"] == name), default=0)
        for row in rows:
            if best and "tokens_per_second" in row:
                row[f"x_{name.replace(' ', '_')}"] = row["tokens_per_second"] / best


def tokens_of(lengths):
    lengths = sorted(lengths)
    return f"{lengths[0]} to {lengths[-1]} tokens ({sum(lengths):,} in all)"


def shown_seconds(row):
    median, p20, p80 = (three_digits(row[key] / 1e3) for key in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median} ({p20}-{p80})"


def bars_of(rows):
    """{batch: {contestant: tokens/s}}; those without a batch size stand beside each."""
    timed = [row for row in rows if "tokens_per_second" in row]
    groups = sorted({row["batch"] for row in timed if row["batch"]}) or [None]
    return {
        f"batch {batch}" if batch else "": {
            row["contestant"]: row["tokens_per_second"] for row in timed if row["batch"] in (batch, None)
        }
        for batch in groups
    }


COLUMNS = {
    "contestant": lambda row: row["contestant"],
    "at a time": lambda row: str(row["batch"] or ""),
    "s": shown_seconds,
    "tokens/s": lambda row: three_digits(row["tokens_per_second"]),
    "x one by one": ratio("x_one_by_one"),
    "x padded": ratio("x_padded"),
}


if __name__ == "__main__":
    sys.exit(main())

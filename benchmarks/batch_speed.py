"""How fast are many prompts of mixed length written at once, against one by one and against padded batches?

    python benchmarks/batch_speed.py                     # 256 prompts; 5 minutes on a CPU; --quick: 48, one minute
    python benchmarks/batch_speed.py --prompts 64 --batch-sizes 16 --only ours padded

The same random weights write the same prompts. How long prompts and texts are is drawn from log-normal distributions: a
few are ten times as long as most. All choose the likeliest token, and ask for each text's own number of tokens:

    one by one      `generate` for each prompt
    padded          `generate` for fixed batches, in the order of the prompts; each ends with its longest text
    ours            `generate_batch`: a prompt takes the place of a text that has ended
    transformers    the same weights in Hugging Face's StarCoder2, by its continuous batching (paged attention, sdpa);
                    on a CPU it writes the first 64 prompts only

Before the timing, each writes a few prompts, and its tokens are compared with those of `generate`. Columns:

    prompts         that it wrote
    s               for all of them, read and written: median of the turns (20th to 80th percentile)
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
PROMPTS, SECONDS, LEAST_ROUNDS = {"quick": 48, "default": 256}, {"quick": 60.0, "default": 240.0}, 3
BATCH_SIZES = {"quick": {"padded": [32], "ours": [32]}, "default": {"padded": [32], "ours": [32, 64]}}
SLOW, SLOW_PROMPTS = "transformers", 64  # on a CPU
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


# name: function, or class of one for a model
CONTESTANTS = {"one by one": one_by_one, "padded": padded, "ours": ours, "transformers": Transformers}


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
    count = PROMPTS[speed] if options.prompts is None else options.prompts
    batch_sizes = BATCH_SIZES[speed]
    if options.batch_sizes:
        batch_sizes = dict.fromkeys(batch_sizes, options.batch_sizes)
    if min(count, *map(min, batch_sizes.values())) < 1:
        raise harness.BadInput("--prompts and --batch-sizes must be at least 1")
    given = {name: getattr(options, name) for name in ("n_layer", "d_model", "window")}
    sizes = MODEL[device.type] | {name: size for name, size in given.items() if size is not None}
    try:
        config = GPTConfig(**sizes)
    except ValueError as error:
        raise harness.BadInput(str(error)) from None
    chosen = harness.chosen(options.only, CONTESTANTS)
    dtype, seconds = harness.dtype_of(options, device), options.seconds or SECONDS[speed]
    work = make_work(config, count)
    return partial(measure, config, work, batch_sizes, chosen, dtype, device, seconds, options.deadline)


def make_work(config, count):
    generator = torch.Generator().manual_seed(0)

    def lengths(median):
        drawn = (torch.randn(count, generator=generator) * SPREAD + math.log(median)).exp()
        return drawn.round().clamp(SHORTEST, LONGEST).int().tolist()

    prompts = [
        torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths(MEDIAN_PROMPT)
    ]
    return Work(prompts, lengths(MEDIAN_TEXT))


def measure(config, work, batch_sizes, chosen, dtype, device, seconds, deadline):
    started, model = time.perf_counter(), GPT(config, seed=0).to(device, dtype).eval()
    with contextlib.ExitStack() as stack:
        rows, calls = [], {}
        for name, contestant in chosen.items():
            harness.progress(f"checking {name}")
            write, reason = checked(name, contestant, model, work, TOLERANCE[dtype], stack)
            own = part_of(work, SLOW_PROMPTS) if (name, device.type) == (SLOW, "cpu") else work
            for batch in batch_sizes.get(name, [None]):
                shape = f"batch {batch}" if batch else "all"
                rows.append({"contestant": name, "shape": shape, "batch": batch, "not_timed": reason})
                rows[-1] |= {"prompts": len(own.prompts), "tokens": sum(own.counts)}
                if reason is None:
                    calls[name, batch] = partial(write, model, own, batch)
        harness.progress(f"timing {len(calls)} ways to write {len(work.prompts)} prompts, in turns")
        left = None if deadline is None else max(0.0, deadline - (time.perf_counter() - started))
        options = {"least": LEAST_ROUNDS, "timer": seconds_of, "turn_seconds": 0, "deadline": left}
        times = alternate(calls, device, seconds, **options)
    late = [row for row in rows if row["not_timed"] is None and (row["contestant"], row["batch"]) not in times]
    rows = [row for row in rows if row not in late]
    add_figures(rows, times)
    title = f"{len(work.prompts)} prompts of {tokens_of(map(len, work.prompts))}, texts of {tokens_of(work.counts)}"
    sizes = {name: getattr(config, name) for name in MODEL["cpu"]}
    return {
        "settings": {"dtype": harness.name_of(dtype), "model": sizes, "parameters": model.num_parameters()},
        "rows": rows,
        "tables": [table(title, rows, COLUMNS)],
        "plots": [{"title": title, "x": "tokens/s", "bars": bars_of(rows)}],
        "left_out": [f"{row['contestant']}, {row['shape']} (no time was left)" for row in late],
    }


def part_of(work, count):
    """The first prompts."""
    return Work(work.prompts[:count], work.counts[:count])


def checked(name, contestant, model, work, tolerance, stack):
    """(function that writes texts, None), or (None, why it is not timed)."""
    if name == "transformers" and (reason := why_not_starcoder2(model.config)):
        return None, reason
    few = part_of(work, COMPARED)
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


def add_figures(rows, times):
    for row in rows:
        if time_of := times.get((row["contestant"], row["batch"])):
            row |= time_of.as_dict()
            row["tokens_per_second"] = row["tokens"] / time_of.median
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
    "prompts": lambda row: str(row["prompts"]),
    "s": shown_seconds,
    "tokens/s": lambda row: three_digits(row["tokens_per_second"]),
    "x one by one": ratio("x_one_by_one"),
    "x padded": ratio("x_padded"),
}


if __name__ == "__main__":
    sys.exit(main())

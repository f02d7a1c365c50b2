"""How fast does a Mistral of transformers read a prompt on our attention, against its own `sdpa` and `eager`?

    python benchmarks/hf_prefill.py                      # prompts of 1,024 to 8,192 tokens, window 256; --quick: fewer
    python benchmarks/hf_prefill.py --lengths 16384 --window 1024 --dtype bf16

All models have the same small size (4 layers, width 256, 8 heads on 2 KV heads) and the same random weights. The logits
of the last 64 tokens must agree with eager's before the timing. Calls take turns. Columns:

    ms        a forward pass that fills the cache and gives the last token's logits (20th to 80th percentile)
    host ms   on a GPU only: until the call returns to Python; "ms" is then the GPU's alone (measure.py)
    tokens/s  of the prompt, by the slower of the two
    x sdpa    how many times as fast as transformers' default
    MB        what a call allocates at its peak, with any mask of T x T
"""

import sys
from functools import partial

import drawing
import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
from measure import alternate, peak_memory, ratio, shown, table, three_digits

from kernels import resolve_backend
from model.huggingface import register_attention

LENGTHS = {"quick": [2048, 8192], "default": [1024, 2048, 4096, 8192]}
SECONDS = {"quick": 30.0, "default": 90.0}
COMPARED = 64  # last tokens whose logits are compared
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
CONTESTANTS = {"ours (sliding_gqa)": "sliding_gqa", "sdpa": "sdpa", "eager": "eager"}
SIZES = dict(
    vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def main(arguments=None):
    flags = harness.parser("hf_prefill", __doc__)
    flags.add_argument("--lengths", type=int, nargs="+", metavar="T", help="tokens of the prompt")
    flags.add_argument("--window", type=int, default=256, help="keys a query sees (default: 256)")
    flags.add_argument("--batch-size", type=int, default=1, help="prompts (default: 1)")
    harness.add_dtype(flags)
    harness.add_only(flags, CONTESTANTS)
    return harness.run(flags, prepare, arguments)


def prepare(options, device):
    if reason := harness.not_installed("transformers"):
        raise harness.BadInput(f"{reason}: pip install 'transformers>=5.4'")
    lengths = options.lengths or LENGTHS["quick" if options.quick else "default"]
    for name, value in (("lengths", min(lengths)), ("window", options.window), ("batch-size", options.batch_size)):
        if value < 1:
            raise harness.BadInput(f"--{name} is {value}, wanted at least 1")
    dtype = harness.dtype_of(options, device)
    chosen = harness.chosen(options.only, CONTESTANTS)
    points = {f"{options.batch_size} x {length:,} tokens": length for length in lengths}
    budget = harness.budget(options, points, SECONDS)
    return partial(measure, budget, options.window, options.batch_size, dtype, device, chosen)


def measure(budget, window, batch_size, dtype, device, chosen):
    models = make_models(window, dtype, device, chosen)
    rows = [row for length in budget for row in measure_point(models, batch_size, length, device, budget)]
    series = drawing.series(rows, lambda row: row["length"], lambda row: row["median_ms"])
    backend, reason = resolve_backend("auto", device)
    return {
        "settings": {"window": window, "batch_size": batch_size, "dtype": harness.name_of(dtype), "backend": backend},
        "rows": rows,
        "tables": [
            table(f"Prompts read by a small Mistral, window {window}; ours on {backend}: {reason}", rows, COLUMNS)
        ],
        "plots": [{"title": f"Reading a prompt, window {window}", "x": "tokens", "y": "ms", "series": series}],
        "left_out": budget.left_out,
    }


COLUMNS = {
    "prompt": lambda row: row["shape"],
    "attention": lambda row: row["contestant"],
    "ms": shown,
    "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
    "x sdpa": ratio("x_sdpa"),
    "MB": lambda row: three_digits(row["peak_mb"]),
}


def make_models(window, dtype, device, chosen):
    """{name: model} with the same weights, each on its own attention."""
    from transformers import MistralConfig, MistralForCausalLM

    register_attention()
    torch.manual_seed(0)
    models, weights = {}, None
    for name, implementation in chosen.items():
        config = MistralConfig(**SIZES, sliding_window=window, attn_implementation=implementation)
        models[name] = MistralForCausalLM(config).to(device, dtype).eval()
        weights = weights or models[name].state_dict()
        models[name].load_state_dict(weights)
    return models


@torch.inference_mode()
def read(model, tokens, last=1):
    """The logits of the last tokens; the call also fills a cache, as in `generate`."""
    return model(tokens, use_cache=True, logits_to_keep=last).logits


def measure_point(models, batch_size, length, device, budget):
    tokens = random_tokens(batch_size, length, device)
    return check_and_time(
        models, tokens, lambda model: read(model, tokens, COMPARED).float(), lambda model: partial(read, model, tokens),
        budget.share(),
    )  # fmt: skip


def random_tokens(batch_size, length, device):
    generator = torch.Generator(device).manual_seed(length)
    return torch.randint(SIZES["vocab_size"], (batch_size, length), generator=generator, device=device)


def largest_difference(result, expected):
    return (result - expected).abs().max().item()


def check_and_time(models, tokens, result, call, seconds, difference=largest_difference, tolerance=TOLERANCE):
    """Check that models {name: model} agree about tokens (B, T), then time them: a row each.

    result(model) is compared, with difference(result, expected) <= tolerance[dtype]; call(model)() is timed.
    """
    shape, rows, results = f"{len(tokens)} x {tokens.shape[1]:,}", [], {}
    for name, model in models.items():
        row = {
            "contestant": name,
            "shape": shape,
            "tokens": tokens.numel(),
            "length": tokens.shape[1],
            "not_timed": None,
        }
        rows.append(row)
        try:
            results[name] = result(model)
        except Exception as failure:  # most likely the memory for T x T scores
            row["not_timed"] = f"failed the check: {harness.in_a_line(failure)}"
    expected = results.get("eager", results.get("sdpa"))
    for row in rows:
        if row["not_timed"] is None and expected is not None:
            row["error"] = difference(results[row["contestant"]], expected)
            if not row["error"] <= tolerance[models[row["contestant"]].dtype]:
                row["not_timed"] = f"failed the check: results differ by {row['error']:.1e}"
    calls = {row["contestant"]: call(models[row["contestant"]]) for row in rows if not row["not_timed"]}
    for row in rows:
        if row["contestant"] in calls:
            row["peak_mb"] = peak_memory(calls[row["contestant"]], tokens.device) / 1e6
    times = alternate(calls, tokens.device, seconds)
    for row in rows:
        if time := times.get(row["contestant"]):
            row |= time.as_dict()
            row["tokens_per_second"] = row["tokens"] / time.pace
            if "sdpa" in times:
                row["x_sdpa"] = times["sdpa"].pace / time.pace
    return rows


if __name__ == "__main__":
    sys.exit(main())

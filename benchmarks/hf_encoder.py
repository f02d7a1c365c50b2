"""How fast does a ModernBERT of transformers run on our attention, against its own `sdpa`?

    python benchmarks/hf_encoder.py                      # 2,048 and 8,192 tokens; --quick: 1,024 and 2,048
    python benchmarks/hf_encoder.py --lengths 8192 --layers 22 --passes fwd

The layers have the shape of ModernBERT-base: width 768, 12 heads of 64, rotary positions; every third sees all tokens,
the others 64 on each side. The base model has 22 layers, this one three unless --layers says more: one that sees all
tokens and two that slide. Without its vocabulary, which attention does not touch. Both models have the same random
weights; what they give, and with the backward pass all gradients, must agree before the timing. Calls take turns.
Columns: those of hf_prefill.py, and

    pass      fwd: without gradients; fwd+bwd: with those of all parameters
"""

import sys
from functools import partial

import drawing
import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
from hf_prefill import COLUMNS, check_and_time, random_tokens
from measure import table

from kernels import resolve_backend
from model.huggingface import register_attention

LENGTHS = {"quick": [1024, 2048], "default": [2048, 8192]}
SECONDS = {"quick": 30.0, "default": 120.0}
CONTESTANTS = {"ours (sliding_gqa)": "sliding_gqa", "sdpa": "sdpa"}
# See `difference`. A window that is off by one makes 0.02 in the hidden states, 0.12 in gradients. Those of bf16 are up
# to 0.4 from fp32's at 8,192 tokens, by either attention
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
PASSES = {"fwd": False, "fwd+bwd": True}
SIZES = dict(
    vocab_size=1024, hidden_size=768, intermediate_size=1152, num_attention_heads=12, max_position_embeddings=2**16,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    initializer_range=0.05,  # so large that a window which is off by one fails the check, in bf16 by its gradients
)  # fmt: skip


def main(arguments=None):
    flags = harness.parser("hf_encoder", __doc__)
    flags.add_argument("--lengths", type=int, nargs="+", metavar="T", help="tokens of a row")
    flags.add_argument("--layers", type=int, default=3, help="the first of each three sees all tokens (default: 3)")
    flags.add_argument(
        "--local-attention", type=int, default=128, help="of the other layers; half of it on each side (default: 128)"
    )
    flags.add_argument("--batch-size", type=int, default=1, help="rows (default: 1)")
    flags.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="both by default")
    harness.add_dtype(flags)
    harness.add_only(flags, CONTESTANTS)
    return harness.run(flags, prepare, arguments)


def prepare(options, device):
    if reason := harness.not_installed("transformers"):
        raise harness.BadInput(f"{reason}: pip install 'transformers>=5.4'")
    lengths = options.lengths or LENGTHS["quick" if options.quick else "default"]
    given = {"lengths": min(lengths), "layers": options.layers, "batch-size": options.batch_size}
    for name, value in (*given.items(), ("local-attention", options.local_attention)):
        if value < 1:
            raise harness.BadInput(f"--{name} is {value}, wanted at least 1")
    points = {
        f"{options.batch_size} x {length:,} tokens, {name}": (length, name)
        for name in options.passes
        for length in lengths
    }
    budget = harness.budget(options, points, SECONDS)
    chosen = harness.chosen(options.only, CONTESTANTS)
    return partial(measure, budget, options, chosen, harness.dtype_of(options, device), device)


def measure(budget, options, chosen, dtype, device):
    models = make_models(options, chosen, dtype, device)
    rows = []
    for length, name in budget:
        tokens = random_tokens(options.batch_size, length, device)
        direction = random_direction(tokens, dtype) if PASSES[name] else None
        run = partial(run_pass, tokens=tokens, direction=direction)
        call = partial(partial, run)
        measured = check_and_time(models, tokens, run, call, budget.share(), difference, TOLERANCE)
        rows += [row | {"pass": name} for row in measured]
    of_pass = {name: [row for row in rows if row["pass"] == name] for name in options.passes}
    backend, reason = resolve_backend("auto", device)
    settings = {name: getattr(options, name) for name in ("layers", "local_attention", "batch_size")}
    title = f"ModernBERT of {options.layers} layers, local attention {options.local_attention}"
    return {
        "settings": settings | {"dtype": harness.name_of(dtype), "backend": backend},
        "rows": rows,
        "tables": [
            table(f"{title}, {name}; ours on {backend}: {reason}", rows, COLUMNS) for name, rows in of_pass.items()
        ],
        "plots": [plot(f"{title}\n{name}", rows) for name, rows in of_pass.items()],
        "left_out": budget.left_out,
    }


def plot(title, rows):
    series = drawing.series(rows, lambda row: row["length"], lambda row: row["median_ms"])
    return {"title": title, "x": "tokens", "y": "ms", "series": series}


def make_models(options, chosen, dtype, device):
    """{name: model} with the same weights, each on its own attention."""
    from transformers import ModernBertConfig, ModernBertModel

    register_attention()
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": options.layers, "local_attention": options.local_attention}
    models, weights = {}, None
    for name, implementation in chosen.items():
        models[name] = ModernBertModel(ModernBertConfig(**sizes, attn_implementation=implementation))
        models[name].to(device, dtype).eval()
        weights = weights or models[name].state_dict()
        models[name].load_state_dict(weights)
    return models


def random_direction(tokens, dtype):
    """The gradient of what the model gives, (B, T, width)."""
    generator = torch.Generator(tokens.device).manual_seed(0)
    shape = *tokens.shape, SIZES["hidden_size"]
    return torch.randn(shape, generator=generator, device=tokens.device).to(dtype)


def run_pass(model, tokens, direction):
    """(hidden states (B, T, width), gradients of all parameters) of one pass; direction None: without gradients."""
    with torch.set_grad_enabled(direction is not None):
        hidden = model(tokens).last_hidden_state
        if direction is None:
            return hidden, ()
        return hidden, torch.autograd.grad(hidden, list(model.parameters()), direction)


def difference(result, expected):
    """The largest over hidden states and gradients: of the difference, in units of what is expected (2-norms)."""
    pairs = zip((result[0], *result[1]), (expected[0], *expected[1]), strict=True)
    return max(((x.float() - y.float()).norm() / y.float().norm()).item() for x, y in pairs)


if __name__ == "__main__":
    sys.exit(main())

"""Does a model that was trained with full attention stream past its window, and past its training, with a prefix?

    python -m train --architecture rope --context-size 256 --d-model 128 --batch-size 16 --max-steps 1200 --seed 1 \
        --out-dir runs/streaming                         # 5 minutes on one CPU core
    python benchmarks/streaming.py --checkpoint runs/streaming

Held-out text is read through a `KVCache`, every row from its first token, as a sampler would read its own text. The
model is trained at context_length with full attention, and its weights are the same for all contestants: they differ
in what a query sees. All but the first see `--keys` keys, the prefix's included (StreamingLLM, arXiv:2309.17453).

    all keys           no window: the cache grows
    window             the newest keys
    prefix + window    the first tokens too; rotation shows no distance to them beyond that of training
                       (`prefix_distance` of the kernels)
    window, int8       the window through a cache of int8
    true distances     the same as prefix + window, rotated by the distance that they have
    read again         no cache: the newest keys are read anew for every token, whose work is `keys` times as much. Only
                       the last token of each position's range is measured

    loss      cross-entropy in nats a token, the mean over the positions up to `position` from the one before it
"""

import dataclasses
import sys

import harness  # first: it puts the root of the repository on the path, so that `model` is ours
import torch
import torch.nn.functional as F

from kernels.band import visible_mask
from model import GPT, KVCache, from_pretrained
from model.checkpoint import CheckpointError, resolve_checkpoint
from model.sdpa import rotate
from train.evaluate import EvaluateConfig, held_out_text

CHUNK = 32  # tokens of a forward; the cache's rings are longer by as many


def contestants(keys, prefix):
    """{name: (window, prefix, whether distances are bounded)} of the contestants that read through a cache."""
    found = {
        "all keys": (None, 0, True),
        f"window {keys}": (keys, 0, True),
        f"ours: prefix {prefix} + window {keys - prefix}": (keys - prefix, prefix, True),
        f"prefix {prefix} + window {keys - prefix}, true distances": (keys - prefix, prefix, False),
    }
    return found


def reader(model, window, prefix, bounded, length):
    """The model with this window and prefix. Bounds come from context_length: a larger one leaves true distances."""
    config = dataclasses.replace(model.config, window=window, prefix=prefix)
    if not bounded:
        config = dataclasses.replace(config, context_length=length)
    reading = GPT(config, model.fused_kernels, model.blocks[0].attn.backend).to(model.wte.weight)
    reading.load_state_dict(model.state_dict())
    return reading.eval()


@torch.no_grad()
def stream_losses(model, tokens, dtype=torch.float32):
    """The loss (length,) at each position, the mean over rows of tokens (B, length + 1), read through a cache."""
    x, y = tokens[:, :-1], tokens[:, 1:]
    options = {"max_new_tokens_per_call": CHUNK, "max_length": x.shape[1], "device": x.device, "dtype": dtype}
    cache = KVCache(model.config, len(x), **options)
    losses = []
    for part, targets in zip(x.split(CHUNK, dim=1), y.split(CHUNK, dim=1), strict=True):
        logits, _ = model(part, cache=cache)
        losses.append(F.cross_entropy(logits.mT, targets, reduction="none").mean(0))
    return torch.cat(losses)


@torch.no_grad()
def read_again_loss(model, tokens, last, keys, count):
    """The mean loss at `count` positions up to `last`, each predicted from the newest `keys` tokens, read alone."""
    ends = range(max(1, last - 7 * count + 1), last + 1, 7)
    losses = [F.cross_entropy(model.last_logits(tokens[:, max(0, end - keys) : end]), tokens[:, end]) for end in ends]
    return torch.stack(losses).mean().item()


@torch.no_grad()
def share_of_first(model, tokens, first):
    """The part of its attention that a query gives the first keys: (largest head's, mean), over the second half of one
    context. Heads that need a prefix give it most of theirs; keys that are seen alike get first / T.
    """
    T, shares = model.config.context_length, []

    def look(attention, arguments):
        x, H, D = arguments[0], model.config.n_head, model.config.head_dim
        kv = model.config.n_kv_head
        q, k, _ = attention.qkv(x).view(len(x), T, -1, D).transpose(1, 2).split([H, kv, kv], dim=1)
        cos, sin = (angles[:T] for angles in attention.rope(T, x.device))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin).repeat_interleave(H // kv, dim=1)
        scores = (q @ k.mT * D**-0.5).masked_fill(~visible_mask(T, T, device=x.device), float("-inf"))
        shares.append(scores.softmax(-1)[:, :, T // 2 :, :first].sum(-1).mean((0, 2)))  # (H,)

    hooks = [block.attn.register_forward_pre_hook(look) for block in model.blocks]
    model(tokens[:, :T])
    for hook in hooks:
        hook.remove()
    shares = torch.stack(shares)
    return shares.max().item(), shares.mean().item()


def prepare(options, device):
    if options.prefix < 1 or options.keys <= options.prefix:
        raise harness.BadInput(f"--prefix is {options.prefix} of --keys {options.keys}, wanted at least 1, and fewer")
    try:
        directory = resolve_checkpoint(options.checkpoint)
        model, tokenizer = from_pretrained(directory, device=device)
        evaluate = EvaluateConfig(checkpoint=options.checkpoint, val_data=options.val_data, documents=False)
        text = held_out_text(evaluate, directory, tokenizer)[2].tokens
    except (CheckpointError, ValueError) as error:
        raise harness.BadInput(str(error)) from None
    if model.config.positions != "rope" or model.config.window is not None:
        raise harness.BadInput(f"{directory} is {model.config.architecture}, wanted rope: trained with full attention")
    rows, length = (4, 1024) if options.quick else (options.rows, options.length)
    if rows < 1 or length < options.keys:
        raise harness.BadInput(f"{rows} rows of {length} tokens are too few: wanted more than --keys {options.keys}")
    if len(text) < rows * (length + 1):
        raise harness.BadInput(f"the held-out text has {len(text)} tokens, fewer than {rows} rows of {length + 1}")
    first = torch.linspace(0, len(text) - length - 1, rows).long()
    tokens = text[first[:, None] + torch.arange(length + 1)].long().to(device)
    ends = [2**power for power in range(5, 40) if 2**power < length] + [length]

    def measure():
        found, settings_of = {}, contestants(options.keys, options.prefix)
        readers = {name: (settings, torch.float32) for name, settings in settings_of.items()}
        window = f"window {options.keys}"
        readers[f"{window}, int8"] = settings_of[window], torch.int8
        for name, (settings, dtype) in readers.items():
            harness.progress(name)
            losses = stream_losses(reader(model, *settings, length), tokens, dtype)
            edges = zip([0, *ends], ends, strict=False)
            found[name] = {end: losses[start:end].mean().item() for start, end in edges}
        harness.progress("read again")
        found["read again"] = {
            end: read_again_loss(model, tokens, end, options.keys, 1 if options.quick else 16) for end in ends
        }
        return document(found, share_of_first(model, tokens, options.prefix), options, rows, model)

    return measure


def document(found, share, options, rows, model):
    records = [
        {"contestant": name, "position": end, "loss": loss}
        for name, losses in found.items()
        for end, loss in losses.items()
    ]
    by_end = {}
    for record in records:
        by_end.setdefault(record["position"], {"position": record["position"]})[record["contestant"]] = record["loss"]
    table = {
        "title": "Loss by position",
        "columns": ["position", *found],
        "rows": [[f"{row['position']:,}", *(f"{row[name]:.3f}" for name in found)] for row in by_end.values()],
        "notes": [
            f"{rows} rows; the model was trained on contexts of {model.config.context_length} tokens",
            f"attention that queries of a context's second half give the first {options.prefix} keys: {share[1]:.1%}, "
            f"{share[0]:.1%} in the head with most",
        ],
    }
    plot = {
        "title": f"Loss by position, trained at {model.config.context_length} with full attention",
        "x": "position",
        "y": "loss, nats a token",
        "series": {name: [[end, loss] for end, loss in losses.items()] for name, losses in found.items()},
    }
    bad = [f"{r['contestant']} at {r['position']}: the loss is no number" for r in records if r["loss"] != r["loss"]]
    return {
        "settings": {
            "keys": options.keys,
            "prefix": options.prefix,
            "rows": rows,
            "chunk": CHUNK,
            "share_of_first": share,
        },
        "rows": records,
        "tables": [table],
        "plots": [plot],
        "left_out": [],
        "failed": bad,
    }


def main(arguments=None):
    flags = harness.parser("streaming", __doc__)
    flags.add_argument(
        "--checkpoint", default="runs/streaming", metavar="DIR", help="a model trained with full attention"
    )
    flags.add_argument("--val-data", metavar="FILE", help="text to read (default: what the training run held out)")
    flags.add_argument("--keys", type=int, default=128, help="keys that a query sees (default 128)")
    flags.add_argument("--prefix", type=int, default=4, help="of these, the first tokens of the text (default 4)")
    flags.add_argument("--length", type=int, default=4096, help="tokens of a row (default 4096)")
    flags.add_argument("--rows", type=int, default=16, help="rows of text (default 16)")
    return harness.run(flags, prepare, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""How long does a training step take with AdamW, with our Muon and with torch's, where a step has few tokens?

    python benchmarks/optimizer_speed.py                  # half a minute on two CPU cores

The setting is nanoGPT's CPU example (context 64, 12 rows, 4 layers, width 128), in which the optimizer takes a large
part of a step. Every contestant takes whole steps: forward, backward, clipping, update. They take turns. Columns:

    ms         the median step (20th to 80th percentile)
    host ms    on a GPU only: until the step returns to Python; "ms" is then the GPU's alone (measure.py)
    x GPT-2    its time (the slower of the two) over that of GPT-2 in plain PyTorch with AdamW, as in nanoGPT's example
"""

import sys
from functools import partial

import drawing
import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
from measure import alternate, ratio, shown, table

from model import GPT, GPTConfig
from train.optim import hidden_matrices, make_optimizer

SIZES = {"vocab_size": 65, "context_length": 64, "window": 32, "n_layer": 4, "n_head": 4, "n_kv_head": 2}
ROWS = 12
BASELINE = "GPT-2, AdamW"
SECONDS = {"quick": 10.0, "default": 30.0}


def main(arguments=None):
    flags = harness.parser("optimizer_speed", __doc__)
    flags.add_argument("--d-model", type=int, default=128, help="width of the models")
    harness.add_only(flags, CONTESTANTS)
    return harness.run(flags, prepare, arguments)


def prepare(options, device):
    if options.d_model < 8 or options.d_model % 8:
        raise harness.BadInput(f"--d-model is {options.d_model}, wanted a multiple of 8: 4 heads of an even size")
    chosen = harness.chosen(options.only, CONTESTANTS)
    return partial(measure, chosen, options.d_model, device, harness.budget(options, {"": None}, SECONDS))


def step(architecture, fused_kernels, optimizer_of, d_model, device):
    """A function that takes one step."""
    config = GPTConfig.for_architecture(architecture, d_model=d_model, **SIZES)
    model = GPT(config, fused_kernels, seed=0).to(device)
    optimizer = optimizer_of(model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.99))
    tokens = torch.randint(config.vocab_size, (ROWS, config.context_length + 1), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def take():
        model(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return take


def torchs_muon(model, *, learning_rate, weight_decay, betas):
    """torch.optim.Muon for the same matrices as ours, with our scale, and AdamW for the other parameters."""
    taken = hidden_matrices(model)
    hidden = [parameter for parameter in model.parameters() if parameter in taken]
    others = [parameter for parameter in model.parameters() if parameter not in taken]
    return _Both(
        torch.optim.Muon(hidden, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=weight_decay, betas=betas, fused=True),
    )


class _Both:
    def __init__(self, *optimizers):
        self.optimizers = optimizers

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


ADAMW, MUON = partial(make_optimizer, optimizer="adamw"), partial(make_optimizer, optimizer="muon")
CONTESTANTS = {  # architecture, whether it runs the fused kernels, optimizer
    BASELINE: ("original", False, ADAMW),
    "ours, AdamW": ("rope-window-gqa", True, ADAMW),
    "ours, our Muon": ("rope-window-gqa", True, MUON),
    "ours, torch's Muon": ("rope-window-gqa", True, torchs_muon),
    "modern, our Muon": ("modern", True, MUON),
}


def measure(chosen, d_model, device, budget):
    calls = {name: step(*made, d_model, device) for name, made in chosen.items()}
    for call in calls.values():
        call()
    times = alternate(calls, device, budget.seconds)
    shape = f"a step of {ROWS} x {SIZES['context_length']} tokens"
    rows = [
        {"contestant": name, "shape": shape, "not_timed": None}
        | time.as_dict()
        | ({"x_gpt2": time.pace / times[BASELINE].pace} if BASELINE in times else {})
        for name, time in times.items()
    ]
    columns = {"contestant": lambda row: row["contestant"], "ms": shown, "x GPT-2": ratio("x_gpt2")}
    return {
        "rows": rows,
        "tables": [table(shape, rows, columns)],
        "plots": [{"title": shape, "x": "ms", "bars": drawing.bars(rows, lambda row: row["median_ms"])}],
    }


if __name__ == "__main__":
    sys.exit(main())

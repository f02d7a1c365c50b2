"""How many tokens a second does training reach, with our kernels, without them, and in Hugging Face's StarCoder2?

    python benchmarks/train_speed.py                      # two minutes on two CPU cores; --quick: under one
    python benchmarks/train_speed.py --compile            # the same models under torch.compile as well

A step is forward, backward, clipping and fused AdamW (optimizer_speed.py compares Muon). The three models have the same
weights and the same batches; their losses and gradients must agree before they are timed. They take turns:

    tokens/s   of the median step; on a GPU by the slower of the device's time and "host ms", until the step returns
    ms a step  median (20th to 80th percentile)
    busy ms    on a CPU: of ours while another process keeps a core busy; faults: page faults a step
    x plain    how many times as fast as the same model with --no-fused-kernels; x HF: as Hugging Face's
    MB         what a step allocates at its peak besides weights, gradients and optimizer: mostly activations
    MFU        on a GPU: FLOPs that the step needs (visible pairs only), of the card's bf16 peak
"""

import contextlib
import copy
import sys
from functools import partial

import drawing
import harness  # first: it puts the root of the repository on the path, so that `kernels` is ours
import torch
import torch.nn.functional as F
from decoders import why_not_starcoder2
from measure import add_busy, alternate, peak_memory, peak_of_device, ratio, shown, table, three_digits

from model import GPT, GPTConfig, flops_per_token
from model.huggingface import to_huggingface
from train.config import RunConfig, TrainerConfig
from train.optim import make_optimizer

VOCABULARY = 76  # characters of Shakespeare's plays, the data of `python -m train`
LONG_CONTEXT, LONG_WINDOW = 2048, 128
SECONDS = {"quick": 15.0, "default": 90.0}
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
CARD_MODEL = dict(  # GPT-2's size, with grouped heads
    vocab_size=50304, context_length=2048, window=128, n_layer=12, n_head=12, n_kv_head=4, d_model=768
)


def workloads(device, quick):
    """{name: (GPTConfig, rows of a batch)}; the defaults are those of the trainer."""
    run, trainer = RunConfig(), TrainerConfig()
    default = run.model_config(VOCABULARY)
    tokens = trainer.batch_size * run.context_size
    long = dict(vocab_size=VOCABULARY, context_length=LONG_CONTEXT, window=LONG_WINDOW)
    long |= {name: getattr(run, name) for name in ("n_layer", "n_head", "n_kv_head", "d_model")}
    named = {
        f"context {LONG_CONTEXT}, window {LONG_WINDOW}": (GPTConfig(**long), max(1, tokens // LONG_CONTEXT)),
        f"python -m train (context {default.context_length}, window {default.window})": (default, trainer.batch_size),
    }
    if device.type == "cuda":
        named["GPT-2 size, context 2048, window 128"] = (GPTConfig(**CARD_MODEL), 4 if quick else 8)
        if not quick:
            wide = GPTConfig(**{**CARD_MODEL, "context_length": 8192, "window": 1024})
            named["GPT-2 size, context 8192, window 1024"] = (wide, 2)
    return named


def main(arguments=None):
    flags = harness.parser("train_speed", __doc__)
    flags.add_argument(
        "--precision", choices=("fp32", "bf16"), help="fp32 on a CPU, bf16 (autocast) on a GPU by default"
    )
    flags.add_argument("--compile", action="store_true", help="time each model under torch.compile as well")
    for name, meaning in {
        "context_size": "tokens of a row",
        "window": "keys a query sees",
        "n_layer": "layers",
        "n_head": "query heads",
        "n_kv_head": "KV heads",
        "d_model": "width",
        "batch_size": "rows of a batch",
    }.items():
        flags.add_argument(
            "--" + name.replace("_", "-"), type=int, help=f"{meaning}, of one model in place of the grid"
        )
    return harness.run(flags, prepare, arguments)


def prepare(options, device):
    precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    asked = {
        name: getattr(options, name)
        for name in ("context_size", "window", "n_layer", "n_head", "n_kv_head", "d_model", "batch_size")
        if getattr(options, name) is not None
    }
    if asked:
        batch_size = asked.pop("batch_size", TrainerConfig().batch_size)
        try:
            config = RunConfig(**asked).model_config(VOCABULARY)
            TrainerConfig(batch_size=batch_size)
        except ValueError as error:
            raise harness.BadInput(str(error)) from None
        chosen = {f"context {config.context_length}, window {config.window}": (config, batch_size)}
    else:
        chosen = workloads(device, options.quick)
    if options.compile and (reason := harness.why_not_compile(device)):
        raise harness.BadInput(f"--compile: {reason}")
    points = {name: (name, *workload) for name, workload in chosen.items()}
    return partial(measure, harness.budget(options, points, SECONDS), device, precision, options.compile)


def measure(budget, device, precision, compiled):
    rows = [row for point in budget for row in measure_point(*point, device, precision, compiled, budget.share())]
    bars = drawing.bars(rows, lambda row: row["tokens_per_second"])
    return {
        "settings": {"precision": precision, "compile": compiled},
        "rows": rows,
        "tables": [table_of(rows, device)],
        "plots": [{"title": "Training", "x": "tokens/s", "bars": bars}],
        "left_out": budget.left_out,
    }


def models(config, device):
    """{name: why not, or (model, its loss function)}, all with the same weights."""
    fused = GPT(config, fused_kernels=True, seed=0).to(device)
    plain = GPT(config, fused_kernels=False).to(device)
    plain.load_state_dict(fused.state_dict())
    made = {
        "ours, fused kernels": (fused, lambda model, x, y: model(x, y)[1]),
        "ours, --no-fused-kernels": (plain, lambda model, x, y: model(x, y)[1]),
    }
    # all three compute the loss by the same call: Hugging Face's own would keep an fp32 copy of the logits
    reason = why_not_starcoder2(config)
    made["Hugging Face StarCoder2"] = reason or (to_huggingface(fused), hugging_face_loss)
    return made


def hugging_face_loss(model, x, y):
    logits = model(input_ids=x, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)


class Step:
    """One training step on a fixed batch; calling it takes the step."""

    def __init__(self, model, loss_of, x, y, precision):
        self.model, self.loss_of, self.x, self.y = model.train(), loss_of, x, y
        self.autocast = (
            (lambda: torch.autocast(x.device.type, torch.bfloat16)) if precision == "bf16" else contextlib.nullcontext
        )
        config = TrainerConfig()
        self.clip = config.grad_clip
        self.optimizer = make_optimizer(
            model, learning_rate=1e-5, weight_decay=config.weight_decay, betas=config.betas
        )  # so small a rate keeps the models near each other for any number of steps

    def loss_and_gradient_norm(self):
        """Two numbers of the batch; nothing is updated."""
        loss, norm = self._backward()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    def __call__(self):
        self._backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self):
        with self.autocast():
            loss = self.loss_of(self.model, self.x, self.y)
        loss.backward()
        return loss.detach(), torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)


def measure_point(name, config, batch_size, device, precision, compiled, seconds):
    """Check that the models agree, then time their steps: a row each."""
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(
        config.vocab_size, (batch_size, config.context_length + 1), generator=generator, device=device
    )
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    contestants = models(config, device)
    if compiled:
        for who, made in list(contestants.items()):
            if not isinstance(made, str):
                twin = copy.deepcopy(made[0])
                contestants[f"{who}, compiled"] = (twin, torch.compile(made[1], dynamic=False))
    calls, rows, expected = {}, [], None
    for who, made in contestants.items():
        row = {
            "contestant": who,
            "shape": name,
            "tokens": x.numel(),
            "parameters": GPT.num_parameters(contestants["ours, fused kernels"][0]),
            "not_timed": made if isinstance(made, str) else None,
        }
        rows.append(row)
        if row["not_timed"]:
            continue
        step = Step(*made, x, y, precision)
        try:
            row["loss"], row["gradient_norm"] = step.loss_and_gradient_norm()
        except Exception as failure:  # whatever a contestant raises: its line says it
            row["not_timed"] = f"failed the check: {harness.in_a_line(failure)}"
            continue
        if "--no-fused" in who and expected is None:
            expected = row
        calls[who] = step
    for row in rows:  # all are compared with plain PyTorch
        if not row["not_timed"] and (objection := disagreement(row, expected, LOSS_TOLERANCE[precision])):
            row["not_timed"] = f"failed the check: {objection}"
            del calls[row["contestant"]]
    for row in rows:
        if row["contestant"] in calls:
            calls[row["contestant"]]()  # the first step makes the optimizer's state
            row["peak_mb"] = peak_memory(calls[row["contestant"]], device) / 1e6
    times = alternate(calls, device, seconds)
    add_figures(rows, times, config, peak_of_device(device) if precision == "bf16" else None)
    add_busy(rows, calls, device)
    return rows


def disagreement(row, expected, tolerance):
    """How loss or gradient norm differ from those of plain PyTorch, in a few words; None if they do not."""
    if expected is None:
        return "plain PyTorch did not run, so there is nothing to compare with"
    for key, allowed in (("loss", tolerance), ("gradient_norm", 10 * tolerance)):
        if not abs(row[key] - expected[key]) <= allowed:
            return f"{key.replace('_', ' ')} {row[key]:.6f}, that of plain PyTorch is {expected[key]:.6f}"
    return None


def add_figures(rows, times, config, peak):
    for row in rows:
        if time := times.get(row["contestant"]):
            row |= time.as_dict()
            row["tokens_per_second"] = row["tokens"] / time.pace
            row["flops_per_second"] = row["tokens_per_second"] * flops_per_token(config)
            for name, key in (("ours, --no-fused-kernels", "x_plain"), ("Hugging Face StarCoder2", "x_hugging_face")):
                if name in times:
                    row[key] = times[name].pace / time.pace
            if peak is not None:
                row["mfu"] = row["flops_per_second"] / (peak.tflops * 1e12)


def table_of(rows, device):
    columns = {
        "workload": lambda row: row["shape"],
        "model": lambda row: row["contestant"],
        "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
        "ms a step": shown,
        "x plain": ratio("x_plain"),
        "x HF": ratio("x_hugging_face"),
        "MB": lambda row: three_digits(row["peak_mb"]),
    }
    if device.type == "cuda":
        columns["MFU"] = lambda row: f"{row['mfu']:.1%}" if "mfu" in row else "-"
    sizes = {row["shape"]: f"{row['parameters']:,} parameters, {row['tokens']:,} tokens a step" for row in rows}
    return table("Training steps", rows, columns, [f"{shape}: {size}" for shape, size in sizes.items()])


if __name__ == "__main__":
    sys.exit(main())

"""The plots of the study, PNG files beside compare.csv, at equal width, one context and length beside the other."""

from functools import partial
from pathlib import Path

from .plan import MODIFIED, NAMES, ORIGINAL
from .results import estimate
from .tables import find, seconds_at

COLORS = dict(zip(NAMES, ("black", "tab:blue", "tab:orange", "tab:red", "tab:green", "tab:purple"), strict=True))
LOSS = "held-out loss (nats per character)"


def draw_all(document: dict, directory: Path) -> bool:
    """Draws every plot into a directory; False without matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot: it would choose a display and keep every figure
    except ImportError:
        return False
    places, short = document["settings"]["places"], document["settings"]["steps"]
    for name, (_, draw, of_long_runs) in PLOTS.items():
        panels = [place for place in places if of_long_runs or place[1] == short]
        figure = Figure(figsize=(6.4 * len(panels), 4.6), layout="constrained")
        for axes, (context, steps) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw(axes, document, context, steps)
            axes.set_title(f"context {context}, {steps:,} steps")
            axes.grid(True, alpha=0.3)
            axes.legend(fontsize="small")
        figure.savefig(directory / name, format="png", dpi=100)
    return True


def loss_curves(axes, document, context, steps, by_seconds=False):
    """The held-out loss during training; seconds are steps times the median time of a step."""
    for name in NAMES:
        row = find(document, context, name, steps=steps)
        x = [seconds_at(row, tokens) if by_seconds else tokens for tokens, *_ in row["curve"]]
        plot_losses(axes, name, x, [loss for _, *loss in row["curve"]])
    axes.set_xlabel("seconds of training (steps x median time of a step)" if by_seconds else "characters read")
    # without the first point, before training, which would compress all others
    rows = [row for row in document["models"] if (row["context"], row["steps"]) == (context, steps)]
    seen = [point[1] for row in rows for point in row["curve"][1:]]
    axes.set_ylim(min(seen) - 0.03, max(seen) + 0.05)


def by_window(axes, document, context, steps):
    """The final loss of the modified architecture with each window."""
    rows = [row for row in document["windows"] if row["context"] == context]
    sizes, losses = [row["window"] for row in rows], [estimate(row["losses"]) for row in rows]
    means, errors = [loss.mean for loss in losses], [loss.standard_error or 0 for loss in losses]
    axes.errorbar(sizes, means, yerr=errors, marker="o", capsize=3, color=COLORS[MODIFIED], label=MODIFIED)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size}\n{size / context:.0%}" for size in sizes])
    axes.set(xlabel="window (keys, and share of the context)", ylabel=LOSS)


def by_position(axes, document, context, steps):
    """The final loss by position, past the training length too."""
    for name in NAMES:
        bins = find(document, context, name, steps=steps)["positions"]
        plot_losses(axes, name, [last for _, last, *_ in bins], [loss for _, _, *loss in bins], marker="o")
    axes.axvline(context, color="grey", linestyle=":", label="trained up to here")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position (last of its bin)")


def time_by_position(axes, document, context, steps):
    """Milliseconds of a sampled token; bars reach from the 20th to the 80th percentile."""
    for name in NAMES:
        for sampler, times in find(document, context, name)["token_ms"].items():
            y, low, high = ([time[key] for time in times.values()] for key in ("median_ms", "p20_ms", "p80_ms"))
            bars = [[m - p for m, p in zip(y, low, strict=True)], [p - m for m, p in zip(y, high, strict=True)]]
            label, style = f"{name}, {sampler}" if name == ORIGINAL else name, "-" if sampler == "cached" else "--"
            axes.errorbar([int(position) for position in times], y, yerr=bars, marker="o", markersize=3, capsize=2,
                          color=COLORS[name], linestyle=style, label=label)  # fmt: skip
    axes.set_xscale("log")
    axes.set(xlabel="position", ylabel="milliseconds a token")
    axes.set_ylim(bottom=0)


def plot_losses(axes, name, x, losses, marker=None):
    """A line through losses (mean, standard error) with a band of one standard error."""
    means, errors = zip(*losses, strict=True)
    low, high = ([m + sign * (e or 0) for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
    axes.plot(x, means, color=COLORS[name], label=name, marker=marker, markersize=3)
    axes.fill_between(x, low, high, color=COLORS[name], alpha=0.2, linewidth=0)
    axes.set_ylabel(LOSS)


PLOTS = {  # file: (what it shows, the function that draws one context and length, whether long runs are shown too)
    "loss-tokens.png": ("Held-out loss against characters read", loss_curves, True),
    "loss-seconds.png": ("Held-out loss against seconds", partial(loss_curves, by_seconds=True), True),
    "quality-window.png": ("Held-out loss against window", by_window, False),
    "loss-position.png": ("Held-out loss against position", by_position, True),
    "time-position.png": ("Time of a token against position", time_by_position, False),
}

"""The plots of the study, PNG files beside its tables."""

from pathlib import Path

from .plan import MODIFIED, NAMES, ORIGINAL, READINGS
from .results import find_model

COLORS = dict(zip(NAMES, ("black", "tab:blue", "tab:orange", "tab:red", "tab:purple"), strict=True))


def draw_all(document: dict, directory: Path) -> list[str]:
    """Draws every plot into a directory; their file names. Without matplotlib none."""
    try:
        from matplotlib.figure import Figure  # no pyplot: it would choose a display, and keep every figure
    except ImportError:
        return []
    plots = {
        "loss-tokens.png": lambda axes, context: loss_curves(axes, document, context, "tokens"),
        "loss-seconds.png": lambda axes, context: loss_curves(axes, document, context, "seconds"),
        "quality-window.png": lambda axes, context: quality_by_window(axes, document, context),
        "loss-position.png": lambda axes, context: loss_by_position(axes, document, context),
        "time-position.png": lambda axes, context: time_by_position(axes, document, context),
    }
    contexts = document["design"]["contexts"]
    for name, draw in plots.items():
        figure = Figure(figsize=(6.4 * len(contexts), 4.6), layout="constrained")
        for axes, context in zip(figure.subplots(1, len(contexts), squeeze=False)[0], contexts, strict=True):
            draw(axes, context)
            axes.set_title(f"context {context}")
            axes.grid(True, alpha=0.3)
            axes.legend(fontsize="small")
        figure.savefig(directory / name, format="png", dpi=100)
    return list(plots)


def loss_curves(axes, document, context, unit):
    """The held-out loss during training at equal width; bands are one standard error."""
    for name in NAMES:
        points = find_model(document, context, READINGS[0], name)["curve"]
        _band(axes, [point[unit] for point in points], [point["loss"] for point in points], name)
    axes.set(xlabel="characters read" if unit == "tokens" else "seconds of training (steps x median time of a step)")
    axes.set_ylabel("held-out loss (nats a character)")
    # the first point, before training, would press all others together
    seen = [p["loss"]["mean"] for row in document["models"] if row["context"] == context for p in row["curve"][1:]]
    axes.set_ylim(min(seen) - 0.03, max(seen) + 0.05)


def quality_by_window(axes, document, context):
    """The final loss of the modified architecture with each window."""
    rows = [row for row in document["windows"] if row["context"] == context]
    means = [row["loss"]["mean"] for row in rows]
    errors = [row["loss"]["standard_error"] or 0 for row in rows]
    axes.errorbar([row["window"] for row in rows], means, yerr=errors, marker="o", capsize=3, color=COLORS[MODIFIED],
                  label=MODIFIED)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["window"] for row in rows], [f"{row['window']}\n{row['fraction']:.0%}" for row in rows])
    axes.set(xlabel="window (keys, and of the context)", ylabel="held-out loss (nats a character)")


def loss_by_position(axes, document, context):
    """The final loss by how much came before, past the training length too."""
    for name in NAMES:
        bins = find_model(document, context, READINGS[0], name)["loss_by_position"]
        _band(axes, [b["last"] for b in bins], [b["loss"] for b in bins], name, marker="o")
    axes.axvline(context, color="grey", linestyle=":", label="trained up to here")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position (last of its bin)", ylabel="held-out loss (nats a character)")


def time_by_position(axes, document, context):
    """Milliseconds of a sampled token; bars reach from the 20th to the 80th percentile."""
    for name in NAMES:
        times = find_model(document, context, READINGS[0], name)["token_ms"]
        for sampler in ("cached", "recomputing"):
            points = sorted((t for t in times if t["sampler"] == sampler), key=lambda t: t["position"])
            if points:
                medians = [t["median_ms"] for t in points]
                reach = (
                    [t["median_ms"] - t["p20_ms"] for t in points],
                    [t["p80_ms"] - t["median_ms"] for t in points],
                )
                label = name if name != ORIGINAL else f"{name}, {sampler}"
                style = "--" if sampler == "recomputing" else "-"
                axes.errorbar([t["position"] for t in points], medians, yerr=reach, marker="o", markersize=3,
                              color=COLORS[name], linestyle=style, capsize=2, label=label)  # fmt: skip
    axes.set_xscale("log")
    axes.set(xlabel="position", ylabel="milliseconds a token")
    axes.set_ylim(bottom=0)


def _band(axes, x, losses, name, marker=None):
    means = [loss["mean"] for loss in losses]
    errors = [loss["standard_error"] or 0 for loss in losses]
    axes.plot(x, means, color=COLORS[name], label=name, marker=marker, markersize=3)
    low, high = ([m + s * e for m, e in zip(means, errors, strict=True)] for s in (-1, 1))
    axes.fill_between(x, low, high, color=COLORS[name], alpha=0.2, linewidth=0)

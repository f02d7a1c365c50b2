"""loss.png: the losses, the learning rate and the gradient norm over the steps, drawn anew after every evaluation."""

from model.checkpoint import replacing


def draw(history, path) -> None:
    """Draws what a `History` holds; without matplotlib, nothing."""
    try:
        from matplotlib.figure import Figure  # no pyplot: it would choose a display, and keep every figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 8), layout="constrained")
    losses, rate, norm = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    losses.plot(*history.series("loss"), color="tab:blue", linewidth=1, alpha=0.6, label="training")
    losses.plot(*history.series("held_out_loss"), color="tab:red", marker="o", markersize=4, label="held out")
    losses.set(ylabel="loss (nats per token)")
    losses.legend()
    rate.plot(*history.series("learning_rate"), color="tab:green", linewidth=1)
    rate.set(ylabel="learning rate")
    norm.plot(*history.series("grad_norm"), color="tab:purple", linewidth=1)
    norm.set(xlabel="step", ylabel="gradient norm")
    if any(history.series("grad_norm")[1]):
        norm.set_yscale("log")  # a spike would press everything else flat
    for axes in (losses, rate, norm):
        axes.grid(alpha=0.3)
    with replacing(path) as (file,):
        figure.savefig(file, format="png", dpi=110)

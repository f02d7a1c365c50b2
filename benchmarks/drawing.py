"""The plots of a document: made of its rows, drawn side by side into one PNG that is readable at 800 pixels."""

from pathlib import Path


def series(rows, x, y):
    """{contestant: [[x(row), y(row)]]} of the rows that were timed, for a plot."""
    found = {}
    for row in rows:
        if "median_ms" in row:
            found.setdefault(row["contestant"], []).append([x(row), y(row)])
    return found


def bars(rows, value):
    """{shape: {contestant: value(row)}} of the rows that were timed, for a plot."""
    found = {}
    for row in rows:
        if "median_ms" in row:
            found.setdefault(row["shape"], {})[row["contestant"]] = value(row)
    return found


def place(document):
    """Machine and dtype of a document, the title of its plots."""
    facts, settings = document["machine"], document.get("settings", {})
    threads = facts.get("threads") if facts["device"] == "cpu" else None
    words = [facts["name"], threads and f"{threads} thread" + "s" * (threads > 1)]
    return ", ".join(filter(None, [*words, settings.get("dtype") or settings.get("precision")]))


def draw(plots, path, title=None):
    """Draw the plots into one PNG; returns a line that says where, or why not."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a display
    except ImportError:
        return "no plot: matplotlib is not installed"
    plots = [plot for plot in plots if plot.get("bars") or any(plot.get("series", {}).values())]
    if not plots:
        return "no plot: nothing was measured"
    figure = Figure(figsize=(max(4.6 * len(plots), 6.4), 4.2), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    colours = {}  # a contestant has one colour in all plots
    for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
        axes.set_title(plot["title"], fontsize="medium")
        axes.set_xlabel(plot["x"])
        for name in plot.get("series") or [name for group in plot["bars"].values() for name in group]:
            colours.setdefault(name, f"C{len(colours) % 10}")
        (_draw_bars if "bars" in plot else _draw_lines)(axes, plot, colours)
    by_name = {
        name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if by_name:
        columns = min(5 if len(plots) > 1 else 3, len(by_name))
        figure.legend(by_name.values(), by_name, loc="outside lower center", ncols=columns, fontsize="small")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=160)
    return f"plot: {path}"


def _draw_lines(axes, plot, colours):
    """The last point of each line has its value; ours also where another line ends, to compare them."""
    ends = {max(points)[0] for points in plot["series"].values() if points}
    for name, points in plot["series"].items():
        if points:
            x, y = zip(*sorted(points), strict=True)
            ours = name.startswith("ours")
            axes.plot(x, y, marker="o", markersize=4, linewidth=3 if ours else 1.3, color=colours[name], label=name)
            for point in zip(x, y, strict=True):
                if point[0] == x[-1] or (ours and point[0] in ends):
                    offset = (0, -14 if ours else 6)
                    axes.annotate(_number(point[1]), point, offset, textcoords="offset points", ha="center", fontsize=8)
    ticks = []
    for x in sorted({x for points in plot["series"].values() for x, _ in points}):
        if not ticks or x > 1.4 * ticks[-1]:  # nearer ones would overlap
            ticks.append(x)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [_number(tick) for tick in ticks])
    axes.set_yscale("log")
    axes.margins(0.08)
    axes.yaxis.set_major_formatter(lambda y, _: _number(y))
    axes.set_ylabel(plot["y"])
    axes.grid(True, alpha=0.3)


def _draw_bars(axes, plot, colours):
    """Horizontal bars in groups. The bars of a single group are named at the axis, those of several in the legend."""
    groups, row, ticks = plot["bars"], 0, {}
    for group, values in groups.items():
        start = row
        for name, value in values.items():
            label = {"label": name} if len(groups) > 1 else {}
            axes.barh([row], [value], 0.9, color=colours[name], **label)
            axes.bar_label(axes.containers[-1], [_number(value)], padding=3, fontsize="small")
            ticks[row] = name
            row += 1
        if len(groups) > 1:
            for of_group in range(start, row):
                del ticks[of_group]
            ticks[(start + row - 1) / 2] = group.replace(" (", "\n(")
            row += 1  # a gap
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(True, axis="x", alpha=0.3)


def _number(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

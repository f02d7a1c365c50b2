"""The tables of the study, made of its document alone: the parts of the page between comments, and compare.csv.

A difference of losses counts where its 95 % interval leaves 0 out, and is bold there. A difference of times counts
where the ranges from the 20th to the 80th percentile do not overlap.
"""

import itertools
import math
import re

from .plan import EQUAL_WIDTH, MODIFIED, NAMES, ORIGINAL, SIZES
from .results import BYTES, CACHE_POSITIONS, difference, estimate
from .training import DISTANCES, LONGEST

CHANGES = (  # what is compared with the model before the change
    ("rotary positions", "rope", ORIGINAL),
    ("+ window", "rope-window", "rope"),
    ("+ grouped KV heads", MODIFIED, "rope-window"),
    ("modern instead", "modern", MODIFIED),
    ("one KV head instead", "multi-query", MODIFIED),
)
PART = re.compile(r"(<!-- (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def all_tables(document: dict) -> dict[str, list[dict]]:
    """{part of the page: its tables}, each {"title", "columns", "rows"} with text in every cell."""
    contexts, places = document["settings"]["contexts"], document["settings"]["places"]
    return {
        "ranking": [ranking(document, *place) for place in compared_at(document)],
        "changes": [changes(document)],
        "steps": [steps(document)],
        "windows": [windows(document)],
        "positions": [positions(document, *place) for place in places],
        "sampling": [sampling(document, contexts)],
        "copying": [copying(document)],
        "rates": [rates(document)],
        "samples": [samples(document)],
    }


def fill(page: str, parts: dict[str, str]) -> str:
    """The page with each part between `<!-- NAME -->` and `<!-- end -->` replaced. ValueError for an unknown NAME."""
    if unknown := {name for _, name, _ in PART.findall(page)} - set(parts):
        raise ValueError(f"the page has a part {min(unknown)!r}, wanted some of: {', '.join(parts)}")
    return PART.sub(lambda found: f"{found[1]}\n{parts[found[2]]}\n{found[3]}", page)


def empty_page(parts: dict[str, str]) -> str:
    """A page that has every part and no text."""
    return "# The architecture study\n" + "".join(f"\n<!-- {name} -->\n<!-- end -->\n" for name in parts)


def markdown(table: dict) -> str:
    """A table with its title, in Markdown."""
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines]
    return f"**{table['title']}**\n\n" + "".join(lines)


def table(title, columns, rows):
    return {"title": title, "columns": list(columns), "rows": [[str(cell) for cell in row] for row in rows]}


def find(document: dict, context: int, architecture: str, size: str = EQUAL_WIDTH, steps: int | None = None) -> dict:
    """A row of `models`, by default of the short runs."""
    wanted = context, architecture, steps or document["settings"]["steps"]
    rows = (row for row in document["models"] if (row["context"], row["architecture"], row["steps"]) == wanted)
    return next(row for row in rows if size in row["sizes"])


def compared_at(document: dict) -> list[tuple[int, int, str]]:
    """(context, steps, size) of every comparison."""
    rows = [(row["context"], row["steps"], size) for row in document["models"] for size in row["sizes"]]
    return [(*place, size) for place in document["settings"]["places"] for size in SIZES if (*place, size) in rows]


def faster_path(row: dict) -> str:
    """The path, our kernels or plain PyTorch, on which a model's steps take less time."""
    return min(row["step_ms"], key=lambda path: row["step_ms"][path]["median_ms"])


def seconds_at(row: dict, tokens: int) -> float:
    """Seconds of training up to so many tokens: steps times the median of the faster path."""
    step_ms = row["step_ms"][faster_path(row)]["median_ms"]
    return tokens / row["tokens"] * row["steps"] * step_ms / 1e3


def token_time(row: dict, position: int, sampler: str = "cached") -> dict | None:
    """The time of a sampled token at a position, None where it was not measured."""
    return row.get("token_ms", {}).get(sampler, {}).get(str(position))


def shorter(ours: dict, theirs: dict) -> int:
    """1 or -1 where the 20th to 80th percentiles of two times do not overlap, else 0."""
    return (ours["p80_ms"] < theirs["p20_ms"]) - (ours["p20_ms"] > theirs["p80_ms"])


def loss_at(curve: list[tuple[float, float]], seconds: float) -> float:
    """The loss of a curve [(seconds, loss)] at a time, linear between two of its points."""
    for (before, first), (after, second) in itertools.pairwise(curve):
        if seconds <= after:
            return first + (seconds - before) / (after - before) * (second - first)
    return curve[-1][1]


def ranking(document, context, steps, size):
    original, rows = find(document, context, ORIGINAL, steps=steps), []
    for name in NAMES:
        row = find(document, context, name, size, steps)
        loss = estimate(row["losses"])
        other_units = f"{math.exp(loss.mean):.2f}", f"{loss.mean / math.log(2):.3f}"
        apart = "" if row is original else compared(row["losses"], original["losses"])
        shape = row["width"], f"{row['parameters']:,}", f"{row['learning_rate']:g}"
        rows.append((loss, name, *shape, with_error(*loss), *other_units, apart))
    columns = ["", "width", "parameters", "learning rate", "held-out loss", "perplexity", "bits per character"]
    title = f"Context {context}, {steps:,} steps, {size}"
    return table(title, [*columns, "minus the original"], [cells for _, *cells in sorted(rows)])


def changes(document):
    places = compared_at(document)
    rows = []
    for text, *pair in CHANGES:
        losses = [[find(document, c, name, size, steps)["losses"] for name in pair] for c, steps, size in places]
        rows.append([text, *(compared(*both) for both in losses)])
    columns = (f"{context}, {steps:,} steps, {size}" for context, steps, size in places)
    return table("Loss minus the loss before the change", ["", *columns], rows)


def steps(document):
    """Times of a step, and the loss, read from the curve, at the time at which the original's run of a length ends."""
    lengths = sorted({steps for _, steps in document["settings"]["places"]})
    rows = {}
    for row in document["models"]:
        model = row["context"], row["architecture"], row["width"]
        if model not in rows:
            times = [spread(row["step_ms"][path]) for path in ("fused", "plain")]
            speed = row["tokens"] / seconds_at(row, row["tokens"])
            rows[model] = [*model, *times, f"{speed:,.0f}", *("" for _ in lengths)]
        rows[model][6 + lengths.index(row["steps"])] = when_the_original_ends(document, row)
    title = "A training step on {name}, threads {threads}, torch {torch}, load {load} before and {load_after} after"
    columns = ["context", "", "width", "our kernels, ms", "plain PyTorch, ms", "characters/s, the faster"]
    columns += (f"loss when the original ends its {steps:,} steps" for steps in lengths)
    return table(title.format(**document["machine"]), columns, rows.values())


def when_the_original_ends(document, row):
    """A model's loss at the time at which the original's run ends; bold where it differs more than the interval."""
    original = find(document, row["context"], ORIGINAL, steps=row["steps"])
    curve = [(seconds_at(row, tokens), loss) for tokens, loss, _ in row["curve"]]
    loss, end = loss_at(curve, seconds_at(original, original["tokens"])), original["curve"][-1][1]
    return bold(f"{loss:.3f}", abs(loss - end) > difference(row["losses"], original["losses"]).margin)


def windows(document):
    widest, rows = {row["context"]: row for row in document["windows"]}, []
    for row in document["windows"]:
        context, window, losses = row["context"], row["window"], row["losses"]
        reach = (window - 1) * document["settings"]["n_layer"] + 1
        apart = "" if row is widest[context] else compared(losses, widest[context]["losses"])
        rows.append((context, window, f"{window / context:.0%}", reach, with_error(*estimate(losses)), apart))
    columns = ["context", "window", "of the context", "reach", "held-out loss", "minus the widest"]
    return table(f"{MODIFIED} with each window, equal width, seeds: {len(losses)}", columns, rows)


def positions(document, context, steps):
    rows = {name: find(document, context, name, steps=steps) for name in NAMES}
    found = {name: {tuple(bin[:2]): bin[2:] for bin in row["positions"]} for name, row in rows.items()}
    # the second position shows what a model knows from two characters
    bins = [(first, last) for first, last in max(found.values(), key=len) if last == 2 or last >= context / 4]
    end = next(bin for bin in bins if bin[1] == context)
    rows = []
    for name, losses in found.items():
        cells = (with_error(*losses[bin]) if bin in losses else "no positions left" for bin in bins)
        rise = f"{losses[bins[-1]][0] - losses[end][0]:+.3f}" if bins[-1] in losses else ""
        rows.append((name, *cells, rise))
    titles = (str(first) if first == last else f"{first} to {last}" for first, last in bins)
    columns = ["", *titles, f"rise from 1 to {LONGEST} contexts"]
    return table(f"Loss by position, context {context}, {steps:,} steps", columns, rows)


def sampling(document, contexts):
    rows = []
    for context, name, sampler in itertools.product(contexts, NAMES, ("cached", "recomputing")):
        row, original, cells = find(document, context, name), find(document, context, ORIGINAL), []
        for position in CACHE_POSITIONS:
            if time := token_time(row, position, sampler):
                told = shorter(time, token_time(original, position)) > 0
                past = sampler == "cached" and name == ORIGINAL and position > context
                cells.append(bold(spread(time), told) + ", recomputed" * past)
        if len(cells) == len(CACHE_POSITIONS):
            sizes = [f"{size:,}" for size in (row["kv_bytes_per_token"], *row["cache_bytes"].values())]
            label, sizes = (name, sizes) if sampler == "cached" else (f"{name}, no cache", [""] * len(sizes))
            rows.append((context, label, *cells, *sizes))
    times, sizes = ([text.format(p) for p in CACHE_POSITIONS] for text in ("ms at {:,}", "cache at {:,}, bytes"))
    return table("A sampled token", ["context", "", *times, "cache bytes a token", *sizes], rows)


def copying(document):
    columns = (f"{distance} characters, {kind}" for kind, distance in DISTANCES.items())
    rows = ((name, *(f"{accuracy:.0%}" for accuracy in row.values())) for name, row in document["copying"].items())
    return table("Right answers on the copying task", ["", *columns], rows)


def rates(document):
    tried = sorted({rate for row in document["rates"] for rate in row["losses"]}, key=float)
    rows = []
    for row in document["rates"]:
        losses = {rate: ", ".join(f"{loss:.3f}" for loss in row["losses"].get(rate, ())) for rate in tried}
        cells = (bold(losses[rate], rate == row["best"]) for rate in tried)
        rows.append((row["context"], f"{row['steps']:,}", row["architecture"], *cells))
    title = "Held-out loss with each learning rate, the seeds of the search, equal width"
    return table(title, ["context", "steps", "", *tried], rows)


def samples(document):
    """Of the longest runs of each context."""
    rows, longest = [], {context: steps for context, steps in sorted(map(tuple, document["settings"]["places"]))}
    for context, name in itertools.product(longest, NAMES):
        sample = find(document, context, name, steps=longest[context])["sample"]
        text = sample.strip("\n").replace("`", "'").replace("\n", " / ")
        rows.append((context, f"{longest[context]:,}", name, f"`{text}`"))
    return table("A sample of each, equal width, first seed", ["context", "steps", "", "text"], rows)


def csv_rows(document):
    """The rows of compare.csv: one model at one context, length and size."""
    for (context, steps, size), name in itertools.product(compared_at(document), NAMES):
        row = find(document, context, name, size, steps)
        loss = estimate(row["losses"])
        apart = difference(row["losses"], find(document, context, ORIGINAL, steps=steps)["losses"])
        path = faster_path(row)
        step, times = row["step_ms"][path], {position: token_time(row, position) for position in CACHE_POSITIONS}
        numbers = {
            "loss": loss.mean,
            "loss_standard_error": loss.standard_error,
            "perplexity": math.exp(loss.mean),
            "bits_per_character": loss.mean / math.log(2),
            "minus_original": apart.mean,
            "minus_original_standard_error": apart.standard_error,
            "minus_original_margin_95": None if math.isinf(apart.margin) else apart.margin,
        }
        yield {
            "context": context,
            "steps": steps,
            "size": size,
            **{key: row[key] for key in ("architecture", "window", "width", "n_kv_head", "parameters")},
            "learning_rate": row["learning_rate"],
            "bytes": row["parameters"] * BYTES,
            "kv_bytes_per_token": row["kv_bytes_per_token"],
            **{f"cache_bytes_at_{position}": number for position, number in row["cache_bytes"].items()},
            "training_tokens": row["tokens"],
            "seeds": len(row["losses"]),
            **{key: None if value is None else round(value, 6) for key, value in numbers.items()},
            "step_path": path,
            "step_ms": step["median_ms"],
            "step_p20_ms": step["p20_ms"],
            "step_p80_ms": step["p80_ms"],
            "training_tokens_per_second": round(row["tokens"] / seconds_at(row, row["tokens"])),
            **{f"token_ms_at_{position}": time and time["median_ms"] for position, time in times.items()},
        }


def with_error(mean, standard_error, _=None):
    """ "2.076 ± 0.003", with the standard error; with one seed the mean alone."""
    return f"{mean:.3f}" if standard_error is None else f"{mean:.3f} ± {standard_error:.3f}"


def compared(ours, theirs):
    """A difference of losses with half of its 95 % interval: "-0.084 ± 0.012"."""
    apart = difference(ours, theirs)
    margin = " (one seed)" if math.isinf(apart.margin) else f" ± {apart.margin:.3f}"
    return bold(f"{apart.mean:+.3f}{margin}", apart.sign)


def bold(text, wanted):
    return f"**{text}**" if wanted else text


def spread(time):
    """ "1.23 (1.20 to 1.31)" milliseconds."""
    return f"{time['median_ms']:.2f} ({time['p20_ms']:.2f} to {time['p80_ms']:.2f})"

"""The sections of the page after the ranking: windows, positions, sampling, reach, learning rates, samples."""

from .claims import at_best_rates
from .copying import DISTANCES, LAYERS, LETTERS, REACH, TESTED, WINDOW
from .plan import MODIFIED, NAMES, ORIGINAL, READINGS
from .results import CACHE_POSITIONS, find_model, token_time
from .tables import difference, mean_and_error, paragraph, plot, spread, table
from .training import STRETCH


def window_section(document, plots):
    yield "## Quality against window\n"
    seeds = document["windows"][0]["loss"]["seeds"]
    yield paragraph(
        f"{MODIFIED} at equal width, {seeds} seed{'s' if seeds > 1 else ''}. *Reach* is how many characters the "
        "layers together look back on, the newest included; it may be more than the context has."
    )
    yield from table(
        ["context", "window", "of the context", "reach", "held-out loss", "against the widest"],
        [
            [
                row["context"],
                row["window"],
                f"{row['fraction']:.0%}",
                row["reach"],
                mean_and_error(row["loss"]),
                "" if row["fraction"] == 1 else difference(row["minus_widest"]),
            ]
            for row in document["windows"]
        ],
    )
    yield from plot(plots, "quality-window.png", "Held-out loss against window")


def position_section(document, plots):
    yield "## Loss by position, and past the training length\n"
    yield paragraph(
        f"On texts of {STRETCH} contexts: the mean loss of predicting the character after so many. Learned positions "
        "end with the context they were trained on; rotary ones go on."
    )
    for context in document["design"]["contexts"]:
        rows = [find_model(document, context, READINGS[0], name) for name in NAMES]
        longest = max((row["loss_by_position"] for row in rows), key=len)
        bins = [b for b in longest if b["last"] >= context / 4]
        yield from table(
            [f"context {context}", *(f"{b['first']} to {b['last']}" for b in bins)],
            [
                [row["architecture"], *(at_bin(row, b) for b in bins)]
                for row in rows
            ],
        )  # fmt: skip
        yield paragraph(
            f"From the last characters of the context to the last of all: {past_the_context(rows, context)}."
        )
    yield from plot(plots, "loss-position.png", "Held-out loss against position")


def past_the_context(rows, context):
    """By how much the loss rises past the training length, of every model that gets there."""
    found = []
    for row in rows:
        bins = {b["last"]: b["loss"]["mean"] for b in row["loss_by_position"]}
        if max(bins) > context:
            found.append(f"{row['architecture']} {bins[max(bins)] - bins[context]:+.3f}")
    return ", ".join(found)


def at_bin(row, wanted):
    """The loss in a bin of positions, or why there is none."""
    found = [b for b in row["loss_by_position"] if b["last"] == wanted["last"]]
    return mean_and_error(found[0]["loss"]) if found else "no positions left"


def sampling_section(document, plots):
    yield "## Sampling\n"
    yield paragraph(
        "Milliseconds of a sampled token, median (20th to 80th percentile), one text at a time, equal width. Learned "
        "positions end at the context: past it the whole context is read anew for every token (*recomputed*), as the "
        "original sampler does from the first token on (its own row). Bytes are those of keys and values in fp32."
    )
    rows = []
    for context in document["design"]["contexts"]:
        for name in NAMES:
            row = find_model(document, context, READINGS[0], name)
            for sampler in ("cached", "recomputing"):
                times = [token_time(row, position, sampler) for position in CACHE_POSITIONS]
                if not all(times):
                    continue
                ended = [name == ORIGINAL and position > context for position in CACHE_POSITIONS]
                cells = [
                    spread(time) + (", recomputed" if past and sampler == "cached" else "")
                    for time, past in zip(times, ended, strict=True)
                ]
                sizes = [f"{row['kv_bytes_per_token']:,}", *(f"{size:,}" for size in row["cache_bytes"].values())]
                label = name if sampler == "cached" else f"{name}, no cache"
                rows.append([context, label, *cells, *(sizes if sampler == "cached" else ["", "", ""])])
    places = [f"at {position:,}" for position in CACHE_POSITIONS]
    columns = ["context", "", *(f"ms {place}" for place in places), "cache bytes a token"]
    yield from table([*columns, *(f"cache {place}, bytes" for place in places)], rows)
    yield from plot(plots, "time-position.png", "Time a token against position")


def copying_section(document):
    yield "## What a window cannot do\n"
    yield paragraph(
        "A letter at the beginning of a random text has to be said at its end. "
        f"{LAYERS} layers with a window of {WINDOW} carry it over {REACH} characters at most; past that only guessing "
        f"is left, one in {LETTERS} right. Right answers on {TESTED:,} texts that were not trained on:"
    )
    found = {(row["architecture"], row["distance"]): row["accuracy"] for row in document["copying"]}
    names = list(dict.fromkeys(name for name, _ in found))
    yield from table(
        ["", *(f"{distance} characters, {kind}" for kind, distance in DISTANCES.items())],
        [[name, *(f"{found[name, distance]:.0%}" for distance in DISTANCES.values())] for name in names],
    )


def rates_section(document):
    if len({row["learning_rate"] for row in document["rates"]}) < 2:
        return
    yield "## Was the learning rate fair?\n"
    yield "One learning rate serves all. The first and the modified architecture with others, seed 0, equal width:\n"
    rates = sorted({row["learning_rate"] for row in document["rates"]})
    found = {(row["context"], row["architecture"], row["learning_rate"]): row["loss"] for row in document["rates"]}
    places = list(dict.fromkeys((context, name) for context, name, _ in found))
    yield from table(
        ["context", "", *(f"{rate:g}" for rate in rates)],
        [[context, name, *(f"{found[context, name, rate]:.3f}" for rate in rates)] for context, name in places],
    )
    for context in document["design"]["contexts"]:
        yield from (f"- Context {context}: {remark}." for remark in at_best_rates(document, context))
    yield ""


def samples_section(document):
    yield "## A sample of each\n"
    yield "Equal width, the first seed, after a line break; temperature 0.8, the 40 likeliest characters.\n"
    for context in document["design"]["contexts"]:
        for name in NAMES:
            text = find_model(document, context, READINGS[0], name)["sample"].strip("\n")
            yield f"Context {context}, {name}:\n"
            yield "\n".join("    " + line for line in text.split("\n")) + "\n"

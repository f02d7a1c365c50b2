"""The page of the study, its CSV and its JSON, made of the document (results.py) and nothing else."""

import csv
import json
from pathlib import Path

from model.checkpoint import replacing

from .claims import judge
from .page_details import (
    copying_section,
    position_section,
    rates_section,
    samples_section,
    sampling_section,
    window_section,
)
from .plan import MODIFIED, ORIGINAL, READINGS
from .plots import draw_all
from .results import find_model, ranking
from .tables import FOLDER, csv_row, difference, distinct, mean_and_error, paragraph, plot, spread, table

PAGE = "architecture-study.md"


def publish(document: dict, directory: str | Path) -> Path:
    """Writes architecture-study.md into a directory, and compare.csv, compare.json and the plots beside it."""
    folder = Path(directory) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    document = document | {"claims": judge(document)}
    with replacing(folder / "compare.json") as (file,):
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    with replacing(folder / "compare.csv") as (file,), open(file, "w", newline="", encoding="utf-8") as rows:
        writer = csv.DictWriter(rows, fieldnames=list(csv_row(document["models"][0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(csv_row(row) for row in document["models"])
    plots = draw_all(document, folder)
    page = Path(directory) / PAGE
    with replacing(page) as (file,):
        file.write_text("\n".join(write_page(document, plots)) + "\n", encoding="utf-8")
    return page


def write_page(document: dict, plots: list[str]):
    """The page, line by line."""
    contexts = document["design"]["contexts"]
    yield from title(document)
    yield from claims_section(document)
    yield from setting_section(document)
    yield "## The ranking\n"
    yield paragraph(
        "Mean ± standard error over seeds; *against the original* is the mean of the differences seed by seed ± half "
        "of its 95 % interval (Student's t), in nats a character: below 0 is better. Bold where the interval leaves 0 "
        "out; elsewhere nothing is said."
    )
    for context in contexts:
        for reading in READINGS:
            yield from ranking_table(document, context, reading)
    yield from plot(plots, "loss-tokens.png", "Held-out loss against characters read")
    yield from changes_section(document)
    yield from clock_section(document, plots)
    yield from window_section(document, plots)
    yield from position_section(document, plots)
    yield from sampling_section(document, plots)
    yield from copying_section(document)
    yield from rates_section(document)
    yield from samples_section(document)
    yield from limits_section(document)


def title(document):
    yield "# The architecture study\n"
    yield paragraph(
        "Does the modified GPT-2 (rotary positions, a sliding window, grouped KV heads) earn its keep beside the "
        "original? This page, its tables and its plots are written by"
    )
    yield f"```\n{document['command']}\n```\n"
    machine = document["machine"]
    yield paragraph(
        f"on {machine['device']} with {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}, "
        f"torch {machine['torch']}. All figures: [compare.csv]({FOLDER}/compare.csv), "
        f"[compare.json]({FOLDER}/compare.json)."
    )


def claims_section(document):
    yield "## What was claimed, and what was found\n"
    yield from table(
        ["claim", "verdict", "found"],
        [[claim["claim"], f"**{claim['verdict']}**", claim["found"]] for claim in document["claims"]],
    )


def setting_section(document):
    settings, design = document["settings"], document["design"]
    yield "## The setting\n"
    yield paragraph(
        f"Characters of {document['data']}, the last 10 % held out. {settings['n_layer']} layers, "
        f"{settings['n_head']} query heads, {settings['n_kv_head']} KV heads where they are grouped, 1 in multi-query; "
        f"width {settings['d_model']} at equal width, and at equal parameters the multiple of {settings['n_head']} "
        "that comes closest to the original's count. The window is "
        f"{design['window_fraction']:.0%} of the context. Every run takes {settings['steps']:,} steps of about "
        f"{settings['tokens_per_step']} characters with AdamW at {settings['learning_rate']:g} (warm-up, then a cosine "
        "to a tenth, weight decay 0.1, gradients clipped at 1), whatever the architecture. Runs of one seed read the "
        "same examples in the same order. The held-out loss is the mean over about "
        f"{settings['held_out_tokens']:,} characters, in contexts spread evenly over the held-out text. "
        f"{design['seeds']} seeds."
    )


def ranking_table(document, context, reading):
    yield f"**Context {context}, {reading}**\n"
    yield from table(
        ["", "width", "parameters", "held-out loss", "perplexity", "bits a character", "against the original"],
        [
            [
                row["architecture"],
                row["width"],
                f"{row['parameters']:,}",
                mean_and_error(row["loss"]),
                f"{row['perplexity']:.2f}",
                f"{row['bits_per_character']['mean']:.3f}",
                "" if row["architecture"] == ORIGINAL else difference(row["minus_original"]),
            ]
            for row in ranking(document, context, reading)
        ],
    )


def changes_section(document):
    yield "## What each change does\n"
    yield paragraph("The difference that a step makes to the one before it, in nats a character, as above.")
    columns = [(context, reading) for context in document["design"]["contexts"] for reading in READINGS]
    found = {(c["context"], c["reading"], c["to"]): c for c in document["changes"]}
    names = {"rope": "rotary positions", "rope-window": "+ window", MODIFIED: "+ grouped KV heads",
             "multi-query": "one KV head in their place"}  # fmt: skip
    yield from table(
        ["", *(f"{context}, {reading}" for context, reading in columns)],
        [
            [text, *(difference(found[(*column, name)]["difference"]) for column in columns)]
            for name, text in names.items()
        ],
    )


def clock_section(document, plots):
    yield "## Training by the clock\n"
    machine = document["machine"]
    yield paragraph(
        "Steps were timed apart from the training, the models in turns: median (20th to 80th percentile) in "
        "milliseconds, with our kernels and in plain PyTorch. Seconds in the plot are steps times the median of the "
        f"faster of the two; the load of the machine was {machine['load']} before and {machine['load_after']} after."
    )
    rows = [
        [
            row["context"],
            row["architecture"],
            row["width"],
            *(spread(row["step_ms"][path]) for path in ("fused", "plain")),
            f"{row['tokens_per_second']:,.0f}",
        ]
        for row in distinct(document["models"])
    ]
    yield from table(["context", "", "width", "ours, ms", "plain PyTorch, ms", "characters/s, the faster"], rows)
    yield from plot(plots, "loss-seconds.png", "Held-out loss against seconds")


def limits_section(document):
    read = max(row["tokens"] for row in document["models"])
    parameters = find_model(document, document["design"]["contexts"][0], READINGS[0], ORIGINAL)["parameters"]
    yield "## What this does not show\n"
    yield paragraph(
        f"Models of {parameters:,} parameters after {read:,} characters are at the beginning of their training: a "
        "difference here is one of how fast they learn, and may shrink or turn with more. Times are those of one text "
        f"at a time and of small batches on {document['machine']['device']}, where a small model's time is mostly "
        "that of calling operators; on a GPU and with long texts the parts weigh differently (`benchmarks/`). The "
        "interval over seeds says nothing about other texts, sizes or windows."
    )
    yield paragraph(
        "Losses are the same on every run with the same machine, versions and threads. Times are not: `--retime` "
        "takes them anew. Finished runs are kept in `--out`, so an interrupted study goes on where it stopped."
    )


def summary(document: dict) -> str:
    """The claims and their verdicts, for the terminal."""
    return "\n".join(f"{claim['claim']}: {claim['verdict'].upper()}\n  {claim['found']}" for claim in judge(document))

"""Cells, tables, paragraphs: what the page and the CSV are made of."""

import textwrap

from .claims import signed
from .results import CACHE_POSITIONS, token_time

FOLDER = "architecture-study"  # beside the page: its tables, its plots


def csv_row(row: dict) -> dict:
    """A row of compare.csv: one model in one reading at one context."""
    plain = ("context", "reading", "architecture", "window", "width", "n_kv_head", "parameters", "bytes")
    times = {position: token_time(row, position) for position in CACHE_POSITIONS}
    path = row["step_ms"][row["path"]]
    return {
        **{name: row[name] for name in plain},
        "kv_bytes_per_token": row["kv_bytes_per_token"],
        **{f"cache_bytes_at_{position}": size for position, size in row["cache_bytes"].items()},
        "training_tokens": row["tokens"],
        "seeds": row["loss"]["seeds"],
        "loss": _rounded(row["loss"]["mean"]),
        "loss_standard_error": _rounded(row["loss"]["standard_error"]),
        "perplexity": _rounded(row["perplexity"]),
        "bits_per_character": _rounded(row["bits_per_character"]["mean"]),
        "minus_original": _rounded(row["minus_original"]["mean"]),
        "minus_original_standard_error": _rounded(row["minus_original"]["standard_error"]),
        "minus_original_margin_95": _rounded(row["minus_original"]["margin"]),
        "step_path": row["path"],
        "step_ms": path["median_ms"],
        "step_p20_ms": path["p20_ms"],
        "step_p80_ms": path["p80_ms"],
        "training_tokens_per_second": round(row["tokens_per_second"]),
        **{f"token_ms_at_{p}": None if time is None else time["median_ms"] for p, time in times.items()},
    }


def distinct(rows):
    """Rows of `models` without the second mention of a model that both readings have."""
    return list({(row["context"], row["architecture"], row["width"]): row for row in rows}.values())


def mean_and_error(loss):
    """ "2.076 ± 0.003", with the standard error; with one seed the mean alone."""
    error = "" if loss["standard_error"] is None else f" ± {loss['standard_error']:.3f}"
    return f"{loss['mean']:.3f}{error}"


def difference(value):
    """A difference with its 95 % interval, bold where that leaves 0 out."""
    return f"**{signed(value)}**" if value["sign"] else signed(value)


def spread(time):
    """ "1.23 (1.20 to 1.31)" milliseconds."""
    return f"{time['median_ms']:.2f} ({time['p20_ms']:.2f} to {time['p80_ms']:.2f})"


def table(columns, rows):
    """A Markdown table."""
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
    yield ""


def _rounded(value):
    return None if value is None else round(value, 6)


def paragraph(text):
    """Text in lines of at most 120 characters, and an empty one."""
    return textwrap.fill(text, 120) + "\n"


def plot(plots, name, text):
    """An image, where it was drawn."""
    if name in plots:
        yield f"![{text}]({FOLDER}/{name})\n"

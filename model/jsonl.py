"""Files of JSON lines: one object a line, each read by itself, so that a bad line can be named by its number."""

import json
from collections.abc import Iterator
from pathlib import Path


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of each line that is not empty, from 1; OSError if the file cannot be read."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line


def parse_object(line: bytes, wanted: str) -> dict:
    """The object of a line. Raises ValueError, in a few words, for anything else; wanted: its fields."""
    try:
        values = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(_reason(error)) from None
    if not isinstance(values, dict):
        raise ValueError(f"it is no object, wanted {wanted}")
    return values


def text_of(values: dict, name: str) -> str:
    """The text in this field. Raises ValueError, in a few words, if it is none."""
    text = values[name]
    if not isinstance(text, str):
        raise ValueError(f"its {name} is {json.dumps(text)[:40]}, wanted a text in quotes")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text in it holds half of a surrogate pair, {error.object[error.start]!a}") from None
    return text


def _reason(error):
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.object[error.start]:#04x} at offset {error.start})"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)

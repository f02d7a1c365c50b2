"""Documents in a .jsonl file: a JSON object a line, {"text": ...}, or {"prompt": ..., "completion": ...}.

for prompt, text in read_documents("chats.jsonl"): ...         # prompt is "" for {"text": ...}
"""

import json
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".jsonl"
_WANTED = 'wanted "text", or "prompt" and "completion"'


def read_documents(path: Path) -> Iterator[tuple[str, str]]:
    """(prompt, text) of each line in turn; other fields are ignored, and so are empty lines.

    Raises ValueError, in one line with the file and the number of the line, for one that is not such an object;
    OSError if the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                try:
                    yield _document(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"data file {path}, line {number}: {_reason(error)}") from None
    except OSError as error:
        raise type(error)(f"data file {path} cannot be read: {error.strerror}") from None


def _document(line):
    values = json.loads(line.decode("utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"it is no object, {_WANTED}")
    names = ("prompt", "completion") if "text" not in values else ("text",)
    missing = [name for name in names if name not in values]
    if missing or ("text" in values and "completion" in values):
        raise ValueError(f"its fields are {', '.join(map(repr, sorted(values))) or 'none'}, {_WANTED}")
    for name in names:
        if not isinstance(values[name], str):
            raise ValueError(f"its {name} is {json.dumps(values[name])[:40]}, wanted a text in quotes")
        values[name].encode()  # raises for half of a surrogate pair
    return tuple(values[name] for name in names) if len(names) == 2 else ("", values["text"])


def _reason(error):
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.object[error.start]:#04x} at offset {error.start})"
    if isinstance(error, UnicodeEncodeError):
        return f"a text in it holds half of a surrogate pair, {error.object[error.start]!a}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)

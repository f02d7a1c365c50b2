"""Documents in a .jsonl file: a JSON object a line, {"text": ...}, or {"prompt": ..., "completion": ...}.

for prompt, text in read_documents("chats.jsonl"): ...         # prompt is "" for {"text": ...}
"""

from collections.abc import Iterator
from pathlib import Path

from model.jsonl import parse_object, read_lines, text_of

SUFFIX = ".jsonl"
_WANTED = '"text", or "prompt" and "completion"'


def read_documents(path: Path) -> Iterator[tuple[str, str]]:
    """(prompt, text) of each line in turn; other fields are ignored, and so are empty lines.

    Raises ValueError, in one line with the file and the number of the line, for one that is not such an object;
    OSError if the file cannot be read.
    """
    try:
        for number, line in read_lines(path):
            try:
                yield _document(line)
            except ValueError as error:
                raise ValueError(f"data file {path}, line {number}: {error}") from None
    except OSError as error:
        raise type(error)(f"data file {path} cannot be read: {error.strerror}") from None


def _document(line):
    values = parse_object(line, _WANTED)
    names = ("prompt", "completion") if "text" not in values else ("text",)
    missing = [name for name in names if name not in values]
    if missing or ("text" in values and "completion" in values):
        raise ValueError(f"its fields are {', '.join(map(repr, sorted(values))) or 'none'}, wanted {_WANTED}")
    texts = [text_of(values, name) for name in names]
    return tuple(texts) if len(names) == 2 else ("", *texts)

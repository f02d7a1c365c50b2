"""Text to numbers and back: characters, bytes, or subwords, stored so that Hugging Face's AutoTokenizer reads them too.

tokenizer = CharTokenizer.from_text(text)            # or ByteTokenizer(), which knows every text
tokenizer.decode(tokenizer.encode("When are you going"))
tokenizer = load_tokenizer("imported/gpt2")          # any tokenizer.json; one of subwords needs `tokenizers`

All have vocab_size, encode, decode, stream, to_json, and for texts that are read piece by piece `cut`.
"""

import codecs
import json
from pathlib import Path

from .files import replacing
from .subwords import END_OF_TEXT, SubwordTokenizer

FILE = "tokenizer.json"
EVERY_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}


class CharTokenizer:
    """A token a character (Unicode code point). `vocab` is the characters in the order of their numbers.

    stoi, itos    the number of each character, and the character of each number
    """

    kind = "characters"
    end_of_text = None  # documents follow each other with nothing in between

    def __init__(self, vocab):
        self.stoi = {character: i for i, character in enumerate(vocab)}
        self.itos = dict(enumerate(self.stoi))
        if not self.stoi or len(self.stoi) != len(vocab) or any(len(character) != 1 for character in self.stoi):
            raise ValueError("vocab is not a sequence of different single characters")

    @classmethod
    def from_text(cls, text):
        """The characters that occur in the text, in the order of their code points."""
        return cls(sorted(set(text)))

    @property
    def vocab_size(self) -> int:
        return len(self.stoi)

    def encode(self, text) -> list[int]:
        """The number of each character. Raises ValueError that names the characters which are not in the vocabulary."""
        try:
            return [self.stoi[character] for character in text]
        except KeyError:
            unknown = sorted(set(text) - self.stoi.keys())
            named = ", ".join(map(repr, unknown[:10])) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
            raise ValueError(
                f"{named} not in the vocabulary of {self.vocab_size} characters: leave them out, or use a model "
                "trained on a text that has them"
            ) from None

    def cut(self, text) -> int:
        """The last place where the text can be cut so that its parts encode as the whole does: here its end."""
        return len(text)

    def decode(self, tokens) -> str:
        """The text of a sequence (or 1-D tensor) of numbers. Raises ValueError for one outside the vocabulary."""
        try:
            return "".join(self.itos[int(token)] for token in tokens)
        except KeyError as error:
            raise ValueError(f"token {error} is outside the vocabulary of {self.vocab_size} characters") from None

    def stream(self, tokens, prompt=()):
        """The text of each token as it comes, after those of `prompt`."""
        return (self.decode([token]) for token in tokens)

    def save(self, directory):
        """Write tokenizer.json, atomically: a word-level vocabulary over a split into single characters."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        with replacing(Path(directory) / FILE) as (temporary,):
            temporary.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The file's text, in the format of Hugging Face's tokenizers library."""
        description = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": EVERY_CHARACTER,
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            # the unknown token is not in the vocabulary, so an unknown character is an error there as it is here
            "model": {"type": "WordLevel", "vocab": self.stoi, "unk_token": "[UNK]"},
        }
        return json.dumps(description, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text):
        """The tokenizer of a file's text. Raises ValueError if it is not one of characters."""
        vocab = _characters(text)
        if vocab is None:
            raise ValueError("it holds words or pieces of words, not characters: load_tokenizer reads it")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError("its vocabulary does not number the characters from 0 without gaps")
        return cls(sorted(vocab, key=vocab.get))


class ByteTokenizer:
    """A token a byte of UTF-8: every text, in 256 numbers. <|endoftext|> takes 255, a byte that no UTF-8 text has.

    It needs no package; its file is that of a BPE without merges, which `tokenizers` runs to the same numbers.
    """

    kind = "bytes"
    vocab_size = 256
    end_of_text = 255

    def encode(self, text) -> list[int]:
        """The text's bytes. <|endoftext|> written out in it is one token, as subword vocabularies have it."""
        return list(self.encode_to_bytes(text))

    def encode_to_bytes(self, text) -> bytes:
        """`encode`, packed: each byte is a token."""
        return text.encode().replace(END_OF_TEXT.encode(), b"\xff")

    def cut(self, text) -> int:
        """The last place where the text can be cut so that its parts encode as the whole does: in no <|endoftext|>."""
        begun = next((n for n in range(len(END_OF_TEXT) - 1, 0, -1) if text.endswith(END_OF_TEXT[:n])), 0)
        return len(text) - begun

    def decode(self, tokens) -> str:
        """The text of a sequence (or 1-D tensor) of numbers; bytes that are no UTF-8 become U+FFFD."""
        documents = bytes(int(token) for token in tokens).split(b"\xff")
        return END_OF_TEXT.join(document.decode(errors="replace") for document in documents)

    def stream(self, tokens, prompt=()):
        """The text of each token as it comes, after those of `prompt`: "" while a character is not yet whole."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in prompt:
            _step(decoder, token)
        return (_step(decoder, token) for token in tokens)

    def to_json(self) -> str:
        """The file's text, in the format of Hugging Face's tokenizers library."""
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        description = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": self.end_of_text, "content": END_OF_TEXT, **flags}],
            "normalizer": None,
            "pre_tokenizer": level,
            "post_processor": None,
            "decoder": level,
            "model": {"type": "BPE", "vocab": BYTES, "merges": []},
        }
        return json.dumps(description, indent=1, ensure_ascii=False)


def _step(decoder, token):
    if token == ByteTokenizer.end_of_text:
        return decoder.decode(b"", final=True) + END_OF_TEXT
    return decoder.decode(bytes([token]))


def _byte_names():
    """{name: byte}. ByteLevel writes a byte as the Latin-1 character of its number where that can be seen, and the
    others, in order, as the characters from U+0100 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    names = {chr(byte if byte in seen else next(others)): byte for byte in range(255)}
    return names | {END_OF_TEXT: ByteTokenizer.end_of_text}


BYTES = _byte_names()


def load_tokenizer(place) -> CharTokenizer | ByteTokenizer | SubwordTokenizer:
    """The tokenizer of a directory, or of a .json file. Raises ValueError that names the file if it cannot be read."""
    path = Path(place) if Path(place).suffix == ".json" else Path(place) / FILE
    try:
        text = path.read_text(encoding="utf-8")
        if _characters(text) is not None:
            return CharTokenizer.from_json(text)
        return ByteTokenizer() if json.loads(text) == json.loads(ByteTokenizer().to_json()) else SubwordTokenizer(text)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _characters(text):
    """{character: number} of a file such as `CharTokenizer.to_json` writes; None for one of another kind."""
    try:
        description = json.loads(text)
        if description["model"].get("type") != "WordLevel":  # GPT-2's own file does not say what it is
            return None
        vocab = description["model"]["vocab"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError("it is damaged, or not in the format of Hugging Face's tokenizers") from None
    plain = description.get("pre_tokenizer") == EVERY_CHARACTER and all(len(word) == 1 for word in vocab)
    return vocab if plain and not description.get("normalizer") and not description.get("added_tokens") else None

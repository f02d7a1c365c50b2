"""Characters as tokens, stored so that Hugging Face's AutoTokenizer reads them too.

tokenizer = CharTokenizer.from_text(text)
tokenizer.decode(tokenizer.encode("When are you going"))
"""

import json
from pathlib import Path

from .files import replacing

FILE = "tokenizer.json"


class CharTokenizer:
    """A token a character (Unicode code point). `vocab` is the characters in the order of their numbers.

    stoi, itos    the number of each character, and the character of each number
    """

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

    def decode(self, tokens) -> str:
        """The text of a sequence (or 1-D tensor) of numbers. Raises ValueError for one outside the vocabulary."""
        try:
            return "".join(self.itos[int(token)] for token in tokens)
        except KeyError as error:
            raise ValueError(f"token {error} is outside the vocabulary of {self.vocab_size} characters") from None

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
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            # the unknown token is not in the vocabulary, so an unknown character is an error there as it is here
            "model": {"type": "WordLevel", "vocab": self.stoi, "unk_token": "[UNK]"},
        }
        return json.dumps(description, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text):
        """The tokenizer of a file's text. Raises ValueError if it is not one of characters."""
        try:
            model = json.loads(text)["model"]
            kind, vocab = model["type"], model["vocab"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError("it is damaged, or not in the format of Hugging Face's tokenizers") from None
        if kind != "WordLevel" or any(len(word) != 1 for word in vocab):
            raise ValueError(f"it holds a {kind} vocabulary of words or pieces, and only characters are known here")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError("its vocabulary does not number the characters from 0 without gaps")
        return cls(sorted(vocab, key=vocab.get))


def load_tokenizer(directory) -> CharTokenizer:
    """The tokenizer that `save` wrote into a directory. Raises ValueError that names the file if it cannot be read."""
    path = Path(directory) / FILE
    try:
        return CharTokenizer.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None

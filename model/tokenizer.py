"""Text to numbers and back: characters, stored so that Hugging Face's AutoTokenizer reads them too, or subwords.

tokenizer = CharTokenizer.from_text(text)
tokenizer.decode(tokenizer.encode("When are you going"))
tokenizer = load_tokenizer("imported/gpt2")          # any tokenizer.json; what is not characters needs `tokenizers`
"""

import json
from pathlib import Path

from .files import replacing

FILE = "tokenizer.json"
EVERY_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}


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


class SubwordTokenizer:
    """A tokenizer.json of any other kind (BPE, Unigram, WordPiece), run by Hugging Face's library `tokenizers`.

    Special tokens are tokens like others: written out in a text they are encoded as such, and none is added.
    """

    def __init__(self, text):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError("it does not hold characters, and others need a package: pip install tokenizers") from None
        self.text = text
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"it is damaged, or newer than the installed tokenizers ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """One more than the largest number: files may leave gaps."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def end_of_text(self) -> int | None:
        """The number of <|endoftext|>, with which GPT-2 and StarCoder2 begin and end a document; None without it."""
        return self._tokenizer.token_to_id("<|endoftext|>")

    def encode(self, text) -> list[int]:
        """The numbers of the text's pieces. Raises ValueError for what the vocabulary has no piece for."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:
            raise ValueError(f"the text cannot be encoded: {error}") from None

    def decode(self, tokens) -> str:
        """The text of a sequence (or 1-D tensor) of numbers."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)

    def stream(self, tokens, prompt=()):
        """The text of each token as it comes, after those of `prompt`: "" while a character is not yet whole."""
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=False)
        for token in prompt:  # what a token says can depend on the one before it, such as whether a space comes first
            decoder.step(self._tokenizer, token)
        return (decoder.step(self._tokenizer, token) or "" for token in tokens)

    def to_json(self) -> str:
        """The file's text, as it was read."""
        return self.text


def load_tokenizer(directory) -> CharTokenizer | SubwordTokenizer:
    """The tokenizer of a directory's tokenizer.json. Raises ValueError that names the file if it cannot be read."""
    path = Path(directory) / FILE
    try:
        text = path.read_text(encoding="utf-8")
        return SubwordTokenizer(text) if _characters(text) is None else CharTokenizer.from_json(text)
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

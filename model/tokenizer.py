"""Text to token numbers and back: characters, bytes or subwords, in files that Hugging Face's AutoTokenizer reads too.

tokenizer = CharTokenizer.from_text(text)            # or ByteTokenizer(), which encodes every text
tokenizer.decode(tokenizer.encode("When are you going"))
tokenizer = load_tokenizer("imported/gpt2")          # any tokenizer.json; subwords need the package `tokenizers`

All have vocab_size, encode, decode, stream and to_json; `cut` says where a long text may be split.
"""

import codecs
import json
import re
from array import array
from itertools import chain, islice
from pathlib import Path

FILE = "tokenizer.json"
EVERY_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
END_OF_TEXT = "<|endoftext|>"  # the token between documents of GPT-2, Qwen, OLMo and of ours
OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>")  # that of Llama 3 and SmolLM 3, of Llama 2 and Mistral, of Gemma
PAD = "<|pad|>"  # of exported character vocabularies: transformers pads a batch with it

_AROUND = 128  # characters on either side of a cut that are encoded to test it
_PART, _PARTS_AT_ONCE = 2**16, 8  # characters of a part; parts in one call of the library
_KNOWN = 2**21  # characters of the words whose encoding is kept
# White space and the word after it. Python counts U+001C to U+001F as white space, Unicode and the library do not.
_WORDS = re.compile(r"[^\S\x1c-\x1f]*[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+")


class CharTokenizer:
    """One token for each character (Unicode code point). `vocab` is the characters in the order of their numbers.

    stoi, itos    the number of each character, and the character of each number
    end_of_text   the number of <|endoftext|>, which ends a document: the one after the characters' if the vocabulary
                  is made with end=True, else None
    """

    kind = "characters"

    def __init__(self, vocab, end=False):
        self.stoi = {character: i for i, character in enumerate(vocab)}
        self.itos = dict(enumerate(self.stoi))
        if not self.stoi or len(self.stoi) != len(vocab) or any(len(character) != 1 for character in self.stoi):
            raise ValueError("vocab is not a sequence of different single characters")
        self.end_of_text = len(self.stoi) if end else None
        if end:
            self.itos[self.end_of_text] = END_OF_TEXT

    @classmethod
    def from_text(cls, text):
        """The characters that occur in the text, in the order of their code points."""
        return cls(sorted(set(text)))

    @property
    def vocab_size(self) -> int:
        return len(self.itos)

    def encode(self, text) -> list[int]:
        """The number of each character; with an `end_of_text`, <|endoftext|> in the text becomes that one token.

        Raises ValueError, with their names, for characters outside the vocabulary.
        """
        if self.end_of_text is not None and END_OF_TEXT in text:
            first, *others = map(self.encode, text.split(END_OF_TEXT))
            return [*first, *(token for other in others for token in (self.end_of_text, *other))]
        try:
            return [self.stoi[character] for character in text]
        except KeyError:
            unknown = sorted(set(text) - self.stoi.keys())
            named = ", ".join(map(repr, unknown[:10])) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
            raise ValueError(
                f"{named} not in the vocabulary of {len(self.stoi)} characters: leave them out, or use a model "
                "trained on a text that has them"
            ) from None

    def cut(self, text) -> int:
        """The last position where the text can be cut without changing its encoding: not in <|endoftext|>."""
        return len(text) if self.end_of_text is None else len(text) - overlap(text, END_OF_TEXT)

    def decode(self, tokens) -> str:
        """The text of a sequence (or 1-D tensor) of numbers. Raises ValueError for one outside the vocabulary."""
        try:
            return "".join(self.itos[int(token)] for token in tokens)
        except KeyError as error:
            raise ValueError(f"token {error} is outside the vocabulary of {self.vocab_size} characters") from None

    def stream(self, tokens, prompt=()):
        """An iterator: the text of each token, after the tokens of `prompt`."""
        return (self.decode([token]) for token in tokens)

    def save(self, directory):
        """Write tokenizer.json into a directory, atomically."""
        from .checkpoint import replacing  # here, because checkpoint.py imports this module

        Path(directory).mkdir(parents=True, exist_ok=True)
        with replacing(Path(directory) / FILE) as (temporary,):
            temporary.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The content of tokenizer.json: a word-level vocabulary, and a split into single characters."""
        # the unknown token is not in the vocabulary: an unknown character is an error in Hugging Face's library too
        model = {"type": "WordLevel", "vocab": self.stoi, "unk_token": "[UNK]"}
        added = [] if self.end_of_text is None else [_special(self.end_of_text, END_OF_TEXT)]
        return _description(model, EVERY_CHARACTER, {"type": "Fuse"}, added)

    @classmethod
    def from_json(cls, text):
        """The tokenizer of a file's content. Raises ValueError if its tokens are not characters."""
        vocab = _characters(text)
        if vocab is None:
            raise ValueError("it holds words or pieces of words, not characters: load_tokenizer reads it")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError("its vocabulary does not number the characters from 0 without gaps")
        return cls(sorted(vocab, key=vocab.get), end=bool(json.loads(text).get("added_tokens")))


def with_pad_token(text, number) -> str:
    """The content of tokenizer.json with the token PAD, of this number."""
    description = json.loads(text)
    description["added_tokens"] = [*(description.get("added_tokens") or []), _special(number, PAD)]
    return json.dumps(description, indent=1, ensure_ascii=False)


def _without_pad_token(text):
    """The content of tokenizer.json that was given to `with_pad_token`; any other as it is."""
    try:
        description = json.loads(text)
        *others, last = description["added_tokens"]
        if last != _special(last["id"], PAD):
            return text
    except (ValueError, KeyError, TypeError):
        return text
    return json.dumps({**description, "added_tokens": others}, indent=1, ensure_ascii=False)


def overlap(text, string):
    """How many characters at the end of text begin the string without completing it."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)


def _special(number, content):
    """An entry of `added_tokens`: a special token."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": True}


def _description(model, pre_tokenizer, decoder, added_tokens=()):
    """The content of a tokenizer.json, in the format of Hugging Face's library `tokenizers`."""
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(description, indent=1, ensure_ascii=False)


class ByteTokenizer:
    """One token for each byte of UTF-8, so that every text can be encoded. <|endoftext|> is 255, never a byte of UTF-8.

    It needs no package. Its file is a BPE without merges, which gives the same numbers in the library `tokenizers`.
    """

    kind = "bytes"
    vocab_size = 256
    end_of_text = 255

    def encode(self, text) -> list[int]:
        """The text's bytes. <|endoftext|> in the text becomes one token, as in subword vocabularies."""
        return list(self.encode_to_bytes(text))

    def encode_to_bytes(self, text) -> bytes:
        """`encode` as bytes, one a token."""
        return text.encode().replace(END_OF_TEXT.encode(), b"\xff")

    def cut(self, text) -> int:
        """The last position where the text can be cut without changing its encoding: not inside <|endoftext|>."""
        return len(text) - overlap(text, END_OF_TEXT)

    def decode(self, tokens) -> str:
        """The text of a sequence (or 1-D tensor) of numbers; invalid UTF-8 becomes U+FFFD."""
        documents = bytes(int(token) for token in tokens).split(b"\xff")
        return END_OF_TEXT.join(document.decode(errors="replace") for document in documents)

    def stream(self, tokens, prompt=()):
        """An iterator: the text of each token, after the tokens of `prompt`; "" while a character is incomplete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in prompt:
            _step(decoder, token)
        return (_step(decoder, token) for token in tokens)

    def to_json(self) -> str:
        """The content of tokenizer.json: a byte-level BPE without merges."""
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        added = [_special(self.end_of_text, END_OF_TEXT)]
        return _description({"type": "BPE", "vocab": BYTES, "merges": []}, level, level, added)


def _step(decoder, token):
    if token == ByteTokenizer.end_of_text:
        return decoder.decode(b"", final=True) + END_OF_TEXT
    return decoder.decode(bytes([token]))


def _byte_names():
    """{name: byte}. ByteLevel names a byte by its Latin-1 character if that is printable; the other bytes take, in
    order, the characters from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    names = {chr(byte if byte in printable else next(others)): byte for byte in range(255)}
    return names | {END_OF_TEXT: ByteTokenizer.end_of_text}


BYTES = _byte_names()


class SubwordTokenizer:
    """Any other tokenizer.json (BPE, Unigram, WordPiece), run by Hugging Face's library `tokenizers`.

    Special tokens in a text are encoded as tokens, and none is added. Long texts are encoded in parts (see `cut`),
    because the library takes 190 bytes of memory a character. If the file encodes each word separately, as GPT-2's
    does, the library encodes each different word once and a text is a look-up of its words: four times as fast.
    """

    kind = "subwords"

    def __init__(self, text):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError("its tokens are not characters, which needs a package: pip install tokenizers") from None
        self.text = text
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"it is damaged, or newer than the installed tokenizers ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._known, self._known_characters = {} if _takes_words_one_by_one(json.loads(text)) else None, 0

    @property
    def vocab_size(self) -> int:
        """One more than the largest number: a file may leave gaps."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def end_of_text(self) -> int | None:
        """The number of <|endoftext|>, or of the first of OTHER_ENDS that there is; None without any."""
        ends = map(self._tokenizer.token_to_id, (END_OF_TEXT, *OTHER_ENDS))
        return next((end for end in ends if end is not None), None)

    def encode(self, text) -> list[int]:
        """The numbers of the text's tokens. Raises ValueError for text that the vocabulary cannot encode."""
        return array("i", self.encode_to_bytes(text)).tolist()

    def encode_to_bytes(self, text) -> bytes:
        """`encode` as bytes, an int32 a token."""
        encode = self._encode if self._known is None else self._encode_words
        return b"".join(encode(parts) for parts in self._parts(text))

    def cut(self, text) -> int:
        """The last position where the text can be cut without changing its encoding; its end if there is none.

        A position is tested by encoding the 128 characters on either side together and apart, first before the spaces
        after words. There is none for vocabularies that add a space before every text (Llama 2's) or join the whole
        text into one token: there the tokens at a cut may change.
        """
        last = len(text) - _AROUND
        behind = range(last - 1, 0, -1)
        word_ends = (at for at in behind[:4096] if text[at].isspace() and not text[at - 1].isspace())
        for at in chain(islice(word_ends, 64), behind[:64]):
            left, right = text[max(0, at - _AROUND) : at], text[at : at + _AROUND]
            if self._encode([left, right]) == self._encode([left + right]):
                return at
        return len(text)

    def _parts(self, text):
        """Lists of a few parts of the text, so that one call of the library needs little memory."""
        parts, start = [], 0
        while len(text) - start > _PART:
            stop = start + self.cut(text[start : start + _PART])
            parts.append(text[start:stop])
            start = stop
            if len(parts) == _PARTS_AT_ONCE:
                yield parts
                parts = []
        yield [*parts, text[start:]]

    def _encode(self, texts):
        """The packed numbers of the texts, one after the other."""
        return b"".join(self._encode_each(texts))

    def _encode_each(self, texts):
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:
            raise ValueError(f"the text cannot be encoded: {error}") from None
        return [array("i", encoding.ids).tobytes() for encoding in encodings]

    def _encode_words(self, texts):
        """`_encode`, by a look-up of the words; new words are encoded and kept."""
        words = [word for text in texts for word in _WORDS.findall(text)]
        if self._known_characters > _KNOWN:
            self._known, self._known_characters = {}, 0
        if new := list(set(words) - self._known.keys()):
            self._known.update(zip(new, self._encode_each(new), strict=True))
            self._known_characters += sum(map(len, new))
        return b"".join([self._known[word] for word in words])

    def decode(self, tokens) -> str:
        """The text of a sequence (or 1-D tensor) of numbers."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)

    def stream(self, tokens, prompt=()):
        """An iterator: the text of each token, after the tokens of `prompt`; "" while a character is incomplete."""
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=False)
        for token in prompt:  # the text of a token can depend on the token before, such as its first space
            decoder.step(self._tokenizer, token)
        return (decoder.step(self._tokenizer, token) or "" for token in tokens)

    def to_json(self) -> str:
        """The content of tokenizer.json, as it was read."""
        return self.text


def _takes_words_one_by_one(description) -> bool:
    """Whether a text is certainly encoded word by word, each word with the white space before it.

    It is with GPT-2's split, whose pieces never extend past the end of a word, unless other parts do: a normalizer,
    dropout, or added tokens that contain or absorb spaces, or match single words only.
    """
    split = description.get("pre_tokenizer") or {}
    as_gpt2 = (
        split.get("type") == "ByteLevel" and split.get("use_regex", True) and not split.get("add_prefix_space", True)
    )
    return (
        as_gpt2
        and not description.get("normalizer")
        and not description["model"].get("dropout")
        and not any(
            token.get("lstrip") or token.get("rstrip") or token.get("single_word") or re.search(r"\s", token["content"])
            for token in description.get("added_tokens") or []
        )
    )


def load_tokenizer(place) -> CharTokenizer | ByteTokenizer | SubwordTokenizer:
    """The tokenizer of a directory or a .json file. Raises ValueError, with the file's name, if it cannot be read."""
    path = Path(place) if Path(place).suffix == ".json" else Path(place) / FILE
    try:
        text = _without_pad_token(path.read_text(encoding="utf-8"))
        if _characters(text) is not None:
            return CharTokenizer.from_json(text)
        return ByteTokenizer() if json.loads(text) == json.loads(ByteTokenizer().to_json()) else SubwordTokenizer(text)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _characters(text):
    """{character: number} of a file that `CharTokenizer.to_json` wrote; None for another kind of tokenizer."""
    try:
        description = json.loads(text)
        if description["model"].get("type") != "WordLevel":  # GPT-2's own file does not say what it is
            return None
        vocab = description["model"]["vocab"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError("it is damaged, or not in the format of Hugging Face's tokenizers") from None
    plain = description.get("pre_tokenizer") == EVERY_CHARACTER and all(len(word) == 1 for word in vocab)
    added = description.get("added_tokens") or []
    ours = not description.get("normalizer") and added in ([], [_special(len(vocab), END_OF_TEXT)])
    return vocab if plain and ours else None

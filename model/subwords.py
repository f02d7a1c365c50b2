"""Vocabularies of pieces of words: any tokenizer.json that is not one of characters or bytes.

Hugging Face's library `tokenizers` does the work. Where the file says that words are encoded one by one, as GPT-2's do,
each different word is given to it once: a text is then a look-up of its words, four times as fast.
"""

import json
import re
from array import array
from itertools import chain, islice

END_OF_TEXT = "<|endoftext|>"  # GPT-2's name for the token between documents

_AROUND = 128  # characters on either side of a cut that are looked at
_PART, _PARTS_AT_ONCE = 2**16, 8  # characters of a part; parts that the library encodes together
_KNOWN = 2**21  # characters of the words that are remembered
# White space and the word after it. Python counts U+001C to U+001F as white space, Unicode and the library do not.
_WORDS = re.compile(r"[^\S\x1c-\x1f]*[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+")


class SubwordTokenizer:
    """A tokenizer.json of any other kind (BPE, Unigram, WordPiece), run by Hugging Face's library `tokenizers`.

    Special tokens are tokens like others: written out in a text they are encoded as such, and none is added. Long
    texts are encoded in parts, cut where `cut` says: the library would take 190 bytes of memory a character.
    """

    kind = "subwords"

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
        self._known, self._known_characters = {} if _takes_words_one_by_one(json.loads(text)) else None, 0

    @property
    def vocab_size(self) -> int:
        """One more than the largest number: files may leave gaps."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def end_of_text(self) -> int | None:
        """The number of <|endoftext|>, with which GPT-2 and StarCoder2 begin and end a document; None without it."""
        return self._tokenizer.token_to_id(END_OF_TEXT)

    def encode(self, text) -> list[int]:
        """The numbers of the text's pieces. Raises ValueError for what the vocabulary has no piece for."""
        return array("i", self.encode_to_bytes(text)).tolist()

    def encode_to_bytes(self, text) -> bytes:
        """`encode`, packed: int32 after int32."""
        encode = self._encode if self._known is None else self._encode_words
        return b"".join(encode(parts) for parts in self._parts(text))

    def cut(self, text) -> int:
        """The last place where the text can be cut so that its parts encode as the whole does; its end if it has none.

        A place is tried by encoding the 128 characters on either side together and apart. Best is before the space
        after a word. None is found with vocabularies that begin every text with a space of their own (Llama 2's), or
        that join the whole text into one token: there a token at each cut may differ from those of the whole.
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
        """Lists of a few parts of a text, short enough for the memory they take together."""
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
        """The packed numbers of texts, one text after the other."""
        return b"".join(self._encode_each(texts))

    def _encode_each(self, texts):
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:
            raise ValueError(f"the text cannot be encoded: {error}") from None
        return [array("i", encoding.ids).tobytes() for encoding in encodings]

    def _encode_words(self, texts):
        """The same as `_encode`, from the words that are known; new ones become known."""
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
        """The text of each token as it comes, after those of `prompt`: "" while a character is not yet whole."""
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=False)
        for token in prompt:  # what a token says can depend on the one before it, such as whether a space comes first
            decoder.step(self._tokenizer, token)
        return (decoder.step(self._tokenizer, token) or "" for token in tokens)

    def to_json(self) -> str:
        """The file's text, as it was read."""
        return self.text


def _takes_words_one_by_one(description) -> bool:
    """Whether a text's encoding is surely that of its words, each with the white space before it.

    So it is with GPT-2's split, none of whose pieces goes on past the end of a word, unless something else looks
    beyond: a normalizer, dropout, or added tokens that hold or swallow spaces, or want a word for themselves.
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

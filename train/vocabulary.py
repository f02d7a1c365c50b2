"""The vocabulary of a run: characters, bytes, or pieces of words (BPE), made from the training text or given.

Which of them is `--embedding-type`; `--tokenizer FILE` takes the tokenizer.json of another model or program.
"""

from pathlib import Path

from model.tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer, SubwordTokenizer, load_tokenizer

from .corpus import DOCUMENT_END, Corpus

DEFAULT_VOCAB_SIZE = 4096
SMALLEST_BPE = 257  # the bytes and <|endoftext|>
# BPE counts words. 64 million characters know them well; more cost time, and memory for every rare one.
BPE_SAMPLE = 2**26
_SLICE = 2**14  # characters: tokenizers reads 256 strings ahead, and takes 190 bytes a character


def make_tokenizer(corpus: Corpus, embedding_type: str, *, vocab_size: int | None = None, stop: int | None = None):
    """The tokenizer for a text.

    "shakespearean": the characters that occur in it, the held-out part included; "byte": always the same; "bpe":
    trained on the characters before `stop`. Raises ValueError for a vocab_size that cannot be.
    """
    if embedding_type == "shakespearean":
        return CharTokenizer(corpus.scan.alphabet)
    if embedding_type == "byte":
        return ByteTokenizer()
    stop = corpus.scan.characters if stop is None else stop
    return train_bpe(_sample(corpus, stop), DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size)


def train_bpe(texts, vocab_size: int) -> SubwordTokenizer:
    """A byte-level BPE, split into words as GPT-2's: every text can be encoded, and comes back unchanged.

    texts: an iterable of strings. The first token is <|endoftext|>, the next 256 are the bytes; a text with too few
    different words gives a vocabulary smaller than vocab_size. Raises ValueError without the package `tokenizers`.
    """
    if vocab_size < SMALLEST_BPE:
        raise ValueError(f"vocab_size is {vocab_size}, wanted at least {SMALLEST_BPE}: the bytes and {END_OF_TEXT}")
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError("embedding type bpe needs a package: pip install tokenizers") from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return SubwordTokenizer(tokenizer.to_str())


def given_tokenizer(file: str):
    """The tokenizer of a tokenizer.json, or of the model directory that has one."""
    if not Path(file).exists():
        raise ValueError(f"tokenizer {file} does not exist: give a tokenizer.json, or a directory with one")
    return load_tokenizer(file)


def _sample(corpus, stop):
    """The text before `stop`, or of a long one every n-th piece, so that about BPE_SAMPLE characters are read."""
    every = -(-stop // BPE_SAMPLE)
    pieces = (piece for piece in corpus.pieces(0, stop) if piece is not DOCUMENT_END)
    for number, piece in enumerate(pieces):
        if number % every == 0:
            for text in piece.split(END_OF_TEXT):  # which is a token already, and no word to learn
                yield from (text[start : start + _SLICE] for start in range(0, len(text), _SLICE))

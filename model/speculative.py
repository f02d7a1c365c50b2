"""Writing faster by guessing ahead: a draft guesses the next tokens, and the model reads all of them in one call.

The model chooses a token at each place, as it would without guesses, and guesses are right as long as they are what it
chose. So the text is that of plain writing: its distribution exactly, and with a seed token for token, as far as a call
of several tokens rounds like several calls. Speculative sampling (arXiv:2211.17192) accepts more by keeping the
distribution only; here a random draft uses the random number that the model will use for the same place.
"""

import torch

from .decoding import Decoder
from .gpt import GPT

MOST_GUESSES = 31
LONGEST_PAUSE = 64  # tokens without a guess, after guesses that were all wrong
ORDERS = {16: MOST_GUESSES, 8: 7, 4: 3}  # so many tokens that stood in the text before: so many guesses at most


class Ngram:
    """Guesses that the text goes on as it did the last time that its newest tokens stood in it.

    The longest of ORDERS that has been seen before counts. tokens: the text so far, a list.
    """

    def __init__(self, tokens):
        self.tokens, self.followed = [], {}  # {tokens: index of what followed them last}
        self.extend(tokens)

    def extend(self, tokens):
        """Add tokens to the text."""
        for token in tokens:
            for order in ORDERS:
                if len(self.tokens) >= order:
                    self.followed[tuple(self.tokens[-order:])] = len(self.tokens)
            self.tokens.append(token)

    def guess(self, count, choose):
        """Up to `count` tokens, a list."""
        for order, most in ORDERS.items():
            at = self.followed.get(tuple(self.tokens[-order:]))
            if at is not None and len(self.tokens) >= order:
                period = len(self.tokens) - at
                return [self.tokens[at + i % period] for i in range(min(count, most))]
        return []


class Draft:
    """A smaller model that writes ahead.

    decoder   a `Decoder` of it, with the prompt, for at least LONGEST_PAUSE + MOST_GUESSES guesses.
    """

    def __init__(self, decoder, device):
        self.decoder, self.device = decoder, device
        self.started, self.unread, self.ahead = False, [], 0  # ahead: guesses that its cache holds

    def extend(self, tokens):
        """Add tokens to the text: the guesses that were right, and one more."""
        right = min(self.ahead, len(tokens) - 1)
        if self.ahead > right:
            self.decoder.take_back(self.ahead - right)
        self.unread, self.ahead = self.unread + tokens[right:], 0

    def guess(self, count, choose):
        """`count` tokens, a list. choose(logits, guessed): the token after the guessed ones, for logits (1, V)."""
        guessed, logits = [], None
        if not self.started:
            logits, self.started = self.decoder.prefill(), True
        for i in range(count):
            if self.unread:
                unread = torch.tensor(self.unread, device=self.device)
                logits = self.decoder.decode_guessed(unread[:1], unread[1:])[-1:]
                self.ahead += i > 0
            guessed.append(choose(logits, guessed))
            self.unread = guessed[-1:]
        self.unread = []
        return guessed


class Pace:
    """How many tokens to guess: more while guesses are right, and after wrong ones none for a while."""

    def __init__(self):
        self.count, self.pause, self.waiting = 3, 0, 0

    def next(self):
        """The number for the next call of the model, 0 for none."""
        self.waiting = max(0, self.waiting - 1)
        return 0 if self.waiting else self.count

    def learn(self, guessed, right):
        """Of so many guesses, the first `right` were right."""
        if right == guessed:
            self.count, self.pause = min(2 * self.count + 1, MOST_GUESSES), 0
        elif right:
            self.count, self.pause = max(2, right + 1), self.pause // 2
        else:
            self.count, self.pause = max(2, self.count // 2), min(2 * self.pause + 4, LONGEST_PAUSE)
            self.waiting = self.pause + 1


class Numbers:
    """Random numbers that are there already, in place of `RowGenerators`."""

    def __init__(self, numbers):
        self.numbers = numbers

    def uniform(self):
        return self.numbers


def check_draft(draft, model, rows, other):
    """Raise ValueError, in one line, for a draft that cannot guess for this model; other: other ways of writing."""
    if draft != "ngram" and not isinstance(draft, GPT):
        name = repr(draft) if isinstance(draft, str) else f"a {type(draft).__name__}"
        raise ValueError(f"draft is {name}, expected 'ngram' or a GPT")
    if rows != 1:
        raise ValueError(f"draft guesses for one prompt, got {rows}")
    if other:
        raise ValueError("draft with batch_invariant or compile: they would change its calls, leave one out")
    models = [model] if draft == "ngram" else [model, draft]
    if any(one.config.positions == "learned" for one in models):
        raise ValueError("draft needs rotary positions: past the end of learned ones every token reads a whole context")
    if len({one.wte.weight.device for one in models}) > 1:
        devices = draft.wte.weight.device, model.wte.weight.device
        raise ValueError("draft is on {}, the model on {}: move one of them".format(*devices))
    if len({one.config.vocab_size for one in models}) > 1:
        sizes = draft.config.vocab_size, model.config.vocab_size
        raise ValueError("draft has another vocabulary: {} tokens, the model {}".format(*sizes))
    if len({one.tokenizer.to_json() for one in models if one.tokenizer is not None}) > 1:
        raise ValueError("draft has another vocabulary: its tokens are not the model's")


def guessed_ahead(model, draft, prompt, params, generators, seen, decodable, max_new_tokens, prefill_chunk):
    """An iterator over (tokens, logits) of a single row: some of its next tokens (N,), and the logits (N, V) of each.

    prompt (1, T). The other arguments are those of `generate`, and what it makes of them.
    """
    device, none = prompt.device, torch.zeros(1, dtype=torch.int32)
    decoder = Decoder(model, prompt, none, max_new_tokens, prefill_chunk, guesses=MOST_GUESSES)
    if draft == "ngram":
        draft = Ngram(prompt[0].tolist())
    else:
        most = MOST_GUESSES + LONGEST_PAUSE
        draft = Draft(Decoder(draft, prompt, none, max_new_tokens, prefill_chunk, guesses=most), device)
    pace, new, written = Pace(), None, 0

    def choose(logits, guessed, first=0):
        """The tokens after the first, first + 1, ... of the guessed ones, for their logits (N, V)."""
        places = slice(first, first + len(logits))
        numbers = None if generators is None else Numbers(generators.ahead(places.stop)[0, places, None])
        return params.choose(logits[:, :decodable], numbers, _seen_there(seen, guessed, places, decodable))

    def choose_one(logits, guessed):
        return int(choose(logits, guessed, len(guessed)))

    while written < max_new_tokens:
        with decoder.threads():
            most = 0 if new is None else min(pace.next(), max_new_tokens - written - 1)
            guessed = draft.guess(most, choose_one) if most > 0 else []
            if guessed:
                logits = decoder.decode_guessed(new, torch.tensor(guessed, device=device))
                chosen = choose(logits, guessed)
                tokens = chosen.tolist()
                right = next((i for i, token in enumerate(guessed) if token != tokens[i]), len(guessed))
                if len(guessed) > right:
                    decoder.take_back(len(guessed) - right)
                pace.learn(len(guessed), right)
                if generators is not None:
                    generators.skip(right + 1)
                tokens, chosen, logits = tokens[: right + 1], chosen[: right + 1], logits[: right + 1]
                new = chosen[-1:]
            else:
                logits = decoder.prefill() if new is None else decoder.decode(new)
                there = seen if seen is None else seen[:, :decodable]
                new = chosen = params.choose(logits[:, :decodable], generators, there)
                tokens = chosen.tolist()
            draft.extend(tokens)
            if seen is not None:
                seen[:, chosen] = True
        written += len(tokens)
        yield chosen, logits


def _seen_there(seen, guessed, places, decodable):
    """seen (1, V) for each of the places, the guesses before a place seen too; None stays None."""
    if seen is None:
        return None
    there = seen[:, :decodable].repeat(places.stop - places.start, 1)
    for row, place in enumerate(range(places.start, places.stop)):
        there[row, guessed[:place]] = True
    return there

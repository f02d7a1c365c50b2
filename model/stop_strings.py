"""Where a text ends: `TextUntil` cuts one at the first stop string, `StopStrings` watches the rows of a batch."""

from collections import deque

from .tokenizer import overlap


class StopStrings:
    """For each row of a batch, whether the text after its prompt contains one of the strings.

    A string may span several tokens, and may be part of one. prompts: the tokens of each row's prompt.
    """

    def __init__(self, strings, tokenizer, prompts):
        self.tokens = [deque() for _ in prompts]
        self.texts = [
            TextUntil(tokenizer.stream(iter(tokens.popleft, None), prompt), strings)
            for tokens, prompt in zip(self.tokens, prompts, strict=True)
        ]

    def update(self, new):
        """Add one token a row, a list; returns a bool a row, True if the token completes a string."""
        found = []
        for tokens, text, token in zip(self.tokens, self.texts, new, strict=True):
            running = not text.ended
            if running:
                tokens.append(token)
                next(text)
            found.append(running and text.ended)
        return found


class TextUntil:
    """An iterator over the pieces of a text, up to the first stop string, which is left out.

    held      text not yet returned, because it may begin a stop string. It comes with a later piece or at the end; a
              reader that stops early finds it here.
    stopped   whether a stop string has ended the text.
    """

    def __init__(self, pieces, strings):
        self.pieces, self.strings, self.held = iter(pieces), checked_strings(strings), ""
        self.ended = self.stopped = False

    def __iter__(self):
        return self

    def __next__(self):
        if self.ended:
            raise StopIteration
        try:
            text = self.held + next(self.pieces)
        except StopIteration:
            self.ended = True
            text, self.held = self.held, ""
            if text:
                return text
            raise
        ends = [text.find(string) for string in self.strings if string in text]
        if ends:
            self.ended = self.stopped = True
            self.held = ""
            return text[: min(ends)]
        shown = len(text) - max((overlap(text, string) for string in self.strings), default=0)
        self.held = text[shown:]
        return text[:shown]


def checked_strings(strings):
    """The stop strings as a tuple. Raises ValueError for an empty one and for anything but text."""
    strings = (strings,) if isinstance(strings, str) else tuple(strings)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop_strings={list(strings)!r} has an empty string, or something that is not text")
    return strings

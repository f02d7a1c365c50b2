"""Stop strings: when a row's text has come to one, and how much of a text may be shown before that is known.

rows = StopStrings(["\\n\\n", "THE END"], tokenizer, prompts)          # for `generate`
rows.ended([17, 4])                                                  # the next token of each row -> [False, True]

for text in TextUntil(pieces, ["\\n\\n"]): print(text)                 # ends before the first stop string
"""

from collections import deque


class StopStrings:
    """For each row of a batch, whether the text after its prompt contains one of the strings by now.

    A string may lie across tokens and may be a part of one. prompts: the tokens of each row's prompt.
    """

    def __init__(self, strings, tokenizer, prompts):
        self.strings = checked(strings)
        self.kept = max(map(len, self.strings), default=1) - 1
        self.tokens = [deque() for _ in prompts]
        self.pieces = [
            tokenizer.stream(iter(tokens.popleft, None), prompt)
            for tokens, prompt in zip(self.tokens, prompts, strict=True)
        ]
        self.texts = [""] * len(self.pieces)

    def ended(self, new):
        """Whether each row's text, with its next token of the list new, contains a stop string: a list of bools."""
        found = []
        for row, token in enumerate(new):
            self.tokens[row].append(token)
            text = self.texts[row] + next(self.pieces[row])
            found.append(any(string in text for string in self.strings))
            self.texts[row] = text[len(text) - self.kept :] if self.kept else ""
        return found


class TextUntil:
    """The pieces of a text up to the first stop string, which is left out: an iterator.

    held: text that is not shown yet, because it may be the beginning of a stop string. It comes with the next pieces,
    or at the end; someone who stops in between finds it here.
    """

    def __init__(self, pieces, strings):
        self.pieces, self.strings, self.held = iter(pieces), checked(strings), ""
        self.ended = False

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
            self.ended, self.held = True, ""
            return text[: min(ends)]
        shown = len(text) - max((_overlap(text, string) for string in self.strings), default=0)
        self.held = text[shown:]
        return text[:shown]


def _overlap(text, string):
    """How many characters at the end of text are the beginning of string, but not all of it."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)


def checked(strings):
    """The stop strings as a tuple. Raises ValueError for what is none."""
    strings = (strings,) if isinstance(strings, str) else tuple(strings)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop_strings={list(strings)!r} holds an empty one, or something that is no text")
    return strings

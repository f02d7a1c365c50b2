"""Many prompts at once: `generate_batch` gives the place of a text that has ended to the next prompt.

    for prompt, token in generate_batch(model, prompts, 500, batch=32, temperature=0.8, seed=1):
        texts[prompt].append(token)

    slot 0   a a a a a a d d d d d ...        a ends, d is read and takes its slot, b and c are written meanwhile
    slot 1   b b b b b b b b f f f ...
    slot 2   c c c e e e e e e e e ...

This is the continuous batching of Orca (Yu et al., OSDI 2022). The rows in use are always the first ones of one cache,
so that a step computes no others. A prompt is read into a cache of its own, a chunk between two steps, and then copied.
"""

from collections import deque
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .decoding import ONE_THREAD_TOKEN, Decoder, evaluating, few_threads, make_step
from .kv_cache import KVCache
from .prompts import check_prompt, encode_prompts, row_seeds, seen_tokens
from .sampling_params import BLOCK, RowGenerators, SamplingParams
from .stop_strings import StopStrings, checked_strings


def generate_batch(
    model,
    prompts,
    max_new_tokens,
    *,
    batch=8,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=1.0,
    greedy=False,
    seed=None,
    stop_tokens=(),
    stop_strings=(),
    tokenizer=None,
    log_probabilities=False,
    prefill_chunk=128,
    batch_invariant=False,
):
    """An iterator over the new tokens of all prompts, as pairs (index of the prompt, token) of Python integers.

    At most `batch` prompts are written at a time. They are begun in their order; one that ends makes room for the next
    while the others go on. So the tokens of one prompt come in order, between those of others.

    prompts        a list of prompts of any lengths, each a text (with a tokenizer) or a sequence of integers.
    max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, greedy
                   as in `generate`, or a list with one for each prompt.
    seed           prompt i is drawn with seed + i, or a list of seeds, as the rows of `generate`.
    stop_tokens, stop_strings
                   as in `generate`, or a list of them for each prompt. The token that ends a prompt is its last one.
    tokenizer      None takes model.tokenizer, as in `generate`.
    log_probabilities
                   True yields (index, token, log-probability), a float as in `generate`.
    prefill_chunk  prompt tokens that are read between two steps of the others, which wait for them.
    batch_invariant
                   True gives each prompt the bits of `generate` alone, with the same prefill_chunk. Each prompt is then
                   computed by itself, and a step takes as long as its rows one after the other. False: rows share each
                   step, and products of more rows may round otherwise.

    A text that passes the end of learned positions is computed by itself from there on: every token reads the last
    context_length tokens again. Raises ValueError for wrong arguments, with the index of a wrong prompt.
    """
    written = write_batch(
        model, prompts, max_new_tokens, batch=batch, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, greedy=greedy, seed=seed, stop_tokens=stop_tokens,
        stop_strings=stop_strings, tokenizer=tokenizer, prefill_chunk=prefill_chunk, batch_invariant=batch_invariant,
        log_probabilities=log_probabilities,
    )  # fmt: skip
    return (new[:3] if log_probabilities else new[:2] for new in written if new.token is not None)


class NewToken(NamedTuple):
    """A token of a prompt; `last` says that the prompt ends with it. A prompt that gets no token ends with None."""

    prompt: int
    token: int | None
    log_probability: float | None
    last: bool


def write_batch(
    model, prompts, max_new_tokens, *, batch=8, seed=None, stop_tokens=(), stop_strings=(), tokenizer=None,
    prefill_chunk=128, batch_invariant=False, log_probabilities=False, **settings,
):  # fmt: skip
    """`generate_batch` as an iterator of `NewToken`s. settings: fields of `SamplingParams`, or lists of them."""
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    for name, value in (("batch", batch), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise ValueError(f"{name}={value} is below 1")
    prompts = [_checked(prompt, number, model) for number, prompt in enumerate(encode_prompts(prompts, tokenizer))]
    count = len(prompts)
    settings = {name: _for_each(name, value, count) for name, value in settings.items()}
    params = [SamplingParams(**{name: values[i] for name, values in settings.items()}) for i in range(count)]
    same = {}
    params = [same.setdefault(one, one) for one in params]  # rows of equal settings share an object
    most = _for_each("max_new_tokens", max_new_tokens, count)
    if negative := [value for value in most if value < 0]:
        raise ValueError(f"max_new_tokens={negative[0]} is negative")
    stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    strings = [checked_strings(given) for given in _for_each("stop_strings", stop_strings, count, (list, tuple))]
    if tokenizer is None and any(strings):
        raise ValueError(f"stop_strings={stop_strings!r} need the tokenizer of the text: tokenizer=...")
    stops = [frozenset(given) for given in _for_each("stop_tokens", stop_tokens, count, (list, tuple, set, frozenset))]
    rows = map(_Row, range(count), prompts, params, most, row_seeds(seed, count), stops, strings)
    return _Batch(model, rows, batch, prefill_chunk, tokenizer, batch_invariant, log_probabilities).run()


def _for_each(name, value, count, kinds=None):
    """A list with the value of each prompt. kinds: types of a value, if values are sequences themselves."""
    if not isinstance(value, (list, tuple)) or (kinds and not any(isinstance(part, kinds) for part in value)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values, expected one for each of {count} prompts, or one for all")
    return list(value)


def _checked(prompt, number, model):
    """The tokens of a prompt (1, T) on the model's device."""
    tokens = torch.as_tensor(prompt, device=model.wte.weight.device)
    try:
        if tokens.dim() != 1 or not len(tokens):
            raise ValueError(f"it has shape {tuple(tokens.shape)}, expected (T,) with at least one token")
        check_prompt(tokens[None], model.config.vocab_size)
    except ValueError as error:
        raise ValueError(f"prompt {number}: {error}") from None
    return tokens[None]


class _Row:
    """One prompt and what is needed to write its text. `begin` makes what takes memory."""

    def __init__(self, index, prompt, params, max_new_tokens, seed, stop_tokens, stop_strings):
        self.index, self.prompt, self.params, self.left, self.seed = index, prompt, params, max_new_tokens, seed
        self.stop_tokens, self.stop_strings = stop_tokens, stop_strings
        self.new, self.last = [], False  # the tokens that were made; whether the last one ended the text
        self.numbers = []  # random ones that come next, the last one first

    @property
    def length(self):
        """Tokens that the model has read: all but the newest."""
        return self.prompt.shape[1] + len(self.new) - 1

    def begin(self, model, tokenizer, prefill_chunk):
        self.decoder = self._decoder(model, self.prompt, prefill_chunk)
        self.chunks = self.decoder.prefill_chunks()
        self.generators = RowGenerators([self.seed], self.prompt.device) if self.params.is_random else None
        penalty = self.params.repetition_penalty != 1
        self.seen = seen_tokens(self.prompt, self.decoder.padding, model.config.vocab_size) if penalty else None
        self.stop_strings = self.stop_strings and StopStrings(self.stop_strings, tokenizer, self.prompt.tolist())

    def begin_again(self, model, prefill_chunk):
        """Get a decoder that has not read the text yet."""
        tokens = torch.cat([self.prompt, self.prompt.new_tensor([self.new])], dim=1)
        self.decoder = self._decoder(model, tokens, prefill_chunk)

    def _decoder(self, model, tokens, prefill_chunk):
        return Decoder(model, tokens, tokens.new_zeros(1, dtype=torch.int32), self.left, prefill_chunk)

    def number(self):
        """The next random number. They come to the host many at a time, which is faster than one tensor for each."""
        if not self.numbers:
            self.numbers = self.generators.ahead(BLOCK)[0].tolist()[::-1]
            self.generators.skip(BLOCK)
        return self.numbers.pop()

    def logits(self):
        """The logits (1, V) of the next token, by the row's own decoder."""
        if self.decoder.is_reading:
            return self.decoder.prefill()
        return self.decoder.decode(self.prompt.new_tensor(self.new[-1:]))

    def add(self, token, log_probability):
        """Count a new token; the `NewToken` to yield."""
        self.new.append(token)
        self.left -= 1
        if self.seen is not None:
            self.seen[:, token] = True
        stopped = bool(self.stop_strings) and self.stop_strings.update([token])[0]
        self.last = stopped or token in self.stop_tokens or self.left == 0
        return NewToken(self.index, token, log_probability, self.last)


class _Batch:
    """The scheduler: `waiting` rows, the one that is `reading`, those in `slots`, and those computed `alone`."""

    def __init__(self, model, rows, batch, prefill_chunk, tokenizer, batch_invariant, log_probabilities):
        self.model, self.batch, self.prefill_chunk, self.tokenizer = model, batch, prefill_chunk, tokenizer
        self.batch_invariant, self.log_probabilities = batch_invariant, log_probabilities
        self.decodable = None if tokenizer is None else tokenizer.vocab_size
        self.context_length = model.config.context_length if model.config.positions == "learned" else None
        self.waiting, self.reading, self.slots, self.alone = deque(rows), None, _Slots(model, batch), []

    def run(self):
        """An iterator of `NewToken`s: a step of all rows that are written, then a chunk of prompts, and so on."""
        while self.waiting or self.reading or self.slots.rows or self.alone:
            yield from self._write()
            yield from self._read()

    def _write(self):
        """A token for each row that is written."""
        if self.context_length is not None:
            for row in self.slots.take_out(lambda row: row.length == self.context_length):
                row.begin_again(self.model, self.prefill_chunk)
                self.alone.append(row)
        made = []
        if self.slots.rows:
            with self.slots.threads():
                logits = self.slots.step()
                made += self._choose(self.slots.rows, logits)
            self.slots.take_out(lambda row: row.last)
        for row in self.alone:
            with row.decoder.threads():
                made += self._choose([row], row.logits())
        self.alone = [row for row in self.alone if not row.last]
        return made

    def _read(self):
        """Read prompts: a chunk of a long one, or short ones that together are hardly longer."""
        read = 0
        while read < self.prefill_chunk and self._begin_next():
            row = self.reading
            if not row.left:
                self.reading = None
                yield NewToken(row.index, None, None, True)
                continue
            read += min(self.prefill_chunk, row.prompt.shape[1])
            with row.decoder.threads():
                logits = next(row.chunks)
                if logits is None:
                    continue
                (made,) = self._choose([row], logits)
            self.reading = row.chunks = None
            if not row.last:
                if self.batch_invariant or row.decoder.cache is None:
                    self.alone.append(row)
                else:
                    self.slots.add(row)
            yield made

    def _begin_next(self):
        """Whether a prompt is being read, or can be begun now."""
        if self.reading is None and self.waiting and self.slots.in_use + len(self.alone) < self.batch:
            self.reading = self.waiting.popleft()
            self.reading.begin(self.model, self.tokenizer, self.prefill_chunk)
        return self.reading is not None

    def _choose(self, rows, logits):
        """Choose the next token of each row, logits (len(rows), V); rows of the same settings together."""
        groups = {}
        for i, row in enumerate(rows):
            groups.setdefault(id(row.params), []).append(i)
        made = [None] * len(rows)
        for members in groups.values():
            chosen = [rows[i] for i in members]
            params = chosen[0].params
            own = logits if len(groups) == 1 else logits[members]
            seen = None if params.repetition_penalty == 1 else torch.cat([row.seen for row in chosen])
            generators = _Generators(chosen) if params.is_random else None
            tokens = params.choose(
                own[:, : self.decodable], generators, seen if seen is None else seen[:, : self.decodable]
            )
            found = [None] * len(members)
            if self.log_probabilities:
                found = F.log_softmax(own.float(), dim=-1).gather(1, tokens[:, None]).squeeze(1).tolist()
            for i, row, token, log_probability in zip(members, chosen, tokens.tolist(), found, strict=True):
                made[i] = row.add(token, log_probability)
        return made


class _Generators:
    """The generators of some rows as those of one batch."""

    def __init__(self, rows):
        self.rows = rows

    def uniform(self):
        return torch.tensor([[row.number()] for row in self.rows], device=self.rows[0].prompt.device)


class _Slots:
    """The rows that share each step: row i is in row i of a cache for `batch` rows, and no row is free between two.

    A step computes the first rows of the cache only. On a GPU it is a CUDA graph for each width, so widths are powers
    of two there.
    """

    def __init__(self, model, batch):
        self.model, self.batch, self.rows, self.free = model, batch, [], []
        self.cache, self.steps = None, {}
        self.on_cpu, self.row_work = model.wte.weight.device.type == "cpu", model.num_parameters()

    @property
    def in_use(self):
        return len(self.rows)

    def add(self, row):
        """Copy the row's own cache into the next slot."""
        own, row.decoder = row.decoder.cache, None
        if self.cache is None:
            options = {"max_length": own.max_length, "device": own.lengths.device, "dtype": own.k[0].dtype}
            self.cache = KVCache(self.model.config, self.batch, **options)
        self._make_room(row.length)
        self.cache.copy_row(len(self.rows), own, 0, row.length)
        self.rows.append(row)

    def take_out(self, condition):
        """Remove the rows of which it is true, and return them. The last rows move into their slots."""
        taken = [row for row in self.rows if condition(row)]
        for row in taken:
            slot, last = self.rows.index(row), len(self.rows) - 1
            if slot < last:
                self.cache.copy_row(slot, self.cache, last, self.rows[last].length)
                self.rows[slot] = self.rows[last]
            self.rows.pop()
        return taken

    def threads(self):
        return few_threads(self.on_cpu and len(self.rows) * self.row_work <= ONE_THREAD_TOKEN)

    def step(self):
        """The logits (rows, V) after the newest token of each row."""
        count, longest = len(self.rows), max(row.length for row in self.rows)
        width = count if self.on_cpu else min(self.batch, 1 << (count - 1).bit_length())
        self._make_room(longest + 1)
        self.cache.lengths[count:width] = 0  # rows that only fill the width
        if width not in self.steps:
            cache = self.cache.first_rows(width)
            self.steps[width] = cache, make_step(self.model, cache)
        cache, step = self.steps[width]
        cache.columns = longest
        tokens = [row.new[-1] for row in self.rows] + [0] * (width - count)
        with evaluating(self.model):
            return step(torch.tensor(tokens, device=cache.lengths.device))[:count]

    def _make_room(self, length):
        """Let layers that see all earlier keys hold rows of this length."""
        if self.cache.bounded and length > self.cache.max_length:
            self.cache.extend(max(length, 2 * self.cache.max_length))
            self.steps.clear()

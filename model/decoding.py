"""The logits of the next token, step by step: `Decoder` reads the prompt into a cache, then takes one token a row.

A step is a CUDA graph on a GPU (`CUDAGraphStep`) and a sequence of torch calls on a CPU (`CPUStep`), where these
compute exactly what the model does; elsewhere it is the model's own forward.
"""

from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from kernels.backend import backend_module, resolve_backend
from kernels.cpu import through_onednn

from . import blocks, gpt
from .gelu import gelu
from .kv_cache import KVCache

STANDARD_MODULES = {gpt.GPT, blocks.Block, blocks.Attention, blocks.MLP, blocks.RMS1Norm}
STANDARD_MODULES |= {nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.ModuleList, nn.Identity}
# Multiply-adds up to which one thread takes a token, and a prompt. Several threads wait for each other in each of some
# hundred short calls; beside a busy process they wait up to a hundred times as long. docs/sampling.md has the figures.
ONE_THREAD_TOKEN, ONE_THREAD_PROMPT = 2**23, 2**27
MANY_ROWS = 16  # of a product in fp32 on a CPU: from there on oneDNN is faster than MKL, where it is exact
one_call_gelu = partial(F.gelu, approximate="tanh")
WARM_UPS = 3  # forwards before a capture: Triton compiles its kernels, cuBLAS allocates its workspace


class Decoder:
    """Computes the logits (B, V) of the next token: first `prefill()`, then `decode(tokens)` for each new token.

    tokens          (B, T) prompts, left-padded; padding (B,) is the number of padding columns of each row.
    prefill_chunk   prompt columns that one forward reads.
    compile         compile the step with torch.compile, unless it is a CUDA graph.
    guesses         how many guessed tokens `decode_guessed` takes at most.
    cache_dtype     None for that of the keys, or torch.int8: see `KVCache`.

    Past the end of learned positions a new token shifts all others, so that a cache is useless: the last
    context_length tokens are then read again for every token, without a cache.
    """

    def __init__(
        self, model, tokens, padding, max_new_tokens, prefill_chunk, compile=False, guesses=0, cache_dtype=None
    ):
        self.model, self.padding, self.prefill_chunk, self.compile = model, padding, prefill_chunk, compile
        self.guesses, self.cache_dtype = guesses, cache_dtype
        self.rows, self.columns = tokens.shape
        self.cache = self.step = None
        self.is_reading = True  # until the prompt has been read
        self.on_cpu, self.row_work = tokens.device.type == "cpu", self.rows * model.num_parameters()
        self.is_standard = why_not_standard(model) is None
        self.longest_padding = int(padding.max()) if self.rows else 0
        self.max_columns = self.columns + max_new_tokens
        # the prompt; learned positions keep the tokens of one context, to read them again past its end
        self.tokens = tokens
        self.context_length = model.config.context_length if model.config.positions == "learned" else None

    def prefill(self):
        """The logits after self.tokens, read into a new cache. Learned positions read the last context_length."""
        *_, logits = self.prefill_chunks()
        return logits

    @torch.no_grad()
    def prefill_chunks(self):
        """`prefill` in steps: an iterator that reads a chunk each time; the last yields the logits, others None."""
        self.is_reading = True
        dropped = 0 if self.context_length is None else max(0, self.columns - self.context_length)
        self.tokens = self.tokens[:, -self.context_length :] if self.context_length else self.tokens
        if self.context_length is not None and self.columns >= self.context_length and self.longest_padding <= dropped:
            self.cache = None  # no step will read it
            with evaluating(self.model):
                logits = self._last_logits(self.tokens)
            self.is_reading = False
            yield logits
            return
        device = self.tokens.device
        dtype = self.cache_dtype or self.model.wte.weight.dtype
        if self.cache_dtype is None and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        self.cache = KVCache(
            self.model.config,
            self.rows,
            max_new_tokens_per_call=min(self.tokens.shape[1], self.prefill_chunk),
            max_length=self.context_length or min(self.max_columns, self.columns + 64),  # grows with the text
            device=device,
            dtype=dtype,
            padding=(self.padding - dropped).clamp(min=0),
        )
        by_step = self.rows == 1 and why_not_cpu_step(self.model, self.cache) is None
        self.step = CPUStep(self.model, self.cache) if by_step else None
        *chunks, last = self.tokens.split(self.prefill_chunk, dim=1)
        for chunk in chunks:
            self._read(chunk)
            yield None
        logits = self._read(last)
        self.cache.fit(1 + self.guesses)
        self.step = None
        self.tokens = self.tokens if self.context_length else None
        self.is_reading = False
        yield logits

    def _read(self, chunk):
        """The logits after a chunk of the prompt, which goes into the cache."""
        if self.step is not None:
            return self.step(chunk[0], last=True)

        def read():
            return self._last_logits(chunk, self.cache)

        with evaluating(self.model):
            return through_onednn(read)() if self.on_cpu and chunk.numel() >= MANY_ROWS else read()

    def _last_logits(self, tokens, cache=None):
        if self.is_standard:
            return self.model.last_logits(tokens, cache)
        return self.model(tokens, cache=cache)[0][:, -1]

    def decode(self, new):
        """The logits after one more token of each row, new (B,)."""
        self.columns += 1
        if self.context_length is not None:
            self.tokens = torch.cat([self.tokens, new[:, None]], dim=1)
            if self.columns > self.context_length:
                return self.prefill()
        return self._take(new)

    def decode_guessed(self, new, guessed):
        """The logits (1 + guesses, V) after one more token of a single row and after each of the guessed ones (N,).

        `take_back` removes the guesses that are wrong.
        """
        self.columns += 1 + len(guessed)
        return self._take(torch.cat([new, guessed]))

    def take_back(self, count):
        self.columns -= count
        self.cache.rollback(count)

    def _take(self, new):
        """The logits after new tokens: one a row, or several of a single row."""
        needed = self.cache.columns + (len(new) if self.guesses else 1)
        if self.cache.bounded and needed > self.cache.max_length:
            self.cache.extend(min(self.max_columns, max(needed, 2 * self.cache.max_length)))
            self.step = None
        if self.step is None:
            self.step = make_step(self.model, self.cache, self.compile)
        with evaluating(self.model):
            if len(new) == 1 or not self.guesses or isinstance(self.step, CPUStep):
                return self.step(new)
            with torch.no_grad():
                return self.model(new[None], cache=self.cache)[0][0]

    def threads(self):
        """A context in which PyTorch has the threads that the next token or prompt is worth."""
        if self.is_reading or self.cache is None:
            return few_threads(self.on_cpu and self.tokens.shape[1] * self.row_work <= ONE_THREAD_PROMPT)
        return few_threads(self.on_cpu and self.row_work <= ONE_THREAD_TOKEN)


def make_step(model, cache, compile=False):
    """The fastest function that computes the logits (B, V) after one more token of each row, tokens (B,).

    A `CPUStep` of one row, whose cache takes several tokens a call, takes so many.
    """
    if why_not_cuda_graph(model, cache) is None:
        return CUDAGraphStep(model, cache)
    if why_not_cpu_step(model, cache) is None:
        from .compiled_step import compiled_step  # here, because it imports this module

        return compiled_step(model, cache) if compile else CPUStep(model, cache)
    model = torch.compile(model) if compile else model

    @torch.no_grad()
    def step(new):
        return model(new[:, None], cache=cache)[0][:, -1]

    return step


@contextmanager
def few_threads(one):
    """Inside, PyTorch has one thread if `one`; afterwards the caller's number."""
    before = torch.get_num_threads()
    if one:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def evaluating(model):
    """Evaluation mode inside; afterwards every module has its own mode again."""
    training = [module for module in model.modules() if module.training] if model.training else []
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def why_not_standard(model):
    """Why the model's forward may do more than its config and weights say, such as a hook; None if it does not.

    `CPUStep` and `CUDAGraphStep` would leave that out.
    """
    for name, module in model.named_modules():
        if type(module) not in STANDARD_MODULES:
            return f"{name or 'the model'} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the model'} has a hook"
    return None


def why_not_cpu_step(model, cache):
    """Why a `CPUStep` would not compute what the model does, in a few words; None if it would."""
    device = model.wte.weight.device
    if device.type != "cpu":
        return "the model is not on a CPU"
    if not model.fused_kernels or not hasattr(_backend(model), "token_step"):
        return "the backend has no such step"
    wide = all(weight.dtype in (torch.float32, torch.float64) for weight in model.parameters())
    if not wide or torch.is_autocast_enabled("cpu"):
        return "in 16 bits it would round differently"
    if reason := why_not_standard(model):
        return reason
    if cache.k_scales:
        return "the cache is of int8"
    if cache.max_new_tokens_per_call > 1 and (len(cache.lengths) > 1 or model.config.prefix):
        return "the cache takes several tokens a call, of several rows or beside a prefix"
    if cache.lengths.numel() == 0 or cache.lengths.amin() < 0:
        return "a row has no token yet"
    return None


def why_not_cuda_graph(model, cache):
    """Why a `CUDAGraphStep` would not compute what the model does, in a few words; None if it would."""
    if model.wte.weight.device.type != "cuda":
        return "the model is not on a CUDA device"
    if model.fused_kernels and _backend(model).READS_LENGTHS:
        return "the backend reads lengths on the host, which a graph cannot capture"
    if torch.is_autocast_enabled("cuda"):
        return "a graph would read autocast's copies of the weights, which autocast frees at its end"
    if reason := why_not_standard(model):
        return reason
    if cache.lengths.numel() == 0:
        return "there are no rows"
    return None


def _backend(model):
    """The kernels' backend that the model runs, as its module."""
    return backend_module(resolve_backend(model.blocks[0].attn.backend, model.wte.weight.device)[0])


class CPUStep:
    """New tokens on a CPU, one a row or several of one row: `GPT.forward` without its modules, checks and operators.

    A token of a small model is a fraction of a millisecond of arithmetic; modules and operators cost several times
    that. The step uses the weights that the model has now and sees changes in place, such as an optimizer's.
    """

    def __init__(self, model, cache):
        self.model, self.config, self.cache = model, model.config, cache
        self.kernels = _backend(model).token_step
        self.one_row, self.masks = cache.max_new_tokens_per_call > 1, {}
        ropes = [block.attn.rope for block in model.blocks]
        self.angles = {rope: rope and partial(rope.at, device=cache.lengths.device) for rope in ropes}
        self.embedding = model.wte.weight.detach()
        self.positions = model.wpe.weight.detach() if self.config.positions == "learned" else None
        self.head = self.embedding.t() if self.config.tie_weights else model.lm_head.weight.detach().t()
        self.norm = _norm(model.ln_f)
        self.forward_many = through_onednn(self._forward)
        self.layers = [
            (
                *(block.attn.rope, _norm(block.ln_1), _linear(block.attn.qkv), self._attention(k, v, block.attn)),
                *(_linear(block.attn.proj), _norm(block.post_1)),
                *(_norm(block.ln_2), _linear(block.mlp.fc), one_call_gelu if block.mlp.act is gelu else block.mlp.act),
                *(_linear(block.mlp.proj), _norm(block.post_2)),
            )
            for block, k, v in zip(model.blocks, cache.k, cache.v, strict=True)
        ]

    @torch.inference_mode()
    def __call__(self, tokens, last=False):
        """The logits (B, V) after one more token of each row: model(tokens[:, None], cache=cache)[0][:, -1].

        With a cache for several tokens a call, tokens (T,) are of one row, and logits (T, V); last: (1, V).
        """
        self.cache.advance(len(tokens) if self.one_row else 1, self.model.config)
        lengths, D, distance = self.cache.lengths, self.config.head_dim, self.config.prefix_distance
        forward = self.forward_many if len(tokens) >= MANY_ROWS else self._forward
        if self.one_row and len(tokens) > 1:
            kind = partial(self.kernels.RowPositions, lengths, len(tokens), D, masks=self.masks)
        else:
            kind = partial(self.kernels.StepPositions, lengths, D, distance=distance, masks=self.masks)
        positions = {rope: kind(angles=angles) for rope, angles in self.angles.items()}
        return forward(tokens, positions, last)

    def _attention(self, k, v, attn):
        kind = self.kernels.RowAttention if self.one_row else self.kernels.CachedAttention
        norms = [_head_norm(norm, attn.head_dim) for norm in (attn.q_norm, attn.k_norm) if norm is not None]
        rotated = 0 if attn.rope is None else self.config.rotated
        lengths = self.cache.lengths
        return kind(k, v, attn.n_head, rotated, lengths, attn.window, attn.prefix, norms=norms, **attn.scores)

    def _forward(self, tokens, positions, last):
        addmm, config = torch.addmm, self.config
        x = F.embedding(tokens, self.embedding)  # (B, C)
        if config.embedding_scale != 1:
            x = x * config.embedding_scale
        if self.positions is not None:
            x = x + self.positions[positions[None].position]
        for rope, norm_1, qkv, attend, proj, post_1, norm_2, fc, act, out, post_2 in self.layers:
            heads = attend(addmm(qkv[0], norm_1(x), qkv[1]), positions[rope])
            x = x + post_1(addmm(proj[0], heads, proj[1]))
            x = x + post_2(addmm(out[0], act(addmm(fc[0], norm_2(x), fc[1])), out[1]))
        logits, cap = torch.mm(self.norm(x[-1:] if last else x), self.head), config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _linear(module):
    """(bias, matrix) for addmm."""
    weight = module.weight.detach().t()
    return weight.new_zeros(weight.shape[1]) if module.bias is None else module.bias.detach(), weight


def _norm(module):
    """A norm as a function, in one call where it can be."""
    if isinstance(module, nn.Identity):
        return lambda x: x
    if isinstance(module, blocks.RMS1Norm):
        return module.forward
    options, weight, eps = (module.normalized_shape,), module.weight.detach(), module.eps
    if isinstance(module, nn.RMSNorm):
        return lambda x: torch.rms_norm(x, *options, weight, eps)
    bias = None if module.bias is None else module.bias.detach()
    return lambda x: torch.layer_norm(x, *options, weight, bias, eps)


def _head_norm(module, head_dim):
    """The norm of q or of k as a function of heads (N, H, D)."""
    norm = _norm(module)
    return norm if module.normalized_shape == (head_dim,) else lambda x: norm(x.flatten(1)).view(x.shape)


class CUDAGraphStep:
    """One token a row on a GPU: the model's forward, captured as a CUDA graph and replayed.

    A step is dozens of short kernels, which the host launches more slowly than the GPU runs them. No kernel of a step
    depends on the host (positions come from the cache's `lengths`), so one graph serves every token. It is captured
    again when the tables of angles, which it reads, are replaced by longer ones. The step uses the weights that the
    model has now and sees changes in place.
    """

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.ropes = {block.attn.rope for block in model.blocks} - {None}
        self.tokens = torch.zeros(len(cache.lengths), 1, dtype=torch.long, device=cache.lengths.device)
        self.graph, self.tables = None, []

    @torch.no_grad()
    def __call__(self, tokens):
        """The logits (B, V) after one more token of each row, tokens (B,). The next step overwrites them."""
        cache = self.cache
        cache.check_room(1, self.model.config)
        tables = [table for rope in self.ropes for table in rope(cache.columns + 1, cache.lengths.device)]
        self.tokens.copy_(tokens[:, None])
        if self.graph is None or any(new is not old for new, old in zip(tables, self.tables, strict=True)):
            self._capture()
            self.tables = tables
        self.graph.replay()
        cache.columns += 1  # the graph counts the lengths, on the device
        return self.logits

    def _capture(self):
        """Record the step. The warm-ups write this step's token into its own slots, which does no harm."""
        cache, graph = self.cache, torch.cuda.CUDAGraph()
        columns, lengths = cache.columns, cache.lengths.clone()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._forward()
                cache.columns = columns
                cache.lengths.copy_(lengths)
        current.wait_stream(side)
        with torch.cuda.graph(graph):
            self.logits = self._forward()
        cache.columns = columns  # a capture runs nothing, so lengths have not changed
        self.graph = graph

    def _forward(self):
        return self.model(self.tokens, cache=self.cache)[0][:, -1]
